"""What a trace says of another one, and what the picture of a run is made of."""

from dataclasses import replace
from typing import Any

import pytest
from tests.trace.rows import START, USED, failed, row, trace

from stroma import ExecutionResult, ExecutionTrace, FailureClass, RunStatus, TraceEvent
from stroma.failures import Failure
from stroma.trace.events import Failed
from stroma.trace.story import Bar, StopCause, Story


def test_equal_traces_differ_in_nothing() -> None:
    """Ids of runs, times, usage, places and reasons are not compared; nor is the order of children."""
    x, y, z = row("x", branch="0"), failed("y", branch="1"), row("z", branch="1.0")
    children = [x, failed("h", branch="1", children=[y, z])]
    one = trace(row("a"), row("g", children=children), failed("a", attempt=2))
    other = trace(
        row("a", started=1, took=1, usage=USED, position=5),
        row("g", children=[failed("h", branch="1", children=[z, y]), x._replace(**{x._fields[9]: 7})]),
        failed("a", attempt=2, failure=Failed(FailureClass.RECOVERABLE, "it broke", None, "OSError")),
    )
    other.run_id = "other"
    assert one.diff(other) == other.diff(one) == []
    assert one.diff(one) == []


def test_events_that_only_one_of_them_has() -> None:
    """Each is named by node, attempt, and which time it is; those that are missing come first, in order."""
    one = trace(row("a"), row("b"), row("b"), row("b"), row("c"))
    other = trace(row("a"), row("b"), row("d"), row("d", attempt=2), row("d", attempt=2))
    assert one.diff(other) == [
        "Missing event in other trace: b attempt 1 (occurrence 2)",
        "Missing event in other trace: b attempt 1 (occurrence 3)",
        "Missing event in other trace: c attempt 1",
        "Extra event in other trace: d attempt 1",
        "Extra event in other trace: d attempt 2",
        "Extra event in other trace: d attempt 2 (occurrence 2)",
    ]


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"given": {"a": 2}}, "input_state {'a': 1} != {'a': 2}"),
        ({"given": {"a": True}}, "input_state {'a': 1} != {'a': True}"),
        ({"made": {"b": True}}, "output_state {'b': 2} != {'b': True}"),
        ({"made": {"b": 2.0}}, "output_state {'b': 2} != {'b': 2.0}"),
        ({"made": None}, "output_state {'b': 2} != None"),
        (
            {"failure": Failed(FailureClass.TERMINAL, "no", None, "OSError")},
            "failure None != <FailureClass.TERMINAL: 'TERMINAL'>; failure_message None != 'no'; "
            "outcome 'success' != 'failure'",
        ),
        ({"outcome": "suspended"}, "outcome 'success' != 'suspended'"),
        (
            {"given": {}, "made": {}, "outcome": "cancelled"},
            "input_state {'a': 1} != {}; output_state {'b': 2} != {}; outcome 'success' != 'cancelled'",
        ),
    ],
)
def test_what_is_different_of_an_event(change: dict[str, Any], text: str) -> None:
    """Every field with both values, in one line."""
    assert trace(row(attempt=2)).diff(trace(row(attempt=2, **change))) == [
        f"Difference for node attempt 2: {text}"
    ]


def test_the_order_of_keys_is_no_difference() -> None:
    """A state is what it holds."""
    one, other = {"a": 1, "b": {"c": 1, "d": 2}}, {"b": {"d": 2, "c": 1}, "a": 1}
    assert trace(row(given=one)).diff(trace(row(given=other))) == []


@pytest.mark.parametrize(
    "change",
    [
        {"branch": "9"},
        {"attempt": 2},
        {"given": {"a": 1.0}},
        {"made": {"b": 3}},
        {"failure": Failed(FailureClass.TERMINAL, "it broke", None, "OSError")},
        {"failure": Failed(FailureClass.RECOVERABLE, "it broke again", None, "OSError")},
        {"outcome": "cancelled"},
        {"children": [row("deep")]},
    ],
)
def test_what_is_different_of_a_child(change: dict[str, Any]) -> None:
    """Of children each field counts, their places and children too; others are no difference."""
    one = failed("x", branch="0", made={"b": 2})
    other = failed("x", **{"branch": "0", "made": {"b": 2}, **change})
    held = trace(row("g", children=[row("w"), one]))
    (line,) = held.diff(trace(row("g", children=[other, row("w")])))
    assert line.startswith("Difference for g attempt 1: children [")
    assert " != [" in line
    assert held.diff(trace(row("g", children=[row("w"), failed("y", branch="0", made={"b": 2})]))) != []
    (line,) = held.diff(trace(row("g", given={"a": 0}, children=[other, row("w")])))
    assert line.startswith("Difference for g attempt 1: input_state {'a': 1} != {'a': 0}; children [")


def bar(node_id: str = "node", **changed: Any) -> Bar:
    """The bar of row()."""
    fields: dict[str, Any] = {
        "at": "0",
        "attempt": 1,
        "began_ms": 0.0,
        "took_ms": 5.999999,
        "outcome": "success",
        "input_state": {"a": 1},
        "output_state": {"b": 2},
    }
    return Bar(node_id, **(fields | changed))


def failed_bar(node_id: str = "node", **changed: Any) -> Bar:
    what = {"failure_class": "RECOVERABLE", "message": "OSError: it broke", "reason": "rate_limit"}
    return bar(
        node_id, **{"outcome": "failure", "output_state": None, "is_committed": False, **what, **changed}
    )


def test_the_story_of_a_trace() -> None:
    """Every attempt is a bar, those in groups too, by begin; times are exact, costs are sums."""
    held = trace(
        row("late", started=START + 9_000_000, took=1_500_000, usage=USED, position=2),
        row(
            "g",
            position=1,
            children=[
                failed("y", started=START + 2_000_000, took=500, branch="1", position=1, attempt=2),
                row("x", started=START + 1_000_000, took=20_000_000, branch="0.1", position=1, usage=USED),
            ],
        ),
    )
    bars = [
        bar("g", at="1"),
        bar("x", at="1.0.1", began_ms=1.0, took_ms=20.0, tokens=7, output_tokens=2, cost_usd=0.5, model="m"),
        failed_bar("y", at="1.1", began_ms=2.0, took_ms=0.0005, attempt=2),
        bar("late", at="2", began_ms=9.0, took_ms=1.5, tokens=7, output_tokens=2, cost_usd=0.5, model="m"),
    ]
    expected = Story("run", "", "trace", bars, 14, 1.0, 1_700_000_000_123, 0.021)
    assert held._story() == expected
    # Nobody has looked at it by that.
    assert not any(isinstance(one, TraceEvent) for one in held.rows)
    assert held._story().bars[0].key == bars[0].key


@pytest.mark.parametrize(
    ("rows", "status"),
    [
        ([row()], "trace"),
        ([failed()], "FAILED"),
        ([failed(), row(started=START + 1)], "trace"),
        ([row(), failed(started=START + 1)], "FAILED"),
        ([failed(), failed(started=START + 1)], "FAILED"),
        ([row(made=None, outcome="cancelled")], "trace"),
    ],
)
def test_a_trace_that_ends_in_a_failure_failed(rows: list[Any], status: str) -> None:
    """The attempt that began last says so; other failures were mended."""
    assert trace(*rows)._story().status == status


def without_key(state: dict[str, Any]) -> dict[str, Any]:
    """What a user's redact does: one field is not shown, and a word in messages."""
    shown = {name: "***" if name == "key" else value for name, value in state.items()}
    return {
        name: value.replace("noisy", "quiet") if isinstance(value, str) else value
        for name, value in shown.items()
    }


def test_a_story_shows_what_redact_lets_be_seen() -> None:
    """In states and in messages, of every attempt: a value that one state hides is in no message."""
    held = trace(
        failed(
            "a",
            given={"key": "sesame", "b": 1},
            failure=Failed(FailureClass.TERMINAL, "noisy: poppy, sesame", None, "OSError"),
        ),
        row("g", started=START + 1, children=[row("in", started=START + 2, given={}, made={"key": "poppy"})]),
    )
    bars = held._story(without_key).bars
    assert list(bars) == [
        failed_bar(
            "a",
            input_state={"key": "***", "b": 1},
            failure_class="TERMINAL",
            message="OSError: quiet: [redacted], [redacted]",
            reason=None,
        ),
        bar("g", began_ms=1e-6),
        bar("in", began_ms=2e-6, input_state={}, output_state={"key": "***"}),
    ]
    plain = {one.node_id: one for one in held._story().bars}
    assert plain["a"].message == "OSError: noisy: poppy, sesame"
    assert plain["a"].input_state == {"key": "sesame", "b": 1}
    assert plain["in"].output_state == {"key": "poppy"}


def failure(message: str = "it broke", node_id: str = "elsewhere", attempt: int = 3) -> Failure:
    return Failure(OSError(message), FailureClass.RECOVERABLE, node_id, attempt, message, "rate_limit")


def result(held: ExecutionTrace, **changed: Any) -> ExecutionResult:
    one = ExecutionResult("id", RunStatus.PARTIAL, None, held, 1.25, 99)
    return replace(one, **changed)


def test_the_story_of_a_result() -> None:
    """Id, status and sums are the result's own; bars and times those of its trace."""
    held = trace(row())
    assert result(held)._story() == Story(
        "id", "", "PARTIAL", [bar()], 99, 1.25, 1_700_000_000_123, 0.005999999, None, ()
    )


def test_the_box_of_a_failed_run_names_the_child_that_failed() -> None:
    """It is the last attempt with the number and message of the child whose failure the group took over."""
    first = failed("x", started=START - 5_000_000, branch="0.1.1.1", attempt=2)
    child = failed("x", branch="0.1", position=1, attempt=2)
    sibling = failed("x", started=START + 1, branch="0.2", position=1)
    group = failed("g", position=1, children=[child, sibling])
    held = trace(
        first,
        group,
        failed("y", started=START + 1, failure=Failed(FailureClass.TERMINAL, "no", None, "OSError")),
    )
    of_group = replace(failure(), inner=failure(node_id="x", attempt=2))
    story = result(held, failure=of_group)._story()
    assert story.box == StopCause("x", "1.0.1", 2, "RECOVERABLE", "OSError: it broke", "rate_limit")
    assert story.facts == ()
    # The trace of a group that was told after its child is the same.
    held = trace(first, child, sibling, failed("g", position=1))
    assert result(held, failure=of_group)._story().box == story.box


@pytest.mark.parametrize(
    "held",
    [
        trace(),
        trace(failed(failure=Failed(FailureClass.TERMINAL, "something else", None, "OSError"))),
        trace(failed(outcome="cancelled")),
    ],
)
def test_the_box_of_a_failure_without_an_attempt(held: ExecutionTrace) -> None:
    """It has the node of the failure, and a question mark for its place."""
    assert result(held, failure=failure())._story().box == StopCause(
        "elsewhere", "?", 3, "RECOVERABLE", "OSError: it broke", "rate_limit"
    )


def test_the_facts_of_a_result() -> None:
    """Models without a price in one line; then a line for each node that waits."""
    one = result(trace(), unpriced_models=["a", "b"], suspended=["the boss", "the bank"])
    assert one._story().facts == (("unpriced", "a, b"), ("waits", "the boss"), ("waits", "the bank"))
    assert result(trace(), suspended=["the boss"])._story().facts == (("waits", "the boss"),)
    assert result(trace(), unpriced_models=["a"])._story().facts == (("unpriced", "a"),)


def test_box_and_facts_show_what_redact_lets_be_seen() -> None:
    """The message of the failure, and what a run waits for."""
    held = trace(
        failed(
            given={"key": "sesame"}, failure=Failed(FailureClass.RECOVERABLE, "noisy sesame", None, "OSError")
        )
    )
    one = result(held, failure=failure("noisy sesame", "node", 1), suspended=["noisy sesame"])
    story = one._story(without_key)
    assert story.box == StopCause("node", "0", 1, "RECOVERABLE", "OSError: quiet [redacted]", "rate_limit")
    assert story.facts == (("waits", "quiet [redacted]"),)
    assert [one.input_state for one in story.bars] == [{"key": "***"}]
    assert one._story().facts == (("waits", "noisy sesame"),)
