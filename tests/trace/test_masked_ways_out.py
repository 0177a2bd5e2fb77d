"""Secrets in what a run records of exceptions that no node raised: effects, flows, plain code, groups."""

import logging
from typing import Any

import pytest
from pydantic import BaseModel, SecretStr
from tests.kit import NEVER, context_of, passing, same

from stroma import (
    AsyncInMemoryStore,
    Flow,
    RunStatus,
    StromaRunner,
    execute_step,
    map_over,
    parallel,
    stroma_flow,
)

SECRET = "-".join(["sk", "live", "0123456789"])


class Call(BaseModel):
    user: str = "ada"
    token: SecretStr = SecretStr(SECRET)


class Calls(BaseModel):
    calls: list[Call] = []
    done: list[Call] = []


def quick(store: Any = None, **config: Any) -> StromaRunner:
    return StromaRunner.quick(store=store or AsyncInMemoryStore(), policy_map=NEVER, **config)


def identity(runner: StromaRunner, name: str) -> Any:
    return runner.node(name, input=Call, output=Call)(passing())


async def test_the_cause_of_an_unknown_effect_is_masked() -> None:
    """The error of an effect's call and of its reconcile is in the question without secrets."""
    store = AsyncInMemoryStore()
    runner = quick(store)

    def reconcile(state: Call, _key: str) -> Any:
        raise LookupError(f"no answer about {state.token.get_secret_value()}")

    @runner.node("pay", input=Call, output=Call, effect=True, reconcile=reconcile)
    async def pay(state: Call) -> Call:
        raise ConnectionResetError(f"reset after {state.token.get_secret_value()}")

    result = await runner.run([pay], Call(), run_id="r")
    assert result.status is RunStatus.SUSPENDED
    (question,) = store.waiting("r")
    assert "reset after **********; reconcile raised LookupError: no answer about **********" in (
        question.effect.cause
    )


async def test_the_end_of_plain_code_is_masked(caplog: pytest.LogCaptureFixture) -> None:
    """What a block of plain code raises is recorded without the secrets of its steps."""
    store = AsyncInMemoryStore()
    runner = quick(store)

    with pytest.raises(ValueError, match=SECRET):
        config = runner.config.with_run_id("r")
        async with context_of(runner, config) as ctx:
            await execute_step("step", same, Call(), ctx)
            raise ValueError(f"401 for {SECRET}")
    assert store.get_run("r").error == "ValueError: 401 for **********"


async def test_what_a_classifier_raises_is_masked(caplog: pytest.LogCaptureFixture) -> None:
    """The traceback of a classifier that raises is logged without the secrets of the attempt's input."""

    def classifier(exc: Exception, _context: Any) -> Any:
        raise ExceptionGroup("cannot tell", [ValueError(str(exc))])

    runner = quick(classifiers=[classifier])

    @runner.node("call", input=Call, output=Call)
    async def call(state: Call) -> Call:
        raise ValueError(state.token.get_secret_value())

    await runner.run([call], Call())
    assert "in classifier" in caplog.text
    assert "ValueError: **********" in caplog.text
    assert SECRET not in caplog.text


@pytest.mark.parametrize("nested", [False, True])
async def test_what_a_flow_raises_is_masked(nested: bool, caplog: pytest.LogCaptureFixture) -> None:
    """The body of a flow can raise with the secret of its input: record, message and log have it masked."""
    store = AsyncInMemoryStore()
    runner = quick(store)

    @stroma_flow("inner", input=Call, output=Call)
    async def inner(flow: Flow, state: Call) -> Call:
        raise ValueError(f"401 for {state.token.get_secret_value()}")

    @stroma_flow("outer", input=Call, output=Call)
    async def outer(flow: Flow, state: Call) -> Call:
        return await flow.run(inner, state)

    with caplog.at_level(logging.DEBUG, "stroma"):
        result = await runner.run(outer if nested else inner, Call(), run_id="r")
    assert SECRET not in f"{result.failure.message} {store.get_run('r')} {caplog.text}"
    assert "**********" in result.failure.message


@pytest.mark.parametrize("kind", ["parallel", "map"])
async def test_the_failure_of_a_group_is_masked(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    """A child's exception group with the secret of its state is masked in both failures."""
    runner = quick()

    @runner.node("call", input=Call, output=Call)
    async def call(state: Call) -> Call:
        raise ExceptionGroup(f"of {SECRET}", [ValueError(state.token.get_secret_value())])

    group: Any = (
        map_over("calls", call, into="done") if kind == "map" else parallel(call, identity(runner, "other"))
    )
    with caplog.at_level(logging.DEBUG, "stroma"):
        result = await runner.run([group], Calls(calls=[Call()]) if kind == "map" else Call(), run_id="r")
    for message in (result.failure.message, result.failure.inner.message, caplog.text, result.to_html()):
        assert SECRET not in message
