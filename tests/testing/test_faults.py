"""FaultPlan."""

import asyncio

import pytest
from pydantic import BaseModel
from tests.kit import context_on, returning
from tests.testing.pipelines import Number, add_one, counted, make, patient

from stroma import FailureClass, InMemoryStore, RunStatus, execute_step, map_over, parallel
from stroma.testing import FakeClock, FaultPlan, Transient


@pytest.fixture(autouse=True)
def clock():
    with FakeClock() as clock:
        yield clock


@pytest.mark.core
async def test_a_planned_failure_takes_the_place_of_the_call():
    """The node is not called on that attempt, the engine classifies and retries; the plan says so."""
    calls = []
    with FaultPlan().fail("a", TimeoutError("too slow")) as plan:
        result = await patient().run([counted("a", calls), counted("b", calls)], Number())
    assert (result.status, calls) == (RunStatus.COMPLETED, ["a", "b"])
    attempts = [(event.attempt, event.failure) for event in result.trace.events_for("a")]
    assert attempts == [(1, FailureClass.RECOVERABLE), (2, None)]
    assert plan.injected == [("fail", "a", 0, "", 1)]


@pytest.mark.parametrize("error", [PermissionError("no"), PermissionError, lambda: PermissionError("no")])
async def test_an_error_may_be_an_exception_its_class_or_a_function(error):
    """Whatever gives an exception is raised."""
    with FaultPlan().fail("a", error, attempt=None):
        result = await patient(retries=1).run([make("a", add_one)], Number())
    assert isinstance(result.failure.exception, PermissionError)
    assert len(result.trace) == 2


async def test_by_default_the_provider_cannot_be_reached():
    """Without an exception it is a Transient, which is RECOVERABLE."""
    with FaultPlan().fail("a"):
        result = await patient(retries=0).run([make("a", add_one)], Number())
    assert isinstance(result.failure.exception, Transient)
    assert result.failure.failure_class is FailureClass.RECOVERABLE


async def test_a_lost_answer_was_worked_for():
    """The node did its work and is called again."""
    calls = []
    with FaultPlan().lose("a"):
        result = await patient().run([counted("a", calls)], Number())
    assert (result.status, calls) == (RunStatus.COMPLETED, ["a", "a"])


async def test_a_delay_is_within_the_time_limit_of_the_node(clock):
    """A node that is delayed beyond its timeout fails of it, on that attempt alone."""
    with FaultPlan().delay("a", 5.0, attempt=1):
        result = await patient(1, node_timeouts={"a": 2000}).run([make("a", add_one)], Number())
    assert [event.reason for event in result.trace] == ["timeout", None]
    assert clock.elapsed == pytest.approx(3)


@pytest.mark.parametrize("output", [None, {"n": "many"}, lambda instance: {"n": [instance]}])
async def test_a_malformed_output_breaks_the_contract(output):
    """What stands in place of an output is validated like any; the usage of the attempt stays."""
    plan = FaultPlan().malform("a") if output is None else FaultPlan().malform("a", output)
    with plan:
        nodes = [make("a", returning(({"n": 1}, 10, 5, "gpt-4o-mini")))]
        result = await patient(contract_retries={"a": 1}).run(nodes, Number())
    assert result.status is RunStatus.COMPLETED
    assert [event.reason for event in result.trace] == ["contract", None]
    assert result.total_tokens == 30


async def test_faults_reach_nodes_in_groups_and_every_item_of_a_map():
    """Nodes inside of parallel() and map_over() are met by their ids."""

    class Many(BaseModel):
        items: list[Number]

    item = make("item", add_one)
    calls = []
    with FaultPlan().fail("inner").fail("item") as plan:
        both = await patient().run([parallel(counted("inner", calls), counted("other", calls))], Number())
        many = await patient().run(
            [map_over("items", item, into="out")], Many(items=[Number(n=i) for i in range(3)])
        )
    assert (both.status, many.status) == (RunStatus.COMPLETED, RunStatus.COMPLETED)
    assert [(fault.node_id, fault.branch) for fault in plan.injected if fault.node_id == "inner"] == [
        ("inner", "0")
    ]
    assert sorted(fault.branch for fault in plan.injected if fault.node_id == "item") == ["0", "1", "2"]


async def test_faults_reach_steps_of_plain_code():
    """execute_step meets them, in a context that is made inside of the plan."""
    with FaultPlan().fail("step"):
        config = patient().config.model_copy(update={"run_id": "r"})
        ctx = context_on(InMemoryStore(), config)
        result = await execute_step("step", add_one, Number(), ctx)
    assert (result.status, len(result.trace)) == (RunStatus.COMPLETED, 2)


async def test_a_run_that_began_before_the_plan_is_left_alone():
    """A plan is for runs that begin inside of it, and ends with it."""
    with FaultPlan().fail("a"):
        assert len((await patient().run([make("a", add_one)], Number())).trace) == 2
    assert len((await patient().run([make("a", add_one)], Number())).trace) == 1


@pytest.mark.core
async def test_a_fault_that_was_never_met_is_an_error():
    """A misspelt id does not pass for a test of a failure; a test that fails by itself is not talked over."""
    with pytest.raises(
        AssertionError,
        match=r"planned faults never occurred: fail 'aa' on attempt 1; lose 'a' on attempt 2, 3",
    ):
        with FaultPlan().fail("aa").lose("a", attempt=(2, 3)):
            await patient().run([make("a", add_one)], Number())
    with pytest.raises(ZeroDivisionError):
        with FaultPlan().fail("aa"):
            raise ZeroDivisionError


@pytest.mark.core
async def test_chance_goes_by_the_seed_and_the_place_alone():
    """The same seed does the same to the same run, whatever runs beside it; another seed differs."""
    nodes = [make(f"n{i}", add_one) for i in range(30)]

    async def met(seed, *, beside=0):
        with FaultPlan(seed=seed).at_random(0.5, [TimeoutError, ConnectionError]) as plan:
            runs = [patient().run(nodes, Number(), run_id=f"r{i}") for i in range(beside + 1)]
            results = await asyncio.gather(*runs)
        assert {result.status for result in results} == {RunStatus.COMPLETED}
        return sorted(set(plan.injected)), [event.failure_message for event in results[0].trace]

    first = await met(1)
    assert 3 < len(first[0]) < 27
    assert await met(1) == first
    assert await met(1, beside=3) == first
    assert (await met(2))[0] != first[0]


async def test_chance_can_be_kept_to_some_nodes_and_attempts():
    """With a probability of 1, the named node fails on as many attempts as were given, and no other does."""
    with FaultPlan().at_random(1.0, nodes={"a"}, attempts=2) as plan:
        result = await patient(retries=2).run([make("a", add_one), make("b", add_one)], Number())
    assert result.status is RunStatus.COMPLETED
    assert [(fault.node_id, fault.attempt) for fault in plan.injected] == [("a", 1), ("a", 2)]


def test_what_is_no_plan():
    """Attempts are at least 1, probabilities are shares, and there must be something to raise."""
    with pytest.raises(ValueError, match="at least 1"):
        FaultPlan().fail("a", attempt=0)
    with pytest.raises(ValueError, match="from 0 to 1"):
        FaultPlan().at_random(2)
    with pytest.raises(ValueError, match="at least one"):
        FaultPlan().at_random(0.5, [])


async def test_plans_stand_inside_of_one_another():
    """Faults of both are met."""
    with FaultPlan().fail("a", attempt=1), FaultPlan().malform("a", attempt=2):
        result = await patient(contract_retries={"a": 1}).run([make("a", add_one)], Number())
    assert [event.reason for event in result.trace][1:] == ["contract", None]
    assert len(result.trace) == 3
