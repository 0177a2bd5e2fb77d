"""docs/temporal.md and its examples: the code runs against a server, commands and files are sound."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
import yaml
from tests.docs.blocks import blocks
from tests.docs.test_pages import SERVERS, run_alone
from tests.kit import environment, run_python
from tests.servers_temporal import TemporalServer, temporal_binary

from stroma.cli.app import app

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "temporal.md"
EXAMPLES = ROOT / "examples" / "temporal"
YAML = sorted(EXAMPLES.glob("*.yaml"))


def test_the_code_on_the_page_runs(tmp_path: Path, temporal_server: TemporalServer) -> None:
    """Against a server, and a worker that is started as the page says, with the page's own pipeline."""
    assert PAGE in SERVERS
    (_, code), *_ = blocks(PAGE.read_text("utf-8"))
    (tmp_path / "letters.py").write_text(code)
    words = [
        "letters.py:pipeline",
        "--temporal",
        temporal_server.address,
        "--task-queue",
        "letters",
        "--db",
        "runs.db",
    ]
    command = [sys.executable, "-m", "stroma", "worker", *words]
    worker = subprocess.Popen(command, cwd=tmp_path, env=environment())
    try:
        assert run_alone(PAGE, tmp_path, {}, ("localhost:7233", temporal_server.address)) == 3
    finally:
        worker.terminate()
        assert worker.wait(60) == 0


def parse(words: list[str]) -> dict[str, Any]:
    """What our command line makes of a command. Raises UsageError."""
    assert words[0] == "stroma"
    command = app.get_command(click.Context(app), words[1])
    assert command is not None, words
    return command.make_context(words[1], words[2:]).params


def test_the_commands_on_the_page_are_commands() -> None:
    """Each line of its sh blocks that is one of ours is taken by the command line."""
    lines = [
        line.partition("  #")[0]
        for block in re.findall(r"^```sh\n(.*?)^```$", PAGE.read_text("utf-8"), re.MULTILINE | re.DOTALL)
        for line in block.splitlines()
    ]
    ours = [line for line in lines if line.startswith("stroma ")]
    assert len(ours) == 3
    for line in ours:
        assert parse(shlex.split(line))["address"] == "localhost:7233"
    with pytest.raises(click.UsageError):
        parse(shlex.split("stroma worker letters.py:pipeline --temporal nowhere"))


def documents(path: Path) -> list[dict[str, Any]]:
    return [result for result in yaml.safe_load_all(path.read_text("utf-8")) if result]


def containers() -> Iterator[tuple[str, list[str], dict[str, str]]]:
    """Yield each container of the files: its name, its arguments, and the variables that it is given."""
    for path in YAML:
        for document in documents(path):
            for name, service in document.get("services", {}).items():
                if "command" in service:
                    yield name, service["command"], service.get("environment", {})
            if document.get("kind") == "Deployment":
                pod = document["spec"]["template"]["spec"]
                inputs = {
                    d["metadata"]["name"]: d.get("data") or d["stringData"]
                    for d in documents(path)
                    if d["kind"] in ("ConfigMap", "Secret")
                }
                for container in pod["containers"]:
                    refs = [ref["name"] for source in container.get("envFrom", []) for ref in source.values()]
                    variables = {key: value for ref in refs for key, value in inputs[ref].items()}
                    yield container["name"], container["args"], variables


def test_the_containers_are_started_with_commands_that_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers by our command line with an existing pipeline; servers with options that the server has."""
    flags = subprocess.run(
        [temporal_binary(), "server", "start-dev", "--help"], capture_output=True, text=True, check=True
    ).stdout
    seen = []
    for name, words, variables in containers():
        seen.append(name)
        if name == "temporal":
            assert words[:2] == ["server", "start-dev"]
            for word in words:
                assert not word.startswith("--") or f" {word} " in flags, word
            continue
        with monkeypatch.context() as patch:
            for key, value in variables.items():
                patch.setenv(key, value)
            params = parse(["stroma", *words])
        assert params["address"] == "temporal:7233"
        assert params["db"]
        for target in params["targets"]:
            file, _, attribute = target.partition(":")
            assert f"\n{attribute} = Pipeline(" in (EXAMPLES / file).read_text("utf-8")
    assert sorted(seen) == ["temporal", "temporal", "worker", "worker"]


def test_workers_have_longer_to_end_than_they_drain() -> None:
    """Otherwise what they are at would be killed in the middle."""
    compose, kubernetes = (documents(EXAMPLES / f"{name}.yaml") for name in ("compose", "kubernetes"))
    worker = compose[0]["services"]["worker"]
    assert int(worker["stop_grace_period"].rstrip("s")) > parse(["stroma", *worker["command"]])["drain"]
    pods = [d["spec"]["template"]["spec"] for d in kubernetes if d["kind"] == "Deployment"]
    (pod,) = (pod for pod in pods if pod["containers"][0]["name"] == "worker")
    params = parse(["stroma", *pod["containers"][0]["args"]])
    assert params["address"] == "temporal:7233"
    assert pod["terminationGracePeriodSeconds"] > params["drain"]


def test_the_objects_belong_together() -> None:
    """Selectors find pods, claims and config maps that are named are there."""
    result = documents(EXAMPLES / "kubernetes.yaml")
    named = {(d["kind"], d["metadata"]["name"]) for d in result}
    labels = [d["spec"]["template"]["metadata"]["labels"] for d in result if d["kind"] == "Deployment"]
    for document in result:
        assert document["apiVersion"]
        spec = document.get("spec", {})
        selector = spec.get("selector", {})
        assert not selector or selector.get("matchLabels", selector) in labels
        pod = spec.get("template", {}).get("spec", {})
        for volume in pod.get("volumes", []):
            assert ("PersistentVolumeClaim", volume["persistentVolumeClaim"]["claimName"]) in named
        for container in pod.get("containers", []):
            for source in container.get("envFrom", []):
                ((kind, ref),) = source.items()
                assert ("ConfigMap" if kind == "configMapRef" else "Secret", ref["name"]) in named


def test_the_image_has_what_the_workers_run() -> None:
    """The Dockerfile copies files that are there, and its own command is one of ours."""
    text = (EXAMPLES / "Dockerfile").read_text("utf-8")
    for copied in re.findall(r"^COPY (\S+)", text, re.MULTILINE):
        assert (EXAMPLES / copied).exists()
    (words,) = re.findall(r"^CMD (\[.*\])$", text, re.MULTILINE)
    assert parse(["stroma", *yaml.safe_load(words), "--temporal", "temporal:7233"])["targets"] == (
        "letters.py:pipeline",
    )


def test_the_example_runs() -> None:
    """examples/temporal_letters.py starts a server and workers, and comes to the same there as here."""
    here, there = run_python(ROOT / "examples" / "temporal_letters.py").splitlines()
    assert here.strip() == "here: COMPLETED, words=64"
    assert there.partition(": ")[2] == here.partition(": ")[2]
