"""What a trace says of another one, and what the picture of a run is made of."""

from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest
from tests.trace.rows import START, USED, WHEN, event, failed, failed_event, row, trace

from stroma import ExecutionResult, ExecutionTrace, FailureClass, RunStatus, TraceEvent
from stroma.failures import Failure
from stroma.trace import AttemptUsage
from stroma.trace.events import Failed, MarkKind, TraceMark
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


def test_children_are_told_as_they_are() -> None:
    """Sorted, each with its place, node, attempt, states, failure and what is inside it."""
    inner = row("y", branch="0.0", given={"d": 1, "c": 0}, made=None, outcome="suspended")
    one = trace(
        row("g", children=[row("x", branch="1"), failed("x", branch="0", attempt=2, children=[inner])])
    )
    assert one.diff(trace(row("g"))) == [
        "Difference for g attempt 1: children ["
        '\'["0", "x", 2, {"a": 1}, null, "RECOVERABLE", "it broke", "failure"]'
        '[\\\'["0.0", "y", 1, {"c": 0, "d": 1}, null, null, null, "suspended"][]\\\']\', '
        '\'["1", "x", 1, {"a": 1}, {"b": 2}, null, null, "success"][]\''
        "] != []"
    ]


def test_another_order_is_told_at_its_first_place() -> None:
    """Of what both have, after all other differences; what only one has does not count."""
    one = trace(row("a"), row("only"), row("b"), row("c"), row("d"))
    other = trace(row("a"), row("c", made={}), row("b"), row("more"), row("d"))
    assert one.diff(other) == [
        "Missing event in other trace: only attempt 1",
        "Extra event in other trace: more attempt 1",
        "Difference for c attempt 1: output_state {'b': 2} != {}",
        "Difference for order: b attempt 1 here, c attempt 1 in other trace",
    ]


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


def test_the_story_of_events() -> None:
    """Those read or made know their start to the microsecond and whole milliseconds of work."""
    first = failed_event("x", branch="3", usage=USED, children=[event("in", duration_ms=7)])
    held = trace(first, row("later", started=START + 1_000_000, took=6_000_000))
    used = {"tokens": 7, "output_tokens": 2, "cost_usd": 0.5, "model": "m"}
    story = held._story()
    assert story == Story(
        "run",
        "",
        "trace",
        [
            failed_bar("x", at="0.3", took_ms=5.0, **used),
            bar("in", took_ms=7.0),
            bar("later", began_ms=1.000789, took_ms=6.0),
        ],
        7,
        0.5,
        1_700_000_000_123,
        0.007000789,
    )


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


def test_costs_of_a_story_are_summed_exactly() -> None:
    """Ten times ten cents are a dollar."""
    dime = AttemptUsage(1, 0, 0.1)
    assert trace(*[row(usage=dime) for _ in range(10)])._story().cost_usd == 1.0


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


def test_what_redact_leaves_may_stand_in_messages() -> None:
    """Only what it takes out of a state is taken out of a message."""
    one = failed(
        given={"key": "sesame", "name": "visible"},
        failure=Failed(FailureClass.TERMINAL, "sesame visible", None, "OSError"),
    )
    (drawn,) = trace(one)._story(without_key).bars
    assert drawn.message == "OSError: [redacted] visible"
    assert drawn.input_state == {"key": "***", "name": "visible"}


def test_redact_is_asked_of_states_and_messages_alone() -> None:
    """A state that is not there is shown to nobody: it stays None."""
    requests: list[dict[str, Any]] = []

    def redact(state: dict[str, Any]) -> dict[str, Any]:
        requests.append(state)
        return dict.fromkeys(state, "hidden")

    (drawn,) = trace(failed(given={"a": "long enough"}))._story(redact).bars
    assert (drawn.input_state, drawn.output_state) == ({"a": "hidden"}, None)
    assert drawn.message == "OSError: hidden"
    assert [state for state in requests if state not in ({"a": "long enough"}, {"message": "it broke"})] == []


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


def test_the_waits_of_a_story_end_when_they_were_recorded() -> None:
    """A wait begins its length before its record, at the first attempt at the earliest; others are none."""
    held = trace(row())
    waits: tuple[tuple[MarkKind, float], ...]
    waits = ("slept", 1500.0), ("open", 2500.0), ("received", 60_000.0), ("refused", 1.0)
    for kind, waited_ms in waits:
        held.marks.append(TraceMark("flow", 1, 1, "0", kind, "why", waited_ms, WHEN + timedelta(seconds=3)))
    assert [(one.node_id, one.at, one.outcome, one.took_ms) for one in held._story().waits] == [
        ("why", "1.0", "slept", 1500.0),
        ("question: why", "1.0", "open", 2500.0),
        ("why", "1.0", "received", 60_000.0),
    ]
    assert [round(one.began_ms) for one in held._story().waits] == [1500, 500, 0]


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
