"""What makes an issue in Sentry: of runs in runs, of awaited runs, of steps of plain code."""

import asyncio
import logging
from typing import Any

import pytest
import sentry_sdk
from sentry_sdk.integrations.dedupe import DedupeIntegration
from sentry_sdk.integrations.logging import LoggingIntegration
from sentry_sdk.utils import event_from_exception
from tests.kit import Item as Out
from tests.kit import context_of, returning
from tests.receivers.sentry import RecordedSentry
from tests.telemetry.test_sentry import QuotaError, State, node, quick

from stroma import FailureClass, FailurePolicy, RunStatus, StromaRunner, execute_step, parallel
from stroma.telemetry import log_hooks

pytest_plugins = ["tests.receivers.fixtures"]


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
