"""Mistakes in the program: they are not tried again."""

from typing import Any

import pytest
from pydantic import BaseModel
from tests.kit import Note

from stroma import FailureClass, NodeContext, RunStatus, StromaRunner, map_over, parallel
from stroma.failures import classify
from stroma.failures.failure import diagnose

WHERE = NodeContext("node", 1, "run")


class Texts(BaseModel):
    items: list[Note] = [Note()]


class OutOfDepth(RecursionError):
    """As frameworks define them."""


BUGS: list[BaseException] = [
    NameError("name 'x' is not defined"),
    UnboundLocalError("x"),
    ImportError("no"),
    ModuleNotFoundError("no"),
    SyntaxError("bad"),
    IndentationError("bad"),
    NotImplementedError("later"),
    RecursionError("deep"),
    OutOfDepth("deep"),
    ExceptionGroup("one task", [NameError("x")]),
    ExceptionGroup("tasks", [NameError("x"), ExceptionGroup("inner", [ImportError("y")])]),
]


@pytest.mark.parametrize("error", BUGS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("place", ["node", "child", "item"])
@pytest.mark.parametrize("sync", [False, True], ids=["async", "thread"])
async def test_a_bug_is_terminal(error: BaseException, place: str, sync: bool) -> None:
    """NameError, ImportError, SyntaxError, NotImplementedError, RecursionError: a "bug", never retried."""
    calls: list[int] = []
    runner = StromaRunner.quick()

    def broken(state: Any) -> Any:
        calls.append(1)
        raise error

    async def broken_async(state: Any) -> Any:
        return broken(state)

    node = runner.node("broken", input=Note, output=Note)(broken if sync else broken_async)
    nodes = {"node": node, "child": parallel(node), "item": map_over("items", node, into="out")}
    result = await runner.run([nodes[place]], Texts())
    assert (result.status, result.failure.reason, calls) == (RunStatus.FAILED, "bug", [1])
    assert result.failure.failure_class is FailureClass.TERMINAL


@pytest.mark.parametrize(
    "error",
    [
        KeyError("k"),
        TypeError("t"),
        AttributeError("a"),
        ExceptionGroup("tasks", [NameError("x"), ValueError("y")]),
    ],
    ids=lambda error: type(error).__name__,
)
def test_what_a_models_answer_may_cause_stays_ambiguous(error: Exception) -> None:
    """KeyError, TypeError and AttributeError, and groups of which not all are bugs, are AMBIGUOUS."""
    assert classify(error, WHERE) is FailureClass.AMBIGUOUS


def test_classifiers_and_providers_come_before_bugs() -> None:
    """A custom classifier has the first word, then what the error was raised from."""
    error = NotImplementedError("no")
    assert classify(error, WHERE, [lambda *_: FailureClass.RECOVERABLE]) is FailureClass.RECOVERABLE
    error.__cause__ = ConnectionResetError("reset")
    failure = diagnose(error, WHERE)
    assert (failure.failure_class, failure.reason) == (FailureClass.RECOVERABLE, "connection")


def test_a_group_that_lies_about_its_members_is_still_classified() -> None:
    """The members of an exception group are read past what its class says of them."""

    class Lying(ExceptionGroup[Exception]):
        exceptions = property(lambda self: 1 / 0)

    assert diagnose(Lying("g", [NameError("x")]), WHERE).reason == "bug"
