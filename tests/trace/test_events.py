"""Events of a trace and its records: times, differences, ids, and missing contracts."""

from __future__ import annotations

import logging
import time
from typing import Any

import pytest
from pydantic import BaseModel
from tests.kit import Num, SimpleStore, computing, failing_with, node, quick, sleep_forever

from stroma import FailureClass, NodeHooks, RunStatus, StromaRunner, current_node, parallel


class Late(BaseModel):
    value: Unknown  # noqa: F821


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
        for event in result.trace.walk():
            assert event.input_state == {"n": "hidden"}
            event.input_state["n"] = event.node_id = "spoiled"

    plus = computing(lambda state: {"n": state.n + 1})
    nodes = [node("a", plus), parallel(node("b", plus)), node("c", plus)]
    hooks = NodeHooks(on_node_success=look, on_run_end=spoil)
    result = await quick(hooks=[hooks, hooks], redact=lambda state: {"n": "hidden"}).run(nodes, Num())
    assert result.hook_errors == []
    inputs = [(event.node_id, event.input_state) for event in result.trace.walk()]
    assert inputs == [("a", {"n": 0}), ("parallel(b)", {"n": 1}), ("b", {"n": 1}), ("c", {"n": 2})]
