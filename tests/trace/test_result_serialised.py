"""Results as JSON, for web services."""

import pytest
from pydantic import TypeAdapter
from tests.kit import Text

from stroma import ExecutionResult, ExecutionTrace, FailurePolicy, RunStatus, StromaRunner


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
