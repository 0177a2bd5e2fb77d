"""What a trace and a result hold, to the last field: rows, events, times, sums, copies, JSON."""

import json
import logging
import pickle
import time
from datetime import UTC, datetime
from typing import Any

import pytest
from pydantic import BaseModel, TypeAdapter
from tests.kit import Num, SimpleStore, Text, computing, failing_with, node, quick, sleep_forever
from tests.kit import One as Given
from tests.kit import Two as Made
from tests.kit import Words as Deep
from tests.trace.rows import USED, WHEN, event, failed, failed_event, row, trace

from stroma import (
    ExecutionResult,
    ExecutionTrace,
    FailureClass,
    FailurePolicy,
    NodeHooks,
    RunStatus,
    StromaRunner,
    current_node,
    parallel,
)
from stroma.contracts.schema import schema_of
from stroma.failures import NodeContext
from stroma.failures.failure import diagnose
from stroma.trace import AttemptUsage, TraceMark
from stroma.trace.events import BoundedRows, Failed, LeftOut


@pytest.mark.parametrize(
    ("failure", "outcome", "then"),
    [
        (None, "success", "success"),
        (None, "cancelled", "cancelled"),
        (FailureClass.TERMINAL, "success", "failure"),
        (FailureClass.TERMINAL, "cancelled", "cancelled"),
        (FailureClass.TERMINAL, "failure", "failure"),
    ],
)
def test_an_event_with_a_failure_is_no_success(failure: Any, outcome: Any, then: str) -> None:
    """Who gives a failure class need not give the outcome; another outcome than success stays."""
    assert event(failure=failure, outcome=outcome).outcome == then


def test_a_result_raises_the_very_exception() -> None:
    """raise_for_status raises what stopped the run, the object itself."""
    error = ValueError("no")
    failure = diagnose(error, NodeContext("node", 1, "run"))
    result = ExecutionResult("run", RunStatus.FAILED, None, ExecutionTrace(), 0.0, 0, failure)
    with pytest.raises(ValueError, match=r"^no$") as caught:
        result.raise_for_status()
    assert caught.value is error


def test_every_field_of_a_row_is_in_its_event() -> None:
    """Times are whole milliseconds, rounded down, and aware; what is not there is None or empty."""
    (one,) = trace(
        row(attempt=3, usage=USED, position=4, branch="0.1", outcome="suspended", group="g", took=1_999_999)
    )
    assert one == event(attempt=3, usage=USED, position=4, branch="0.1", outcome="suspended", duration_ms=1)
    assert one.timestamp_utc.tzinfo is UTC


def test_a_failed_row_has_its_class_message_reason_and_type() -> None:
    """Each in its own field, and no output."""
    assert list(trace(failed())) == [failed_event()]
    unknown = Failed(FailureClass.AMBIGUOUS, "hm", None, "KeyError")
    (one,) = trace(failed(failure=unknown))
    assert (one.failure, one.failure_message, one.reason, one.error_type) == unknown


def test_a_row_that_went_over_its_budget_has_both() -> None:
    """An output and a failure, side by side."""
    (one,) = trace(failed(made={"b": 9}))
    assert one == failed_event(output_state={"b": 9})


@pytest.mark.parametrize("digits", [0, 999, 1000, 999_999_999])
def test_the_time_of_an_event_is_cut_off_not_rounded(digits: int) -> None:
    """A start is told to the microsecond."""
    (one,) = trace(row(started=1_700_000_000_000_000_000 + digits))
    assert one.timestamp_utc == datetime(2023, 11, 14, 22, 13, 20, digits // 1000, UTC)


@pytest.mark.core
def test_snapshots_are_read_by_the_schemas_of_their_row() -> None:
    """An input by its schema, an output by its own; deep states too; whatever the node id."""
    held = trace()
    value, instance, deep = schema_of(Given), schema_of(Made), schema_of(Deep)
    words = deep.snapshot(Deep(words=["x"]))
    held.rows += [
        row(given=(5,), made=(6,), schemas=(value, instance, None)),
        row(given=(5,), made=(6,), schemas=(instance, value, "what else there is")),
        row("deep", given=words, made=words, schemas=(deep, deep, None)),
        row("plain", given={}),
    ]
    assert [(one.input_state, one.output_state) for one in held] == [
        ({"a": 5}, {"b": 6}),
        ({"b": 5}, {"a": 6}),
        ({"words": ["x"]}, {"words": ["x"]}),
        ({}, {"b": 2}),
    ]


def test_an_event_is_built_once() -> None:
    """Everybody is given the same object, at the top and in groups."""
    held = trace(row("g", children=[row("x"), row("y")]), event("z"))
    first, second = list(held), list(held)
    assert [one.node_id for one in first] == ["g", "z"]
    assert all(a is b for a, b in zip(first, second, strict=True))
    assert all(a is b for a, b in zip(first[0].children, second[0].children, strict=True))
    assert held.rows == first
    assert next(held.replay()) is first[0]
    (g,) = held.events_for("g")
    assert g is first[0]


def test_the_event_of_one_row_is_without_what_is_inside() -> None:
    """It is a fresh one, and the row's own children stay rows."""
    inside = [row("x")]
    one = row("g", children=inside, usage=USED, branch="1", position=2)
    assert trace(one).event_of(one) == event("g", usage=USED, branch="1", position=2)
    assert inside == [row("x")]


def nest() -> ExecutionTrace:
    """a, then g(b, h(c, d!), e!), then f!; with ! a failure."""
    h = failed("h", children=[row("c"), failed("d")])
    return trace(row("a"), row("g", children=[row("b"), h, failed("e")]), failed("f"), failed("a", attempt=2))


def test_the_ways_to_look_at_a_trace() -> None:
    """walk() goes into groups, the group first; all others see the top level, in order."""
    held = nest()
    assert [one.node_id for one in held.walk()] == ["a", "g", "b", "h", "c", "d", "e", "f", "a"]
    assert [one.node_id for one in held] == [one.node_id for one in held.replay()] == ["a", "g", "f", "a"]
    assert [one.node_id for one in held.failures()] == ["f", "a"]
    assert [one.attempt for one in held.events_for("a")] == [1, 2]
    assert held.events_for("b") == []
    assert len(held) == 4


def test_a_trace_as_json_has_everything() -> None:
    """Each event with all of its fields, children inside, and numbers that JSON lacks as text."""
    held = trace(row("g", usage=USED, made={"b": float("nan")}, children=[failed("x", branch="0")]))
    counts = ("tokens", "output_tokens", "cost_usd", "model", "cached_input_tokens", "cache_write_tokens")
    group = {
        "node_id": "g",
        "run_id": "run",
        "attempt": 1,
        "timestamp_utc": "2023-11-14T22:13:20.123456+00:00",
        "input_state": {"a": 1},
        "output_state": {"b": "nan"},
        "duration_ms": 5,
        "failure": None,
        "failure_message": None,
        "outcome": "success",
        "reason": None,
        "children": [],
        "usage": dict(zip(counts, (7, 2, 0.5, "m", 3, 1), strict=True)),
        "position": 0,
        "branch": "",
        "left_out": None,
        "function_ms": 5,
        "error_type": None,
    }
    child = {
        **group,
        "node_id": "x",
        "output_state": None,
        "failure": "RECOVERABLE",
        "failure_message": "it broke",
        "outcome": "failure",
        "reason": "rate_limit",
        "usage": dict(zip(counts, (0, 0, 0.0, None, 0, 0), strict=True)),
        "branch": "0",
        "error_type": "OSError",
    }
    assert json.loads(held.to_json()) == [{**group, "children": [child]}]


def mark() -> TraceMark:
    return TraceMark("node", 1, 0, "", "wait", "limit", 1.5, WHEN)


@pytest.mark.parametrize("looked_at", [False, True])
def test_a_copy_is_equal_and_shares_nothing(looked_at: bool) -> None:
    """Neither events, nor states, nor children, nor marks of a copy are those of the trace; the run id is."""
    held = nest()
    held.append(event(input_state={"list": [1]}, output_state={"list": [2]}, children=[event("in")]))
    held.rows.append(row(given=(1,), made=(2,), schemas=(schema_of(Given), schema_of(Made), None)))
    held.marks.append(mark())
    if looked_at:
        list(held)
    twin = held.copy()
    assert (twin.run_id, list(twin), twin.marks) == ("run", list(held), [mark()])
    for mine, theirs in zip(held.walk(), twin.walk(), strict=True):
        assert mine is not theirs
        assert mine.input_state is not theirs.input_state
    last = list(twin)[-2]
    last.input_state["list"].append(3)
    last.output_state["list"].append(3)
    last.children.append(event("new"))
    twin.append(event("later"))
    twin.marks.clear()
    mine = list(held)[-2]
    assert (mine.input_state, mine.output_state, len(mine.children)) == ({"list": [1]}, {"list": [2]}, 1)
    assert (len(held), len(held.marks)) == (6, 1)


def test_a_trace_that_was_pickled_goes_on() -> None:
    """Events, marks and the run id come back; it can be appended to."""
    held = nest()
    held.rows.append(row(given=(1,), made=(2,), schemas=(schema_of(Given), schema_of(Made), None)))
    held.marks.append(mark())
    back = pickle.loads(pickle.dumps(held))
    assert (back.run_id, list(back), back.marks) == ("run", list(held), [mark()])
    back.rows.append(row(given=(3,), made=(4,), schemas=(schema_of(Made), schema_of(Made), None)))
    assert list(back)[-1] == event(input_state={"b": 3}, output_state={"b": 4})
    assert len(held) == 5


@pytest.mark.parametrize("most", [1, 2, 3])
def test_so_many_are_kept_and_as_many_failures_more(most: int) -> None:
    """The first ones; then failures only, up to twice as many in all; the rest is counted."""
    rows = BoundedRows(most)
    for n in range(10):
        rows.append(row(f"ok{n}"))
        rows.append(failed(f"no{n}"))
    every = [name for n in range(10) for name in (f"ok{n}", f"no{n}")]
    entry = every[:most] + [name for name in every[most:] if name.startswith("no")][:most]
    assert [one[0] for one in rows] == entry
    assert rows.left_out.events == 20 - 2 * most
    assert rows.left_out.failures == 10 - sum(name.startswith("no") for name in entry)


def test_nothing_is_left_out_as_long_as_all_is_kept() -> None:
    """Exactly at the limit nothing is counted, and the failures after it are kept."""
    rows = BoundedRows(2)
    for one in (row(), row(), failed(), failed()):
        rows.append(one)
    assert (len(rows), rows.left_out) == (4, None)
    rows.append(failed())
    assert (len(rows), rows.left_out) == (4, LeftOut(1, 1, 0, 0.0, (("node", 0, 0, 0.0, 5_999_999, None),)))


def sums() -> BoundedRows:
    rows = BoundedRows(1)
    rows.append(row("kept", usage=USED, took=100))
    inside = [
        row("in", usage=AttemptUsage(10, 4, 0.25, "m"), took=1),
        failed("in", usage=AttemptUsage(20, 5, 0.5, "n"), took=2),
        row("g2", took=3, children=[failed("deep", usage=AttemptUsage(40, 6, 1.0, "m"), took=4, made={})]),
    ]
    rows.append(row("g", took=5, children=inside))
    rows.append(row("in", usage=AttemptUsage(80, 7, 2.0, "m"), took=6))
    return rows


LEFT = LeftOut(
    events=6,
    failures=2,
    lost_tokens=20,
    lost_cost_usd=0.5,
    figures=(
        ("g", 0, 0, 0.0, 5, None),
        ("g2", 0, 0, 0.0, 3, None),
        ("deep", 40, 6, 1.0, 4, "m"),
        ("in", 20, 5, 0.5, 2, "n"),
        ("in", 90, 11, 2.25, 7, "m"),
    ),
)


def test_what_is_left_out_is_summed_by_node_and_model() -> None:
    """Those inside groups too; lost is what came to no output, whether it failed or not."""
    assert sums().left_out == LEFT
    rows = BoundedRows(0)
    rows.append(row(made=None, outcome="cancelled", usage=USED))
    rows.append(row(made=None, outcome="cancelled", usage=USED))
    assert rows.left_out == LeftOut(2, 0, 14, 1.0, (("node", 14, 4, 1.0, 11_999_998, "m"),))


def test_what_a_map_inside_has_left_out_is_left_out_with_it() -> None:
    """The rows that it kept and the sums of the others: together they are all that it has counted."""
    rows = BoundedRows(0)
    rows.append(row("map", took=0, children=sums()))
    assert (rows.left_out.events, rows.left_out.failures) == (8, 2)
    assert (rows.left_out.lost_tokens, rows.left_out.lost_cost_usd) == (20, 0.5)
    assert sorted(rows.left_out.figures, key=repr) == sorted(
        [*LEFT.figures, ("map", 0, 0, 0.0, 0, None), ("kept", 7, 2, 0.5, 100, "m")], key=repr
    )


def test_rows_like_others_have_their_limit_and_sums() -> None:
    """A copy goes on by itself: what it leaves out afterwards the first does not count."""
    rows = sums()
    twin = rows.like([row("other")])
    assert ([one[0] for one in twin], twin.left_out) == (["other"], LEFT)
    twin.append(row("more", usage=USED))
    twin.append(failed("kept too"))
    twin.append(failed("lost", usage=USED))
    assert rows.left_out == LEFT
    assert len(twin) == 2
    assert (twin.left_out.events, twin.left_out.failures) == (8, 3)
    assert (twin.left_out.lost_tokens, twin.left_out.lost_cost_usd) == (27, 1.0)
    assert twin.left_out.figures == (
        *LEFT.figures,
        ("more", 7, 2, 0.5, 5_999_999, "m"),
        ("lost", 7, 2, 0.5, 5_999_999, "m"),
    )


def test_figures_of_every_attempt_in_the_order_of_a_walk() -> None:
    """A group, what its map left out, then what is inside; read or not, in whole milliseconds."""

    def held() -> ExecutionTrace:
        return trace(
            row("a", usage=USED, took=7_000_001),
            row("map", took=3_000_000, children=sums()),
            failed("z", took=2_000_000, children=[row("in z", took=1_000_000)]),
        )

    expected = [
        ("a", 7, 2, 0.5, 7_000_001, "m"),
        ("map", 0, 0, 0.0, 3_000_000, None),
        *LEFT.figures,
        ("kept", 7, 2, 0.5, 100, "m"),
        ("z", 0, 0, 0.0, 2_000_000, None),
        ("in z", 0, 0, 0.0, 1_000_000, None),
    ]
    assert list(held().figures()) == expected
    assert list(held().copy().figures()) == expected
    looked = held()
    assert next(e for e in looked if e.node_id == "map").left_out == LEFT
    expected[0] = ("a", 7, 2, 0.5, 7_000_000, "m")
    expected[7] = ("kept", 7, 2, 0.5, 0, "m")
    assert list(looked.figures()) == expected
    assert list(looked.copy().figures()) == expected


def test_a_page_counts_what_is_left_out() -> None:
    """Attempts of a large map that the trace has only summed are among its attempts, and their waste."""
    page = trace(row("map", children=sums())).to_html()
    assert "<b>attempts</b> 8</span>" in page
    assert "</b> 157 tok, $4.250000 (wasted 20 tok, $0.500000)" in page


class Late(BaseModel):
    value: "Unknown"  # noqa: F821


async def test_the_end_of_a_node_whose_contract_cannot_be_read() -> None:
    """It is an attempt like any other, and drawn like one; its message names what is not defined."""
    result = await StromaRunner.quick().run([node("one", sleep_forever, Late, Num)], Num())
    (event,) = list(result.trace)
    assert (result.status, event.outcome, event.failure) == ("FAILED", "failure", FailureClass.TERMINAL)
    assert "name 'Unknown' is not defined" in str(event.failure_message)
    assert "is not defined" in result._repr_html_()


class Stubborn(SimpleStore):
    """It refuses the first time."""

    refused = False

    def save(self, run_id: str, node_id: str, state: BaseModel) -> None:
        if not self.refused:
            self.refused = True
            raise OSError("not now")


async def test_every_record_carries_the_run_id(caplog: pytest.LogCaptureFixture) -> None:
    """Every record that a run logs is on the logger `stroma` and carries its run_id, whoever it is about."""
    caplog.set_level(logging.DEBUG)
    calls: list[int] = []

    async def func(state: Num) -> Any:
        calls.append(1)
        if len(calls) == 1:
            raise ValueError("once")
        return {"n": 1}, 1, "nobody knows this model"

    async def blocking(*_: Any) -> None:
        time.sleep(0.02)

    def lying(error: Exception, context: Any) -> FailureClass | None:
        raise LookupError("a classifier's own")

    hooks = NodeHooks(on_node_start=failing_with(LookupError, "a hook's own"), on_node_success=blocking)
    runner = quick(store=Stubborn(), hooks=hooks, hook_timeout_ms=5, classifiers=[lying], run_id="r")
    assert (await runner.run([node("a", func)], Num())).status is RunStatus.COMPLETED
    text = "\n".join(record.getMessage() for record in caplog.records if record.name == "stroma")
    for part in (
        "classifier",
        "failed at attempt 1",
        "follows in",
        "raised for",
        "blocked",
        "no known price",
        "refused",
        "ended",
    ):
        assert part in text
    ours = [record for record in caplog.records if record.name.startswith("stroma")]
    assert {(record.name, getattr(record, "run_id", None)) for record in ours} == {("stroma", "r")}


async def test_a_trace_that_was_looked_at_is_still_the_runs_own() -> None:
    """G7, G8: Neither `redact` nor `on_run_end` changes an event, also if a hook reads the trace."""

    async def look(*_: Any) -> None:
        list(current_node().ctx.trace.walk())

    async def spoil(run_id: str, result: Any) -> None:
        for one in result.trace.walk():
            assert one.input_state == {"n": "hidden"}
            one.input_state["n"] = one.node_id = "spoiled"

    plus = computing(lambda state: {"n": state.n + 1})
    nodes = [node("a", plus), parallel(node("b", plus)), node("c", plus)]
    hooks = NodeHooks(on_node_success=look, on_run_end=spoil)
    result = await quick(hooks=[hooks, hooks], redact=lambda state: {"n": "hidden"}).run(nodes, Num())
    assert result.hook_errors == []
    inputs = [(event.node_id, event.input_state) for event in result.trace.walk()]
    assert inputs == [("a", {"n": 0}), ("parallel(b)", {"n": 1}), ("b", {"n": 1}), ("c", {"n": 2})]


@pytest.mark.parametrize("kind", [ExecutionResult, ExecutionResult[Text]])
async def test_a_result_serialises_without_its_trace(kind: type[ExecutionResult]) -> None:
    """Pydantic serialises a result as ids, status, final state, totals and a plain failure, without trace."""
    runner = StromaRunner.quick(policy_map={"AMBIGUOUS": FailurePolicy(max_retries=0)})

    @runner.node("ask", input=Text, output=Text)
    async def ask(state: Text) -> tuple[Text, int]:
        if state.text == "bad":
            raise ValueError("no answer")
        return state, 7

    good = TypeAdapter(kind).dump_python(await runner.run([ask], Text(text="hi"), run_id="r1"), mode="json")
    assert good == {
        "run_id": "r1",
        "status": "COMPLETED",
        "final_state": {"text": "hi"},
        "total_cost_usd": 0.0,
        "total_tokens": 7,
        "total": {"tokens": 7, "cost_usd": 0.0},
        "failure": None,
        "unpriced_models": ["(no model)"],
        "suspended": [],
        "questions": [],
        "failed_items": 0,
    }
    bad = TypeAdapter(kind).dump_python(await runner.run([ask], Text(text="bad"), run_id="r2"), mode="json")
    assert bad["failure"] == {
        "type": "ValueError",
        "message": "no answer",
        "failure_class": "AMBIGUOUS",
        "node_id": "ask",
        "attempt": 1,
        "reason": None,
        "retry_after_seconds": None,
    }
    assert set(TypeAdapter(kind).json_schema(mode="serialization")["properties"]) == set(good)


@pytest.mark.parametrize("status", list(RunStatus))
def test_ok_is_one_name_for_success(status: RunStatus) -> None:
    """A result is ok if its run is COMPLETED or RESUMED, and in no other status."""
    result = ExecutionResult(
        run_id="r",
        status=status,
        trace=ExecutionTrace("r"),
        final_state=None,
        total_cost_usd=0.0,
        total_tokens=0,
    )
    assert result.ok == (status.value in ("COMPLETED", "RESUMED"))
