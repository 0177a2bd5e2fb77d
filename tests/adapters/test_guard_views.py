"""Views and signatures of guarded callables: a guard changes nothing for those who call or inspect them."""

import functools
import inspect
import logging
from typing import Any

import pytest
from tests.kit import Text as Query

from stroma import ContractViolation, RunStatus, Usage
from stroma.adapters import Guard
from stroma.adapters._step import GuardedStep


class Unseen(Exception):
    """What a view raises."""


def raises(*_: Any) -> Any:
    raise Unseen("secret state")


@pytest.mark.parametrize("view", ["input_view", "output_view", "usage", "collect"])
@pytest.mark.parametrize("kind", ["call", "acall", "stream", "astream"])
async def test_a_view_that_raises_is_logged_and_never_fails_a_step(
    kind: str, view: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A view (input, output, usage, the result of a stream) that raises is logged; the step still returns."""
    guard, calls = Guard(), []

    def call(text: str) -> str:
        calls.append(text)
        return text

    async def acall(text: str) -> str:
        return call(text)

    def stream(text: str) -> Any:
        yield call(text)

    async def astream(text: str) -> Any:
        yield call(text)

    func = {"call": call, "acall": acall, "stream": stream, "astream": astream}[kind]
    options: dict[str, Any] = {view: raises}
    step: Any = guard.wrap("step", func, **options)
    seen: Any
    with caplog.at_level(logging.WARNING):
        async with guard.run("x") as run:
            if kind == "call":
                seen = [step("a")]
            elif kind == "acall":
                seen = [await step("a")]
            else:
                seen = list(step("a")) if kind == "stream" else [part async for part in step("a")]
    assert (seen, calls) == (["a"], ["a"])
    assert run.result.status is RunStatus.COMPLETED
    if view != "collect" or "stream" in kind:
        (message,) = caplog.messages
        assert "step 'step' raised Unseen" in message


def test_a_contract_judges_what_a_broken_view_shows() -> None:
    """No contract is passed over in silence: what cannot be seen does not satisfy it."""
    guard, calls = Guard(), list[str]()
    step: Any = guard.wrap("step", calls.append, contract=_contract(input=Query), input_view=raises)
    with pytest.raises(ContractViolation), guard.run("x"):
        step("a")
    assert calls == []


def test_a_control_that_raises_leaves_the_failure_as_it_is(caplog: pytest.LogCaptureFixture) -> None:
    """What reads the meaning of an exception cannot replace it."""
    guard = Guard()
    step = GuardedStep("step", control=raises, can_retry=False)

    def broken() -> None:
        raise LookupError("no")

    with pytest.raises(LookupError, match="no"), guard.run("x"):
        guard.call(step, broken)
    assert any("raised Unseen" in message for message in caplog.messages)


def _contract(**schemas: Any) -> Any:
    from stroma.adapters.guard import contract_for

    return contract_for("step", (schemas.get("input"), schemas.get("output")))


class Tools:
    def plain(self, query: str, *, limit: int = 2) -> str:
        return query * limit

    guarded = Guard().step("guarded")(plain)
    counted = Guard().step("counted", usage=lambda _: Usage(1, 1))(plain)


@pytest.mark.parametrize("name", ["guarded", "counted"])
def test_a_signature_never_holds_self(name: str) -> None:
    """Frameworks wrap a bound method again, as functools.wraps does, and read what it takes."""

    def again(bound: Any) -> Any:
        @functools.wraps(bound)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            return bound(*args, **kwargs)

        return wrapper

    tools = Tools()
    plain = inspect.signature(tools.plain)
    assert inspect.signature(getattr(tools, name)) == plain
    assert inspect.signature(again(getattr(tools, name))) == plain
    assert inspect.signature(getattr(Tools, name)) == inspect.signature(Tools.plain)
    assert inspect.signature(Guard().wrap("x", tools.plain)) == plain
    assert inspect.signature(Guard().wrap("x", functools.partial(tools.plain, limit=3))) == inspect.signature(
        functools.partial(tools.plain, limit=3)
    )
    assert again(getattr(tools, name))("a", limit=3) == "aaa"


def test_a_second_contract_is_an_error() -> None:
    """What was guarded with one contract is not guarded with another in silence."""
    guard = Guard()
    step = guard.wrap("step", lambda text: text, contract=_contract(input=Query))
    assert guard.has(step)
    assert guard.has(step, _contract(input=Query))
    with pytest.raises(ValueError, match="'step' is already attached to this guard, with another contract"):
        guard.has(step, _contract(output=Query))
    bare = guard.wrap("step", lambda text: text)
    with pytest.raises(ValueError, match="or without one"):
        guard.has(bare, _contract(input=Query))
