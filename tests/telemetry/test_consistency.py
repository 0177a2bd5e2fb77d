"""All sets together: what they count is what the trace and the journal have, exactly."""

import json
import pathlib
import re
from collections import Counter
from typing import Any

import pytest
from tests.kit import run_python
from tests.receivers.datadog import DatadogAgent, StatsdSocket
from tests.telemetry.many import RUNS, key

pytest_plugins = ["tests.receivers.fixtures"]


@pytest.mark.parametrize("seed", ["one", pytest.param("two", marks=pytest.mark.nightly)])
def test_all_count_the_same(
    seed: str, datadog_agent: DatadogAgent, statsd: StatsdSocket, tmp_path: pathlib.Path
) -> None:
    """Trace, journal, OpenTelemetry, Prometheus, Datadog and Sentry agree on every figure of 150 runs."""
    words = ("-m", "tests.telemetry.many", seed, tmp_path / "runs.db", f"{statsd.host}:{statsd.port}")
    seen: dict[str, Any] = json.loads(run_python(*words, env=datadog_agent.environment()))
    assert not any(seen["errors"].values()), seen["errors"]

    executions = seen["executions"]
    # The runs drew what they were to draw.
    outcomes = Counter(
        name.split(" ")[-2] if name.split(" ")[-1].isupper() else name.split(" ")[-1]
        for name in executions["trace"]
    )
    assert {"success", "failure", "cancelled", "suspended"} <= set(outcomes)
    assert executions["journal"] == executions["trace"]
    assert executions["otel"] == executions["trace"]
    assert executions["prometheus"] == executions["trace"]
    statistics = statsd.statistics()
    of_datadog: Counter[str] = Counter()
    for line in statistics:
        if line.name == "stroma.node.executions":
            tags = line.tags
            of_datadog[key(tags["node_id"], tags["outcome"], tags["failure_class"])] += int(line.value)
    # Its client puts underscores for brackets, blanks and commas in tags.
    assert of_datadog == {_as_tag(name): count for name, count in executions["trace"].items()}
    # An attempt whose input broke its contract had no start, and so no span of its own.
    assert sum(seen["attempt_spans"].values()) + seen["without_start"] == sum(executions["trace"].values())

    def total(name: str) -> float:
        return sum(float(line.value) for line in statistics if line.name == name)

    assert set(seen["tokens"].values()) == {seen["tokens"]["trace"]}
    assert total("stroma.tokens") == seen["tokens"]["trace"] > 0
    for what, micro in seen["micro_dollars"].items():
        assert micro == pytest.approx(seen["micro_dollars"]["trace"], rel=1e-9), what
    assert total("stroma.cost_usd") * 1e6 == pytest.approx(seen["micro_dollars"]["trace"])
    lost = {
        "datadog": 1e6
        * sum(
            float(line.value)
            for line in statistics
            if line.name == "stroma.cost_usd" and line.tags["outcome"] != "success"
        ),
        **seen["lost_micro_dollars"],
    }
    for what, micro in lost.items():
        assert micro == pytest.approx(lost["journal"], rel=1e-9), what
    assert 0 < lost["journal"] < seen["micro_dollars"]["trace"]

    assert set(seen["runs"].values()) == {seen["runs"]["ended"]}
    assert total("stroma.runs") == seen["runs"]["ended"]
    assert seen["active"] == {"otel": 0, "prometheus": 0}
    assert len(set(seen["hook_errors"].values())) == 1
    assert total("stroma.hook.errors") == seen["hook_errors"]["results"] > 0
    assert len(set(seen["cooldowns"].values())) == 1
    assert total("stroma.limit.cooldowns") == seen["cooldowns"]["hooks"] > 0
    assert len(set(seen["waits"].values())) == 1
    assert total("stroma.node.waits") == seen["waits"]["hooks"] > 0
    assert seen["issues"]["sentry"] == seen["issues"]["results"] > 0
    assert seen["orphans"] == []
    assert not seen["left_current"]

    traces = datadog_agent.traces(at_least=seen["runs"]["ended"])
    spans = [span for trace in traces for span in trace]
    around = {span["span_id"]: span for span in spans}
    runs = {at: span for at, span in around.items() if span["name"] == "stroma.run"}
    nodes = {span["span_id"]: span for span in spans if span["name"] == "stroma.node"}
    assert len(runs) == seen["runs"]["ended"] == seen["sentry_transactions"]
    assert len(nodes) == seen["node_spans"]["otel"] == seen["node_spans"]["sentry"]
    places: Counter[tuple[str, str]] = Counter()
    for span in nodes.values():
        above = around[span["parent_id"]]
        assert above["meta"]["stroma.run.id"] == span["meta"]["stroma.run.id"]
        names = {"stroma.node": above["resource"], "stroma.map": f"stroma.map {above['resource']}"}
        places[span["resource"], names.get(above["name"], "")] += 1
    # Each node is under the same group or map, or under a run or flow, in both.
    assert places == {(name, group): count for name, group, count in seen["tree"]}
    failed = {name for name, status in seen["statuses"].items() if name in ("FAILED", "PARTIAL") and status}
    assert {s["meta"]["stroma.status"] for s in runs.values() if s["error"]} == failed
    assert seen["runs"]["ended"] <= RUNS


def _as_tag(name: str) -> str:
    """The name of a group as it is in a tag; what follows it is the outcome."""
    head, bracket, outcome = name.rpartition(")")
    return re.sub(r"[(), ]", "_", head + bracket) + outcome
