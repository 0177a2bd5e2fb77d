"""sentry_hooks, with the real SDK and a transport that records: what makes an issue, once and at its node."""

import asyncio
import logging
from typing import Any

import pytest
import sentry_sdk
from pydantic import BaseModel, SecretStr
from sentry_sdk.integrations.dedupe import DedupeIntegration
from sentry_sdk.integrations.logging import LoggingIntegration
from sentry_sdk.utils import event_from_exception
from tests.kit import ONCE, computing, context_of, failing_with, passing, retry_policies, returning
from tests.kit import Item as Out
from tests.receivers.sentry import RecordedSentry

from stroma import (
    ExecutionBudget,
    FailureClass,
    FailurePolicy,
    NodeHooks,
    Pipeline,
    RunStatus,
    StromaRunner,
    Suspend,
    current_node,
    execute_step,
    parallel,
)
from stroma.telemetry import log_hooks, sentry_hooks

pytest_plugins = ["tests.receivers.fixtures"]


class State(BaseModel):
    n: int = 0
    key: SecretStr = SecretStr("sk-hunter2")


class QuotaError(Exception):
    pass


def quick(sentry: RecordedSentry, *, retries: int = 1, extra: Any = (), **options: Any) -> StromaRunner:
    content = {name: options.pop(name) for name in ("content", "deny_keys", "max_bytes") if name in options}
    policies = retry_policies(retries)
    hooks = [sentry_hooks(client=sentry.client, **content), *extra]
    return StromaRunner.quick(hooks=hooks, policy_map=policies, **options)


def node(runner: StromaRunner, name: str, error: type[Exception] | None = None, *, failures: int = 99) -> Any:
    @runner.node(name, input=State, output=State)
    async def call(state: State) -> State:
        secret = state.key.get_secret_value()
        if error is not None and current_node().attempt <= failures:
            raise error(f"{name} said no to {secret}")
        await asyncio.sleep(0)
        return state

    return call


async def test_a_final_failure_is_one_issue_at_the_nodes_span(sentry: RecordedSentry) -> None:
    """One event per run that failed: grouped by what failed, pointing at the span of the node that did."""
    runner = quick(sentry)
    nodes = [node(runner, "good"), node(runner, "bad", QuotaError)]
    result = await runner.run(Pipeline("letters", nodes), State())
    assert result.status is RunStatus.PARTIAL
    (event,) = sentry.transport.events
    span = sentry.transport.span("bad")
    command = ["stroma", "letters", "bad", "AMBIGUOUS", "tests.telemetry.test_sentry.QuotaError"]
    assert event["fingerprint"] == command
    assert event["contexts"]["trace"]["span_id"] == span["span_id"]
    assert event["contexts"]["trace"]["trace_id"] == span["trace_id"]
    assert event["contexts"]["stroma"]["run_id"] == result.run_id
    assert event["tags"]["stroma.node"] == "bad"
    run = sentry.transport.span("letters")
    assert span["parent_span_id"] == run["span_id"]
    statuses = [s["status"] for s in (run, span, sentry.transport.span("good"))]
    assert statuses == ["unavailable", "internal_error", "ok"]
    # The frames are those of the node, the engine's are not the application's.
    frames = event["exception"]["values"][-1]["stacktrace"]["frames"]
    assert [frame["function"] for frame in frames if frame["in_app"]][-1] == "call"
    assert not [frame for frame in frames if frame["module"].startswith("stroma.") and frame["in_app"]]


async def test_a_retried_failure_is_a_breadcrumb(sentry: RecordedSentry) -> None:
    """What succeeds in the end makes no issue; what fails later has the earlier failures as breadcrumbs."""
    runner = quick(sentry)
    await runner.run([node(runner, "flaky", ConnectionError, failures=1)], State())
    assert sentry.transport.events == []
    await runner.run(
        [node(runner, "flaky 2", ConnectionError, failures=1), node(runner, "bad", ValueError)], State()
    )
    (event,) = sentry.transport.events
    crumbs = [crumb for crumb in event["breadcrumbs"]["values"] if crumb["category"] == "stroma.run"]
    assert [(crumb["message"], crumb["data"]["type"]) for crumb in crumbs] == [
        ("node flaky 2 failed and is tried again", "ConnectionError"),
        ("node bad failed and is tried again", "ValueError"),
    ]


async def test_two_clients_get_the_same_issue(sentry: RecordedSentry) -> None:
    """Of a run with hooks for two clients both have the issue, with each retry once and the node's tags."""
    with RecordedSentry() as another:
        runner = quick(sentry, extra=[sentry_hooks(client=another.client)])

        @runner.node("bad", input=State, output=State)
        async def bad(state: State) -> State:
            sentry_sdk.set_tag("language", "en")
            raise ValueError

        await runner.run([node(runner, "flaky", ConnectionError, failures=1), parallel(bad)], State())
        for one in (sentry, another):
            (event,) = one.transport.events
            crumbs = [crumb["message"] for crumb in event["breadcrumbs"]["values"]]
            assert crumbs == [f"node {name} failed and is tried again" for name in ("flaky", "bad")]
            assert (event["tags"]["language"], event["tags"]["stroma.node"]) == ("en", "bad")


@pytest.mark.core
async def test_siblings_stand_side_by_side(sentry: RecordedSentry) -> None:
    """Children of a group are under the group, not each other; the child that failed has the issue."""
    runner = quick(sentry)
    inner: list[tuple[str, Any]] = []

    def child(name: str) -> Any:
        @runner.node(name, input=State, output=State)
        async def call(state: State) -> State:
            with sentry_sdk.start_span(op="user", name=f"in {name}"):
                await asyncio.sleep(0.001)
            inner.append((name, sentry_sdk.get_current_scope()._tags.get("stroma.node")))
            return state

        return call

    group = parallel(child("a"), child("b"), parallel(child("c"), node(runner, "bad", ValueError)))
    await runner.run([group], State())
    spans = {span["span_id"]: span for span in sentry.transport.spans}
    parents = {
        span["name"]: spans[span["parent_span_id"]]["name"]
        for span in spans.values()
        if span["parent_span_id"]
    }
    assert parents == {
        group.node_id: "pipeline",
        "a": group.node_id,
        "b": group.node_id,
        "parallel(c, bad)": group.node_id,
        "c": "parallel(c, bad)",
        "bad": "parallel(c, bad)",
        "in a": "a",
        "in b": "b",
        "in c": "c",
    }
    assert all(name == tag for name, tag in inner)
    (event,) = sentry.transport.events
    assert event["fingerprint"][2] == "bad"
    assert event["contexts"]["trace"]["span_id"] == sentry.transport.span("bad")["span_id"]


async def test_concurrent_runs_do_not_mix(sentry: RecordedSentry) -> None:
    """Breadcrumbs and tags of a run are in its own events alone, however many run at once."""
    runner = quick(sentry)

    async def one(n: int) -> None:
        pipeline = Pipeline(
            f"p{n}",
            [node(runner, f"flaky {n}", ConnectionError, failures=1), node(runner, f"bad {n}", ValueError)],
        )
        await runner.run(pipeline, State())

    await asyncio.gather(*map(one, range(30)))
    events = sentry.transport.events
    assert sorted(event["fingerprint"][1] for event in events) == sorted(f"p{n}" for n in range(30))
    for event in events:
        n = event["fingerprint"][1][1:]
        crumbs = [crumb["message"] for crumb in event["breadcrumbs"]["values"]]
        assert len(crumbs) == 2
        assert all(f" {n} failed" in crumb for crumb in crumbs)
    assert (
        sentry_sdk.get_isolation_scope()._breadcrumbs == type(sentry_sdk.get_isolation_scope()._breadcrumbs)()
    )


@pytest.mark.core
async def test_a_nested_run_that_fails_is_one_issue(sentry: RecordedSentry) -> None:
    """The exception of an inner run that ends the outer one too is captured once, where it arose."""
    runner = quick(sentry, retries=0)

    @runner.node("outer", input=State, output=State)
    async def outer(state: State) -> State:
        result = await runner.run(Pipeline("inner", [node(runner, "bad", ValueError)]), state)
        result.raise_for_status()
        return state

    await runner.run([outer], State())
    (event,) = sentry.transport.events
    assert event["fingerprint"][1:3] == ["inner", "bad"]


@pytest.mark.parametrize("ending", ["cancelled", "suspended", "success"])
async def test_what_is_no_failure_is_no_issue(sentry: RecordedSentry, ending: str) -> None:
    """A cancelled run, a run that waits and one that completes make no issue."""
    runner = quick(sentry)
    started = asyncio.Event()

    @runner.node("node", input=State, output=State)
    async def call(state: State) -> State:
        started.set()
        if ending == "cancelled":
            await asyncio.sleep(60)
        if ending == "suspended":
            raise Suspend("may I?")
        return state

    task = asyncio.create_task(runner.run([call], State()))
    await started.wait()
    if ending == "cancelled":
        task.cancel()
    await asyncio.wait([task])
    assert sentry.transport.events == []
    status = sentry.transport.span("node")["status"]
    assert status == "ok"
    outcome = sentry.transport.span("node")["data"]["stroma.outcome"]
    assert outcome == ending


async def test_a_budget_that_refuses_a_node_is_an_issue(sentry: RecordedSentry) -> None:
    """A run that stops before a node, with no attempt that failed, has its issue at the run's span."""
    runner = quick(sentry, budget=ExecutionBudget(max_tokens_total=0))
    spender = runner.node("spender", input=State, output=State)(computing(lambda state: (state, 5)))
    await runner.run([spender], State())
    (event,) = sentry.transport.events
    assert event["fingerprint"][-1] == "stroma.cost.budget.BudgetExceeded"


async def test_steps_of_plain_code(sentry: RecordedSentry) -> None:
    """A step without a run around it is captured when no attempt follows."""
    runner = quick(sentry, retries=1)
    ctx = context_of(runner)

    await execute_step("step", failing_with(ValueError, "no"), State(), ctx)
    (event,) = sentry.transport.events
    assert event["fingerprint"][2] == "step"


@pytest.mark.core
async def test_no_content_by_default(sentry: RecordedSentry) -> None:
    """An event says class and reason, not the message; and no frame has its variables, in no mode."""
    await run_bad(quick(sentry, retries=0))
    (event,) = sentry.transport.events
    assert event["exception"]["values"][-1]["value"] == "RECOVERABLE connection"
    assert "bad said no" not in str(sentry.transport.events + sentry.transport.transactions)


@pytest.mark.core
async def test_redacted_content(sentry: RecordedSentry) -> None:
    """With content="redacted" the message is sent, but for secrets."""
    await run_bad(quick(sentry, retries=0, content="redacted"))
    (event,) = sentry.transport.events
    assert event["exception"]["values"][-1]["value"] == "bad said no to **********"
    assert "hunter2" not in str(sentry.transport.events + sentry.transport.transactions)
    assert "vars" not in str(event["exception"])


@pytest.mark.parametrize("content", ["none", "redacted"])
async def test_the_engines_own_log_lines_tell_nothing(content: str) -> None:
    """Lines of the engine with texts of exceptions or arguments of hooks do not leave by Sentry's logging."""
    broken = failing_with(LookupError, "no dashboard")
    integrations = [LoggingIntegration(level=logging.INFO, event_level=logging.ERROR)]
    with RecordedSentry(integrations=integrations) as sentry:
        runner = quick(sentry, content=content, extra=[NodeHooks(on_node_start=broken)])
        await runner.run([node(runner, "bad", ValueError)], State(n=777_777_777_777_777))
        of_hook, *_, of_run = sentry.transport.events
    assert (of_hook["logger"], of_run["fingerprint"][0]) == ("stroma", "stroma")
    assert "hunter2" not in str(sentry.transport.events)
    assert "777777777777777" not in str(sentry.transport.events)


async def test_a_group_that_a_hook_raises_tells_no_secret() -> None:
    """Sentry's logging integration sends the members of an exception group without the state's secrets."""
    secret = "-".join(["sk", "live", "0123456789"])  # Sentry sends lines of source.

    class Secretive(BaseModel):
        key: SecretStr = SecretStr(secret)

    async def broken(*_: Any) -> None:
        raise ExceptionGroup("unhandled errors in a TaskGroup", [ValueError(secret)])

    integrations = [LoggingIntegration(level=logging.INFO, event_level=logging.ERROR)]
    with RecordedSentry(integrations=integrations) as sentry:
        runner = quick(sentry, extra=[NodeHooks(on_node_success=broken)])

        a = runner.node("a", input=Secretive, output=Secretive)(passing())
        await runner.run([a], Secretive())
        assert "unhandled errors in a TaskGroup" in str(sentry.transport.events)
        assert secret not in str(sentry.transport.events)


async def run_bad(runner: StromaRunner) -> None:
    assert (await runner.run([node(runner, "bad", ConnectionError)], State())).failure is not None


@pytest.mark.parametrize("name", ["stroma.events", "letters.log"])
@pytest.mark.parametrize("logs_first", [False, True])
async def test_beside_log_hooks_there_is_one_issue(name: str, logs_first: bool) -> None:
    """Sentry's logging integration makes no second issue of a line of log_hooks about a failed run."""
    integrations = [LoggingIntegration(level=logging.INFO, event_level=logging.ERROR)]
    with RecordedSentry(integrations=integrations) as sentry, sentry_sdk.new_scope() as scope:
        scope.set_client(sentry.client)
        sets = [sentry_hooks(client=sentry.client), log_hooks(logging.getLogger(name))]
        runner = StromaRunner.quick(hooks=reversed(sets) if logs_first else sets, policy_map=ONCE)
        for _ in range(3):
            await runner.run([node(runner, "bad", ValueError)], State())
        assert [event["fingerprint"][0] for event in sentry.transport.events] == ["stroma"] * 3
        assert "bad said no" not in str(sentry.transport.events), (
            "the engine's own log lines are no breadcrumbs"
        )
        logging.getLogger(name).error("the application's own")
        assert len(sentry.transport.events) == 4
        added = sentry_sdk.get_isolation_scope()._event_processors
        assert len(added) == len(set(added)), "once for all runs"


async def test_under_the_callers_transaction(sentry: RecordedSentry) -> None:
    """Inside of a transaction of the application the run is its span; the caller's scope is unchanged."""
    runner = quick(sentry)
    with sentry_sdk.new_scope() as scope:
        scope.set_client(sentry.client)
        with sentry_sdk.start_transaction(op="http.server", name="GET /") as transaction:
            await runner.run([node(runner, "good")], State())
            assert sentry_sdk.get_current_scope() is scope
            assert sentry_sdk.get_current_span() is transaction
    (sent,) = sentry.transport.transactions
    run = sentry.transport.span("pipeline")
    assert run["parent_span_id"] == sent["contexts"]["trace"]["span_id"]
    assert sentry.transport.span("good")["parent_span_id"] == run["span_id"]


async def test_the_global_client_is_the_default() -> None:
    """Without a client the one of sentry_sdk.init() is used; without that, nothing happens."""
    runner = StromaRunner.quick(hooks=sentry_hooks())
    before = sentry_sdk.get_isolation_scope()
    result = await runner.run([node(runner, "bad", ValueError)], State())
    assert sentry_sdk.get_isolation_scope() is before
    assert result.hook_errors == []
    assert sum(runner.config.hooks.errors.values()) == 0


def violating(runner: StromaRunner) -> Any:
    return runner.node("bad", input=State, output=Out)(returning({"n": "no number"}))


@pytest.mark.core
async def test_a_violation_that_is_redacted_is_the_same_failure(sentry: RecordedSentry) -> None:
    """Where states are redacted, a violation's issue is at the failed child, and is one for nested runs."""
    runner = quick(sentry, retries=0, redact=lambda state: state)
    await runner.run([parallel(violating(runner))], State())
    (event,) = sentry.transport.events
    assert event["fingerprint"][2] == "bad"
    assert event["contexts"]["trace"]["span_id"] == sentry.transport.span("bad")["span_id"]

    @runner.node("outer", input=State, output=State)
    async def outer(state: State) -> State:
        (await runner.run([violating(runner)], state)).raise_for_status()
        return state

    await runner.run([outer], State())
    assert len(sentry.transport.events) == 2


async def test_an_exception_that_is_raised_again_and_again(sentry: RecordedSentry) -> None:
    """Each run that fails has its issue, also if all of them fail with one and the same object."""
    runner, error = quick(sentry, retries=0), QuotaError("closed")

    @runner.node("bad", input=State, output=State)
    async def bad(_: State) -> State:
        raise error

    for _ in range(2):
        await runner.run([bad], State())
        await runner.run([node(runner, "another", ValueError)], State())
    assert [event["fingerprint"][2] for event in sentry.transport.events] == ["bad", "another"] * 2
    assert vars(error).keys() == {"_stroma_notes"}


@pytest.mark.parametrize("is_retried", [True, False])
async def test_an_exception_that_an_integration_captures_in_a_node(is_retried: bool) -> None:
    """The SDK captures errors of openai and its like by itself: the issue is that of the final failure."""
    sentry = RecordedSentry(integrations=[DedupeIntegration()])
    runner, errors = (
        quick(sentry, retries=1),
        [ValueError("first"), None if is_retried else ValueError("last")],
    )

    @runner.node("ask", input=State, output=State)
    async def ask(state: State) -> State:
        error = errors.pop(0)
        if error is not None:
            how = {"type": "openai", "handled": False}
            sentry_sdk.capture_event(*event_from_exception(error, mechanism=how))
            raise error
        return state

    result = await runner.run([ask], State())
    issues = [event["fingerprint"][:3] for event in sentry.transport.events]
    assert issues == ([] if is_retried else [["stroma", "pipeline", "ask"]])
    assert result.status is (RunStatus.COMPLETED if is_retried else RunStatus.PARTIAL)


@pytest.mark.core
async def test_a_run_that_is_only_waited_for_makes_no_issue_of_its_own(
    sentry: RecordedSentry, caplog: pytest.LogCaptureFixture
) -> None:
    """Who attaches to a run gets its failure; the issue, and the lines at ERROR, are of its runner."""
    runner = quick(sentry, retries=0, extra=[log_hooks()], if_running="attach")

    @runner.node("bad", input=State, output=State)
    async def bad(_: State) -> State:
        await asyncio.sleep(0.02)
        raise NotImplementedError("no")

    runner = runner.with_classifiers([lambda _error, _node: FailureClass.TERMINAL])
    results = await asyncio.gather(*(runner.run([bad], State(), run_id="r") for _ in range(3)))
    assert {result.status for result in results} == {RunStatus.FAILED}
    assert len(sentry.transport.events) == 1
    errors = [record.name for record in caplog.records if record.levelno >= logging.ERROR]
    assert sorted(errors) == ["stroma", "stroma.events"]


@pytest.mark.core
async def test_the_line_about_a_failed_run_makes_no_second_issue() -> None:
    """Sentry's logging integration makes an issue of each ERROR line but the engine's of a FAILED run."""
    integrations = [LoggingIntegration(level=logging.INFO, event_level=logging.ERROR)]
    with RecordedSentry(integrations=integrations) as sentry:
        runner = quick(sentry, retries=0)
        result = await runner.run([node(runner, "bad", NotImplementedError)], State())
    assert result.status is RunStatus.FAILED
    assert [event["fingerprint"][2] for event in sentry.transport.events] == ["bad"]


class TestSteps:
    @pytest.mark.core
    async def test_breadcrumbs_do_not_mix(self, sentry: RecordedSentry) -> None:
        """A step of plain code keeps its breadcrumbs to itself, and leaves none behind."""
        runner = quick(sentry)
        before = len(sentry_sdk.get_isolation_scope()._breadcrumbs)

        async def one(n: int) -> None:
            config = runner.config.model_copy(update={"run_id": f"r{n}"})
            ctx = context_of(runner, config)

            async def step(_: State) -> State:
                await asyncio.sleep(0)
                raise ValueError("no")

            await execute_step(f"step {n}", step, State(), ctx)

        await asyncio.gather(*map(one, range(5)))
        for event in sentry.transport.events:
            (crumb,) = event["breadcrumbs"]["values"]
            assert f"node {event['fingerprint'][2]} failed" in crumb["message"]
        assert len(sentry.transport.events) == 5
        assert len(sentry_sdk.get_isolation_scope()._breadcrumbs) == before
        assert sentry_sdk.get_current_span() is None

    async def test_one_issue_of_a_group_and_of_a_run_in_a_step(self, sentry: RecordedSentry) -> None:
        """A group as a step, and a run inside of a step, are one issue each: where the failure arose."""
        runner = quick(sentry, retries=0)
        config = runner.config.model_copy(update={"run_id": "steps"})
        ctx = context_of(runner, config)
        group = parallel(node(runner, "a"), parallel(node(runner, "b", ValueError)))
        await execute_step("group", group, State(), ctx)

        async def step(state: State) -> State:
            (await runner.run([node(runner, "inner", QuotaError)], state, run_id="r")).raise_for_status()
            return state

        await execute_step("step", step, State(), ctx)
        assert [event["fingerprint"][2] for event in sentry.transport.events] == ["b", "inner"]

    @pytest.mark.core
    async def test_a_step_that_is_cancelled_between_attempts(self, sentry: RecordedSentry) -> None:
        """A failure to be tried again is not final: a step that is cancelled before that is no issue."""
        runner = quick(sentry)
        policy = FailurePolicy(max_retries=1, backoff_seconds=60, jitter=False)
        runner = runner.with_policy_map(dict.fromkeys(FailureClass, policy))
        ctx = context_of(runner)
        failed = asyncio.Event()

        async def step(_: State) -> State:
            failed.set()
            raise ValueError("no")

        task = asyncio.create_task(execute_step("step", step, State(), ctx))
        await failed.wait()
        await asyncio.sleep(0.01)
        task.cancel()
        await asyncio.wait([task])
        assert sentry.transport.events == []
        assert sum(runner.config.hooks[0].errors.values()) == 0
