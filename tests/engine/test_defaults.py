"""Small promises of the core, each of which a small change of the source would break without a sound."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import math
from typing import Any

import pytest
from pydantic import BaseModel, ConfigDict, SecretBytes, SecretStr, ValidationError
from tests.kit import Num, node, retry_policies

from stroma import (
    BudgetExceeded,
    CostTracker,
    ExecutionBudget,
    ExecutionTrace,
    FailureClass,
    FailurePolicy,
    NodeHooks,
    NodeUsage,
    StromaRunner,
    Suspend,
    parallel,
)
from stroma.contracts import NotSerialisable
from stroma.cost import UsageError
from stroma.failures import ItemFailure
from stroma.failures.failure import diagnose
from stroma.hooks.dispatch import Hooks
from stroma.trace.plain import secrets_in

# ---------------------------------------------------------------- policies


def test_the_defaults_of_a_policy() -> None:
    """Three retries, drawn from up to a second, at most a minute, and a server may ask for two."""
    assert FailurePolicy().model_dump() == {
        "max_retries": 3,
        "backoff_seconds": 1.0,
        "multiplier": 1.0,
        "max_backoff_seconds": 60.0,
        "jitter": True,
        "max_retry_after_seconds": 120.0,
    }


@pytest.mark.parametrize(
    "field",
    ["max_retries", "backoff_seconds", "multiplier", "max_backoff_seconds", "max_retry_after_seconds"],
)
def test_no_figure_of_a_policy_is_negative(field: str) -> None:
    """A delay or a count below zero is refused when the policy is made; zero is not."""
    FailurePolicy(**{field: 0})
    with pytest.raises(ValidationError, match="greater than or equal to 0"):
        FailurePolicy(**{field: -1})


@pytest.mark.parametrize("field", ["backoff_seconds", "multiplier", "max_backoff_seconds"])
@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_no_delay_is_endless(field: str, value: float) -> None:
    """A delay that never ends, or that is no number, is refused when the policy is made."""
    with pytest.raises(ValidationError):
        FailurePolicy(**{field: value})


def test_a_server_may_be_waited_for_without_end() -> None:
    """Who says so explicitly waits as long as a server asks."""
    assert FailurePolicy(max_retry_after_seconds=math.inf).max_retry_after_seconds == math.inf


def test_a_failed_item_knows_no_reason_by_itself() -> None:
    """An item's reason is None where nobody knows one, and it counts one attempt."""
    failure = ItemFailure(index=0, node_id="node", failure_class=FailureClass.AMBIGUOUS, message="message")
    assert (failure.reason, failure.attempts) == (None, 1)


def test_what_cannot_be_stored_says_so_in_a_word() -> None:
    """The reason of an output without a stored form is a word to alert on, and trying again is no use."""
    from stroma.failures import NodeContext

    failure = diagnose(NotSerialisable("no"), NodeContext("node", 1, "run"), [])
    assert (failure.failure_class, failure.reason) == (FailureClass.TERMINAL, "not_serialisable")


async def test_a_classifier_that_raises_is_named(caplog: pytest.LogCaptureFixture) -> None:
    """The log says which classifier it was, and for which node; the next one is asked."""

    def bad_classifier(error: BaseException, context: Any) -> FailureClass | None:
        raise RuntimeError("the classifier broke")

    async def fail(state: Num) -> Num:
        raise ValueError("the node broke")

    with caplog.at_level(logging.WARNING, logger="stroma"):
        result = await StromaRunner.quick(classifiers=[bad_classifier]).run([node("fails", fail)], Num())
    assert result.status != "COMPLETED"
    (said, *_) = [record.getMessage() for record in caplog.records if "is skipped" in record.getMessage()]
    assert "bad_classifier" in said
    assert "'fails'" in said


def test_a_suspension_says_what_it_waits_for() -> None:
    """Its reason is kept as given, and what is no model is named in the refusal."""
    assert Suspend("the boss", schema=Num).reason == "the boss"
    with pytest.raises(TypeError, match=r"^Suspend asks for .*int.*; give a pydantic model"):
        Suspend("the boss", schema=int)  # type: ignore[arg-type]


# ---------------------------------------------------------------- hooks


def test_a_set_without_hooks_has_none() -> None:
    """Every hook of a fresh set is None."""
    assert {getattr(NodeHooks(), field.name) for field in dataclasses.fields(NodeHooks)} == {None}


def test_only_hooks_that_are_there_are_asked() -> None:
    """What no set has is nothing to call, event by event."""
    hooks = Hooks((), run_id="run", limit_seconds=None, failures=[])
    found = {name: getattr(hooks, name) for name in dir(Hooks) if name.startswith("on_")}
    assert found
    assert {value for name, value in found.items()} == {None}


async def test_a_hook_of_a_run_that_is_not_async_is_named_without_a_node() -> None:
    """A run's hook belongs to no node, and its message names none."""
    hooks = NodeHooks(on_run_start=lambda *_: None)  # type: ignore[arg-type, return-value]
    nodes = [node("one", _same)]
    with pytest.raises(TypeError, match=r"^hook on_run_start is not async: .*; define it with async def$"):
        await StromaRunner.quick(hooks=hooks).run(nodes, Num())


async def _same(state: Num) -> Num:
    return state


@pytest.mark.parametrize("raises", [True, False])
async def test_a_hook_of_a_run_that_is_closed(raises: bool, caplog: pytest.LogCaptureFixture) -> None:
    """A coroutine that is closed tells its cancelled hook; what that raises is logged with its name and the run's."""
    began = asyncio.Event()

    async def wait(state: Num) -> Num:
        began.set()
        await asyncio.Event().wait()
        return state

    async def cancelled(run_id: str, node_id: str) -> None:
        if raises:
            raise RuntimeError("the hook broke")
        await asyncio.sleep(3600)

    runner = StromaRunner.quick(hooks=NodeHooks(on_node_cancelled=cancelled))
    run = runner.run([node("one", wait)], Num(), run_id="closed")
    step = run.__await__()
    with caplog.at_level(logging.WARNING, logger="stroma"):
        while not began.is_set():
            next(step)
        run.close()
    (said,) = [record for record in caplog.records if "on_node_cancelled" in record.getMessage()]
    assert said.run_id == "closed"  # type: ignore[attr-defined]
    assert "cancelled" in said.getMessage().split("(", 1)[1]
    assert ("the run goes on" in said.getMessage()) is raises
    assert ("was cut short" in said.getMessage()) is not raises
    assert (said.exc_info is not None) is raises


# ---------------------------------------------------------------- cost


@pytest.mark.parametrize(
    "wrong",
    [
        {"tokens_used": -1},
        {"output_tokens": -1},
        {"cost_usd": -0.1},
        {"cost_usd": math.nan},
        {"latency_ms": math.inf},
        {"latency_ms": -1},
    ],
)
def test_a_tracker_refuses_what_makes_no_sense(wrong: dict[str, Any]) -> None:
    """Negative and endless figures are a UsageError, and nothing of them is recorded."""
    tracker = CostTracker()
    fields = {
        "node_id": "node",
        "tokens_used": 10,
        "output_tokens": 1,
        "cost_usd": 0.1,
        "latency_ms": 1,
        **wrong,
    }
    with pytest.raises(UsageError):
        tracker.record(NodeUsage(**fields))
    assert (tracker.total_tokens, tracker.total_cost_usd) == (0, 0.0)


def test_small_costs_are_not_lost_beside_a_large_one() -> None:
    """A sum is exact to the last digit, whichever comes first."""
    for figures in ([1e16, 1.0, 1.0, -0.0], [1.0, 1e16, 1.0]):
        tracker = CostTracker()
        for cost in figures:
            tracker.spend(0, cost)
        assert tracker.total_cost_usd == math.fsum(figures)


async def test_the_deadline_of_a_child_counts_the_work_of_its_group() -> None:
    """A child that is cut off by max_latency_ms says what the run had used, and not what it had itself."""

    async def slow(state: Num) -> Num:
        await asyncio.sleep(0.1 if "first" not in seen else 3600)
        seen.append("first")
        return state

    seen: list[str] = []
    one_by_one = parallel(node("a", slow), node("b", slow), max_concurrency=1)
    result = await StromaRunner.quick(budget=ExecutionBudget(max_latency_ms=300)).run([one_by_one], Num())
    assert result.failure is not None
    error = result.failure.exception
    assert isinstance(error, BudgetExceeded)
    assert (error.dimension, error.node_id, result.status) == ("latency", "b", "PARTIAL")
    # What it had itself is less than the limit, and would be told as just that.
    assert float(error.actual) > 300


async def test_a_deadline_stops_the_run_whatever_a_policy_says() -> None:
    """Past max_latency_ms nothing is called again, though a policy would retry."""
    calls = 0

    async def slow(state: Num) -> Num:
        nonlocal calls
        calls += 1
        await asyncio.Event().wait()
        return state

    runner = StromaRunner.quick(
        budget=ExecutionBudget(max_latency_ms=50),
        policy_map=retry_policies(5),
    )
    result = await runner.run([node("slow", slow)], Num())
    assert (result.status, calls, len(result.trace)) == ("PARTIAL", 1, 1)


# ---------------------------------------------------------------- traces


@dataclasses.dataclass
class Key:
    secret: SecretStr


@dataclasses.dataclass(slots=True)
class Slotted:
    secret: SecretStr


class Open(BaseModel):
    model_config = ConfigDict(extra="allow")


def test_secrets_are_found_wherever_a_state_has_them() -> None:
    """In fields, extras, dataclasses, dicts, lists and bytes; the class of a dataclass is none."""
    assert set(secrets_in(Key(SecretStr("one")))) == {"one"}
    assert set(secrets_in([Slotted(SecretStr("one"))])) == {"one"}
    assert set(secrets_in(Open(token=SecretStr("two")))) == {"two"}
    assert set(secrets_in({"k": [Key(SecretStr("three"))], "n": (Open(x={"y": SecretStr("four")}),)})) == {
        "three",
        "four",
    }
    assert set(secrets_in(SecretBytes("gr\u00fcn\\".encode()))) == {"gr\u00fcn\\", "gr\\xc3\\xbcn\\\\"}
    assert set(secrets_in(SecretBytes(b"\xffraw"))) == {"raw", "\\xffraw"}
    assert list(secrets_in(Key)) == []
    assert list(secrets_in(SecretStr(""))) == []


def test_a_secret_that_hides_a_structure() -> None:
    """Every text in what a Secret hides is one, as deep as it goes; numbers too, flags and None not."""
    from pydantic import Secret

    class Hidden(BaseModel):
        value: Secret[Any]

    model = Hidden(value={"a": ["x", ("y", {"b": "z"})], "c": None, "d": True, "e": 7})
    assert set(secrets_in(model)) == {"x", "y", "z", "7"}


async def trace(*order: str) -> ExecutionTrace:
    result = await StromaRunner.quick().run([node(name, _same) for name in order], Num())
    return result.trace


async def test_traces_of_which_one_goes_on() -> None:
    """Another order is told beside what only one of them has."""
    lines = (await trace("a", "b", "c")).diff(await trace("b", "a"))
    assert [line.split(":")[0] for line in lines] == ["Missing event in other trace", "Difference for order"]
    assert "'a'" in lines[1] or "a" in lines[1]


class Late(BaseModel):
    value: Unknown  # type: ignore[name-defined]  # noqa: F821


async def test_the_end_of_a_node_whose_contract_cannot_be_read() -> None:
    """It is an attempt like any other, and drawn like one; its message names what is not defined."""
    result = await StromaRunner.quick().run([node("one", _same, Late, Num)], Num())
    (event,) = list(result.trace)
    assert (result.status, event.outcome, event.failure) == ("FAILED", "failure", FailureClass.TERMINAL)
    assert "name 'Unknown' is not defined" in str(event.failure_message)
    assert "is not defined" in result._repr_html_()


async def test_models_without_a_price_are_told_in_the_picture() -> None:
    """The page of a result lists the models that count as free because nobody knows a price for them."""

    async def paid(state: Num) -> tuple[Num, int, int, str]:
        return state, 1, 1, "a-model-of-our-own"

    result = await StromaRunner.quick().run([node("one", paid)], Num())
    assert result.unpriced_models == ["a-model-of-our-own"]
    assert "unpriced" in result._repr_html_()
    assert "a-model-of-our-own" in result._repr_html_()
