"""Flows in telemetry: exporters show their steps like nodes of a list, under the right parent."""

import asyncio
import json
import logging
from typing import Any

import pytest
from opentelemetry import trace
from prometheus_client import CollectorRegistry
from tests.kit import ONCE, Num, run_python
from tests.receivers.datadog import DatadogAgent, StatsdSocket
from tests.receivers.sentry import RecordedSentry
from tests.telemetry.test_opentelemetry import Seen

from stroma import (
    Flow,
    Pipeline,
    RunStatus,
    StepFailed,
    StromaRunner,
    current_node,
    parallel,
    stroma_flow,
    stroma_node,
)
from stroma.engine.execution import running_agent
from stroma.telemetry import log_hooks, prometheus_hooks, sentry_hooks

pytest_plugins = ["tests.receivers.fixtures"]


def step(name: str, *, failures: int = 0) -> Any:
    async def call(state: Num) -> Any:
        await asyncio.sleep(0.001)
        here = current_node()
        if here.attempt <= failures:
            raise ConnectionError("no")
        return state, 10, 5, "gpt-4o-mini"

    return stroma_node(name, input=Num, output=Num)(call)


first, flaky, bad = step("first"), step("flaky", failures=1), step("bad", failures=9)
both = parallel(step("left"), step("right"))


@stroma_flow("letters", input=Num, output=Num)
async def in_turn(flow: Flow, state: Num) -> Num:
    """The same as the list of these nodes."""
    await flow.step(both, await flow.step(flaky, await flow.step(first, state)))
    return state


@stroma_flow("inside", input=Num, output=Num)
async def inside(flow: Flow, state: Num) -> Num:
    return await flow.step(first, state)


@stroma_flow("letters", input=Num, output=Num)
async def letters(flow: Flow, state: Num) -> Num:
    """Everything that a flow may call, at once and in turn."""
    await asyncio.gather(flow.step(flaky, state), flow.run(inside, state), flow.step(both, state))
    await flow.map(first, [state, state])
    try:
        await flow.step(bad, state)
    except StepFailed:
        pass
    await flow.run(Pipeline("steps", [first]), state)
    with running_agent("clerk"):
        await flow.step(first, state)
        with running_agent("helper"):
            await flow.step(first, state)
    return await flow.step(first, state)


LIST = Pipeline("letters", [first, flaky, both])
GROUP = f"stroma.node {both._stroma_node_id}"
RUN = "invoke_workflow letters"
#: (span, parent) of the flow.
SPANS = sorted(
    [
        (RUN, None),
        ("stroma.node first", RUN),
        ("stroma.node flaky", RUN),
        ("stroma.node bad", RUN),
        (GROUP, RUN),
        ("stroma.node left", GROUP),
        ("stroma.node right", GROUP),
        *[(f"invoke_workflow {part}", RUN) for part in ("inside", "steps")],
        ("stroma.map first", RUN),
        ("invoke_agent clerk", RUN),
        ("invoke_agent helper", "invoke_agent clerk"),
        *[("stroma.node first", f"invoke_agent {agent}") for agent in ("clerk", "helper")],
        *[("stroma.node first", part) for part in ("invoke_workflow inside", "invoke_workflow steps")],
        *[("stroma.node first", "stroma.map first")] * 2,
    ],
    key=str,
)


def runner_with(hooks: Any, **config: Any) -> StromaRunner:
    return StromaRunner.quick(hooks=hooks, policy_map=ONCE, **config)


async def test_opentelemetry() -> None:
    """Spans of steps are under run or group, metrics have the labels of a list; nothing stays current."""
    flow, of_list = Seen(), Seen()
    assert (await runner_with(flow.hooks()).run(in_turn, Num())).status is RunStatus.COMPLETED
    await runner_with(of_list.hooks()).run(LIST, Num())
    assert flow.tree() == of_list.tree()
    for name in ("executions", "retries"):
        assert flow.points(f"stroma.node.{name}") == of_list.points(f"stroma.node.{name}")
    for name in ("stroma.tokens", "stroma.cost"):
        assert flow.points(name) == of_list.points(name)
    for name in ("stroma.node.duration", "gen_ai.invoke_agent.duration", "stroma.runs.active"):
        assert flow.points(name).keys() == of_list.points(name).keys()

    seen = Seen()
    assert (await runner_with(seen.hooks()).run(letters, Num())).status is RunStatus.COMPLETED
    assert seen.tree() == SPANS
    assert not trace.get_current_span().get_span_context().is_valid
    assert all(span.end_time is not None for span in seen.spans)


async def test_spans_of_a_users_own_in_a_step() -> None:
    """A span that a step opens is under the span of that step, also beside others."""
    seen = Seen()

    def own(name: str) -> Any:
        async def call(state: Num) -> Num:
            with seen.user.start_as_current_span(f"in {name}"):
                await asyncio.sleep(0.001)
            return state

        return stroma_node(name, input=Num, output=Num)(call)

    nodes = [own(name) for name in "abc"]

    @stroma_flow("own", input=Num, output=Num)
    async def body(flow: Flow, state: Num) -> Num:
        await asyncio.gather(*(flow.step(node, state) for node in nodes))
        async with asyncio.TaskGroup() as group:
            for node in nodes:
                group.create_task(flow.step(node, state))
        with seen.user.start_as_current_span("in the body"):
            return await flow.step(nodes[0], state)

    await runner_with(seen.hooks()).run(body, Num())
    under = [one for one in seen.tree() if one[0].startswith("in ")]
    nodes_of = (
        [("in a", "stroma.node a")] * 3 + [("in b", "stroma.node b")] * 2 + [("in c", "stroma.node c")] * 2
    )
    assert under == [*nodes_of, ("in the body", under[-1][1])]
    assert under[-1][1] in (None, "invoke_workflow own")


async def test_sentry(sentry: RecordedSentry) -> None:
    """Spans of steps are under the run or their group; a caught failure is no issue, the last one is."""
    hooks = sentry_hooks(client=sentry.client)
    assert (await runner_with(hooks).run(letters, Num())).status is RunStatus.COMPLETED
    assert sentry.transport.events == []
    spans = sentry.transport.spans
    ids = {span["span_id"]: span for span in spans}

    def name_of(span: Any) -> Any:
        return span.get("description") or span.get("name")

    found = sorted(
        (str(name_of(span)), str(name_of(ids[span["parent_span_id"]])))
        for span in spans
        if span.get("parent_span_id") in ids
    )
    group = both._stroma_node_id
    expected = [
        *[("first", "first")] * 2,
        *[("first", f"invoke_agent {part}") for part in ("inside", "steps")],
        *[("first", f"invoke_agent {agent}") for agent in ("clerk", "helper")],
        ("invoke_agent clerk", "letters"),
        ("invoke_agent helper", "invoke_agent clerk"),
        *[("first", "letters")] * 2,
        *[(f"invoke_agent {part}", "letters") for part in ("inside", "steps")],
        ("flaky", "letters"),
        ("bad", "letters"),
        (group, "letters"),
        ("left", group),
        ("right", group),
    ]
    assert found == sorted(expected)

    @stroma_flow("fails", input=Num, output=Num)
    async def fails(flow: Flow, state: Num) -> Num:
        return await flow.step(bad, await flow.step(first, state))

    await runner_with(hooks).run(fails, Num())
    (event,) = sentry.transport.events
    assert event["fingerprint"][:4] == ["stroma", "fails", "bad", "RECOVERABLE"]


async def test_prometheus() -> None:
    """The series of a flow are those of the same list: no label has an identity of a call."""

    async def series(run: Any) -> dict[Any, float]:
        registry = CollectorRegistry()
        await runner_with(prometheus_hooks(registry=registry)).run(run, Num())
        return {
            (sample.name, tuple(sorted(sample.labels.items()))): sample.value
            for metric in registry.collect()
            for sample in metric.samples
            if not sample.name.endswith(("_created", "_sum", "_bucket"))
        }

    assert await series(in_turn) == await series(LIST)


async def test_logs(caplog: pytest.LogCaptureFixture) -> None:
    """The lines of a flow are those of the same list, with the same fields."""

    async def lines(run: Any) -> list[Any]:
        caplog.clear()
        await runner_with(log_hooks()).run(run, Num())
        fields = ("node_id", "attempt", "pipeline", "outcome", "failure_class", "tokens", "model")
        records = [record for record in caplog.records if record.name == "stroma.events"]
        return [
            (record.getMessage().partition(":")[0], *(getattr(record, name, None) for name in fields))
            for record in records
        ]

    caplog.set_level(logging.DEBUG)
    assert sorted(await lines(in_turn), key=str) == sorted(await lines(LIST), key=str)


PROGRAM = """
import asyncio, sys
from stroma.telemetry import datadog_hooks
from tests.kit import Num
from tests.telemetry.test_flows import letters, runner_with

async def main() -> None:
    runner = runner_with(datadog_hooks(service="letters", statsd=sys.argv[1]))
    await runner.run(letters, Num())
    assert await runner.aclose(timeout_seconds=20)

asyncio.run(main())
"""


@pytest.mark.slow
def test_datadog(datadog_agent: DatadogAgent, statsd: StatsdSocket) -> None:
    """Spans of steps are under the run or their group, and all of them arrive."""
    run_python(f"{statsd.host}:{statsd.port}", code=PROGRAM, env=datadog_agent.environment())
    spans: list[dict[str, Any]] = [span for one in datadog_agent.traces(at_least=1) for span in one]
    ids = {span["span_id"]: span for span in spans}
    found = sorted(
        (span["resource"], ids[span["parent_id"]]["resource"] if span["parent_id"] in ids else None)
        for span in spans
        if span["name"].startswith("stroma.")
    )
    group = both._stroma_node_id
    assert json.loads(json.dumps(found)) == sorted(
        [
            ["letters", None],
            *[["first", "first"]] * 2,
            *[["first", around] for around in ("clerk", "helper", "inside", "letters", "letters", "steps")],
            ["clerk", "letters"],
            ["helper", "clerk"],
            ["inside", "letters"],
            ["steps", "letters"],
            ["flaky", "letters"],
            ["bad", "letters"],
            [group, "letters"],
            ["left", group],
            ["right", group],
        ],
        key=lambda one: (one[0], one[1] or ""),
    )
