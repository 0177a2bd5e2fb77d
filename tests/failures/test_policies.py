"""Policies and classifiers: defaults, limits, and what providers say."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from tests.kit import NEVER, Num, failing_with, node, quick

from stroma import FailureClass, NodeContext, RunStatus, Suspend, classify
from stroma.failures import ItemFailure


def test_a_failed_item_knows_no_reason_by_itself() -> None:
    """An item's reason is None where nobody knows one, and it counts one attempt."""
    failure = ItemFailure(index=0, node_id="node", failure_class=FailureClass.AMBIGUOUS, message="message")
    assert (failure.reason, failure.attempts) == (None, 1)


def test_a_suspension_says_what_it_waits_for() -> None:
    """Its reason is kept as given, and what is no model is named in the refusal."""
    assert Suspend("the boss", schema=Num).reason == "the boss"
    with pytest.raises(TypeError, match=r"^the schema of Suspend must be a pydantic model, got .*int.*"):
        Suspend("the boss", schema=int)
    with pytest.raises(TypeError, match=r"^the reason of Suspend must be a string, got "):
        Suspend(None)


R, T, A = FailureClass.RECOVERABLE, FailureClass.TERMINAL, FailureClass.AMBIGUOUS


def error_with(base: type[Exception], **attributes: Any) -> Exception:
    return type("Shaped", (base,), attributes)("x")


@pytest.mark.parametrize(
    ("status", "expected"), [(401, T), (400, T), (404, T), (429, R), (503, R), (None, R)]
)
def test_what_a_provider_says_comes_before_what_a_timeout_is(
    status: int | None, expected: FailureClass
) -> None:
    """A TimeoutError with a provider's status is what that says; without one it is RECOVERABLE."""
    error = error_with(TimeoutError, **({} if status is None else {"status_code": status}))
    assert classify(error, NodeContext("n", 1, "r")) is expected


@pytest.mark.parametrize(
    "header",
    [
        "Mon, 01 Jan 9999 00:00:00 -2359",
        "Mon, 01 Jan 0001 00:00:00 +2359",
        "1e999",
        "nan",
        "9" * 5000,
        "soon",
    ],
)
def test_a_senseless_retry_after_breaks_nothing(header: str) -> None:
    """A Retry-After that is no date or number of this world leaves a 429 RECOVERABLE."""
    error = error_with(Exception, status_code=429, headers={"retry-after": header})
    assert classify(error, NodeContext("n", 1, "r")) is R


@pytest.mark.parametrize("error", [LookupError, asyncio.CancelledError], ids=lambda e: e.__name__)
async def test_a_classifier_that_raises_is_skipped(error: type[BaseException]) -> None:
    """G2: A classifier that raises is skipped, also if it raises CancelledError."""

    def classifier(exc: Exception, context: Any) -> FailureClass | None:
        raise error

    result = await quick(classifiers=[classifier]).run([node("a", failing_with(ConnectionError))], Num())
    assert [event.failure for event in result.trace] == [FailureClass.RECOVERABLE] * 3


@pytest.mark.core
@pytest.mark.parametrize("kind", [asyncio.CancelledError, GeneratorExit, BaseException, ValueError])
@pytest.mark.parametrize("where", ["__str__", "status_code", "__cause__"])
async def test_an_exception_that_raises_anything_is_a_failure(kind: type[BaseException], where: str) -> None:
    """G2: An exception whose text or attributes raise is a failure of its node like any other."""

    def misbehave(self: object) -> Any:
        raise kind("no")

    members = {where: misbehave if where == "__str__" else property(misbehave)}
    hostile = type("Hostile", (Exception,), members)

    result = await quick(policy_map=NEVER).run([node("a", failing_with(hostile, "words"))], Num())
    assert result.status is RunStatus.PARTIAL
    assert result.failure.failure_class is FailureClass.AMBIGUOUS
    assert result.failure.message == ("Hostile" if where == "__str__" else "words")
