"""The Grafana dashboard against Grafana's published schema: the classes that its own SDK is generated with.

./dev test --framework grafana
"""

import json
from collections.abc import Iterator
from importlib import resources
from typing import Any

import pytest
from grafana_foundation_sdk.cog import plugins
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.dashboard import Dashboard, Panel

pytestmark = pytest.mark.nightly

SHIPPED = json.loads(
    resources.files("stroma.telemetry").joinpath("assets", "grafana-dashboard.json").read_text("utf-8")
)


@pytest.fixture(scope="module")
def dashboard() -> Dashboard:
    plugins.register_default_plugins()
    return Dashboard.from_json(SHIPPED)


def differences(ours: Any, theirs: Any, place: str = "") -> Iterator[str]:
    """Yield the places at which a value that is ours is missing or another."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        for name, value in ours.items():
            if name not in theirs:
                yield f"{place}/{name}: unknown"
            else:
                yield from differences(value, theirs[name], f"{place}/{name}")
    elif isinstance(ours, list) and isinstance(theirs, list) and len(ours) == len(theirs):
        for number, (mine, other) in enumerate(zip(ours, theirs, strict=True)):
            yield from differences(mine, other, f"{place}[{number}]")
    elif ours != theirs:
        yield f"{place}: {ours!r} is {theirs!r}"


def test_the_schema_knows_every_field(dashboard: Dashboard) -> None:
    """What the SDK reads of the dashboard and writes again is complete: panels of each type, and queries."""
    again = json.loads(json.dumps(dashboard, cls=JSONEncoder))
    ours = {name: value for name, value in SHIPPED.items() if name != "id"}  # None, which it leaves out.
    assert list(differences(ours, again)) == []


def test_an_unknown_field_is_found() -> None:
    """The comparison sees a field that the schema does not have, in a panel's own options."""
    plugins.register_default_plugins()
    wrong = json.loads(json.dumps(SHIPPED))
    panel = next(panel for panel in wrong["panels"] if panel["type"] == "stat")
    panel["options"]["colour"] = "red"
    again = json.loads(json.dumps(Dashboard.from_json(wrong), cls=JSONEncoder))
    assert [line for line in differences(wrong, again) if "colour" in line]


def test_panels_have_queries_of_prometheus(dashboard: Dashboard) -> None:
    """Each panel is read as one of its type, and its targets as queries of Prometheus."""
    panels = [one for one in dashboard.panels or [] if isinstance(one, Panel)]
    assert len(panels) > 20
    for panel in panels:
        assert panel.targets
        assert {type(target).__module__.rpartition(".")[2] for target in panel.targets} == {"prometheus"}
