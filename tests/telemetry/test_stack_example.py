"""The examples run as they are, and show what they say."""

import pathlib
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.kit import environment, run_python
from tests.receivers.otlp import OtlpReceiver
from tests.receivers.processes import free_port

from stroma.cli import main

pytest_plugins = ["tests.receivers.fixtures"]

STACK = Path(__file__).parents[2] / "examples" / "telemetry_stack"
COMPOSE: dict[str, Any] = yaml.safe_load((STACK / "compose.yaml").read_text())
SERVICES: dict[str, Any] = COMPOSE["services"]


def mounts(service: str) -> dict[str, str]:
    """What is mounted in a service, by its path there."""
    pairs = (mount.split(":") for mount in SERVICES[service].get("volumes", ()))
    return {pair[1]: pair[0] for pair in pairs}


def load(name: str) -> Any:
    return yaml.safe_load((STACK / name).read_text())


def test_what_is_mounted_is_there() -> None:
    """Files that services mount or copy are in the folder, volumes are declared, and ports are local."""
    for name, service in SERVICES.items():
        for source in mounts(name).values():
            assert (STACK / source).is_file() if source.startswith("./") else source in COMPOSE["volumes"]
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", ()))
        assert set(service.get("depends_on", ())) <= set(SERVICES)
    copied = [
        line.split()[1] for line in (STACK / "Dockerfile").read_text().splitlines() if line.startswith("COPY")
    ]
    assert copied == ["service.py"]
    assert "service.py" in SERVICES["service"]["command"]


def test_the_assets_are_where_they_are_looked_for(tmp_path: Path) -> None:
    """The command of the compose file writes Prometheus's rules and Grafana's dashboard."""
    command = SERVICES["assets"]["command"]
    assert command[:4] == ["stroma", "telemetry", "assets", "/assets"]
    assert main(["telemetry", "assets", str(tmp_path), *command[4:]]) == 0
    for service, folder in (("prometheus", "/etc/prometheus/stroma"), ("grafana", "/var/lib/grafana/stroma")):
        assert mounts(service)[folder] == mounts("assets")["/assets"]
        assert SERVICES[service]["depends_on"]["assets"] == {"condition": "service_completed_successfully"}
    prometheus = load("prometheus.yml")
    for rules in map(Path, prometheus["rule_files"]):
        assert str(rules.parent) == "/etc/prometheus/stroma"
        assert (tmp_path / rules.name).is_file()
    (provider,) = load("grafana/dashboards.yml")["providers"]
    assert provider["options"]["path"] == "/var/lib/grafana/stroma"
    assert (tmp_path / "grafana-dashboard.json").is_file()


def test_addresses_are_those_of_services() -> None:
    """Prometheus scrapes the service, Grafana asks Prometheus, traces go to Phoenix, each at its port."""
    (job,) = load("prometheus.yml")["scrape_configs"]
    assert job["static_configs"] == [{"targets": ["service:9464"]}]
    assert '"9464"' in (STACK / "service.py").read_text()
    (source,) = load("grafana/datasources.yml")["datasources"]
    assert (source["type"], source["url"]) == ("prometheus", "http://prometheus:9090")
    endpoint = SERVICES["service"]["environment"]["OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"]
    assert endpoint == "http://phoenix:6006/v1/traces"


def test_the_service_runs(otlp: OtlpReceiver) -> None:
    """Its letters are runs that complete, with sessions and users, and their spans arrive."""
    endpoint = f"{otlp.url}/v1/traces"
    env = environment(OTEL_EXPORTER_OTLP_TRACES_ENDPOINT=endpoint, METRICS_PORT=free_port())
    program = (
        "import random, runpy, sys; random.seed(1); path = sys.argv.pop(1); "
        "runpy.run_path(path, run_name='__main__')"
    )
    run_python(STACK / "service.py", 1, code=program, env=env)
    run = otlp.span("invoke_workflow letters")
    assert run["attributes"]["stroma.status"] == "COMPLETED"
    assert run["attributes"]["session.id"] == f"of {run['attributes']['user.id']}"


EXAMPLE = pathlib.Path(__file__).parents[2] / "examples" / "telemetry.py"
TREE = """\
invoke_workflow invoices, ERROR, TERMINAL auth
  stroma.node parallel(classify, extract)
    stroma.node extract
      chat gpt-4o
    stroma.node classify, 2 attempts
      chat gpt-4o-mini, ERROR, ConnectionError: overloaded, try again
      chat gpt-4o-mini
  stroma.node post, ERROR, TERMINAL auth
invoke_workflow invoices, linked to the first run
  stroma.node post
"""


@pytest.mark.slow
def test_the_example() -> None:
    """A retry, a group, a failure and a resume, told by spans, metrics and log lines, without content."""
    done = subprocess.run(
        [sys.executable, EXAMPLE], env=environment(), capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert TREE in done.stdout
    assert 'stroma_runs_total{pipeline="invoices",status="RESUMED"} 1.0' in done.stdout
    place = 'node_id="extract",outcome="success",pipeline="invoices"'
    assert f'stroma_cost_usd_total{{agent="",model="gpt-4o",{place}}} 0.002885' in done.stdout
    assert [line.split()[0] for line in done.stderr.splitlines()].count(
        "ERROR"
    ) == 2  # Of the engine and of log_hooks.
    assert "Acme" not in done.stdout + done.stderr
