"""Validators, contracts and repairs, as nodes, groups and hooks meet them."""

import asyncio
import copy
import enum
from typing import Any

import pytest
from pydantic import BaseModel, ConfigDict, Json, SecretStr, field_validator, model_validator
from tests.fixtures import store_fixture
from tests.kit import (
    NEVER,
    Num,
    computing,
    failing_with,
    node,
    quick,
    quick_without_retries,
    record_node_hooks,
    returning,
    same,
)

from stroma import ContractViolation, NodeHooks, RunStatus, current_node, map_over, parallel, stroma_node


@pytest.mark.core
async def test_a_validator_cannot_change_the_state_it_reads() -> None:
    """A validator that takes values out of the dict it is given changes nothing of the state before it."""

    class Greedy(BaseModel):
        n: int = 0

        @model_validator(mode="before")
        @classmethod
        def take(cls, data: Any) -> Any:
            return {"n": data.pop("n") + 1}

    initial = Num(n=1)
    result = await quick().run([node("a", computing(lambda state: {"n": state.n}), Greedy)], initial)
    assert (result.final_state, initial.__dict__) == (Num(n=2), {"n": 1})


async def test_each_child_gets_the_state_that_a_validator_of_its_sibling_read() -> None:
    """Children whose validators take values out of what they read do not take them from one another."""

    class Greedy(BaseModel):
        n: int = 0

        @model_validator(mode="before")
        @classmethod
        def take(cls, data: Any) -> Any:
            return {"n": data.pop("n", -100)}

        @field_validator("n")
        @classmethod
        def known(cls, value: int) -> int:
            return value

    def child(name: str) -> Any:
        return node(name, computing(lambda state: {"n": state.n}), Greedy)

    result = await quick().run([parallel(child("a"), child("b"))], Num(n=3))
    assert [event.output_state for event in result.trace.walk()] == [{"n": 3}] * 3


async def test_a_violation_may_have_errors_of_any_kind() -> None:
    """The text of a violation that was made by hand shows whatever its errors are."""
    assert str(ContractViolation("a", "input", {}, ["too long", {"msg": "bad"}])) == (
        "Contract violation for 'a' (input): too long; bad"
    )


async def test_the_repr_of_a_violation_has_no_values() -> None:
    """The repr of a result, which a log may have, shows no value of an output that broke its contract."""

    class Login(BaseModel):
        password: SecretStr
        number: int

    log_in = node("log_in", returning({"password": "hunter2", "number": "many"}), Login, Login)
    result = await quick().run([log_in], Login(password=SecretStr("hunter2"), number=1))
    assert result.failure
    assert repr(result.failure.exception) == f"ContractViolation({result.failure.message!r})"
    assert "hunter2" not in repr(result)


async def test_contract_repair_of_children() -> None:
    """contract_retries grants further attempts to children and items too; the next one sees the violation."""
    seen: list[str] = []

    async def func(state: Any) -> Any:
        run = current_node()
        seen.append(f"{run.kind} {run.attempt} {run.last_failure and run.last_failure.failure_class}")
        return {"n": "no number" if run.attempt == 1 else 1}

    class Many(BaseModel):
        items: list[dict[str, int]] = [{"n": 1}]

    runner = quick(policy_map=NEVER, contract_retries={"a": 1})
    for group in (parallel(node("a", func, Many)), map_over("items", node("a", func), into="out")):
        result = await runner.run([group], Many())
        assert result.status is RunStatus.COMPLETED, result.failure
    assert seen == ["node 1 None", "node 2 RECOVERABLE", "item 1 None", "item 2 RECOVERABLE"]


class Nested(BaseModel):
    items: list[Any]


@pytest.mark.parametrize("item", [[1, [2]], {"x": [1]}], ids=["list", "dict"])
async def test_every_attempt_of_an_item_gets_a_pristine_input(item: Any) -> None:
    """Each retry of an item sees it as it was, also where no contract copies it."""
    seen: list[str] = []

    async def func(state: Any) -> Any:
        seen.append(repr(state))
        (state.root if hasattr(state, "root") else state.x).append("spoilt")
        raise ValueError

    func._stroma_node_id, func._stroma_contract = "a", None
    value = Nested(items=[item])
    await quick().run([map_over("items", func, into="out")], value)
    assert len(seen) == 3
    assert len(set(seen)) == 1
    assert "spoilt" not in repr(value)


store = store_fixture("async-memory", "sqlite")


class Bumped(BaseModel):
    x: int

    @field_validator("x")
    @classmethod
    def bump(cls, value: int) -> int:
        return value + 1


class BumpedList(BaseModel):
    x: list[int]

    @field_validator("x")
    @classmethod
    def bump(cls, value: list[int]) -> list[int]:
        return [*value, len(value)]


class BumpedAny(BaseModel):
    model_config = ConfigDict(extra="allow")

    x: int
    any: Any = None

    @model_validator(mode="after")
    def bump(self) -> Any:
        self.x += 1
        return self


class BumpedBefore(BaseModel):
    x: int
    items: list[Any] = []

    @model_validator(mode="before")
    @classmethod
    def bump(cls, data: Any) -> Any:
        return {**data, "x": data["x"] + 1}


@pytest.mark.parametrize(
    ("model", "raw"),
    [
        (Bumped, {"x": 1}),
        (BumpedList, {"x": [1]}),
        (BumpedAny, {"x": 1, "any": [1], "more": {"k": [2]}}),
        (BumpedBefore, {"x": 1, "items": [[1]]}),
    ],
)
@pytest.mark.parametrize("usage", [False, True])
async def test_an_output_is_validated_once(model: type[BaseModel], raw: Any, usage: bool, store: Any) -> None:
    """A validator that changes its value runs once on what a node returned; all readers see the same."""
    seen: list[Any] = []

    async def success(run_id: str, node_id: str, state: dict[str, Any], tokens: int) -> None:
        seen.append(state)

    async def a(state: Num) -> Any:
        return (copy.deepcopy(raw), 5) if usage else copy.deepcopy(raw)

    runner = quick_without_retries(store=store, hooks=NodeHooks(on_node_success=success))
    result = await runner.run([node("a", a, output=model)], Num())
    once = model.model_validate(copy.deepcopy(raw))
    assert result.final_state == once
    assert seen == [once.model_dump()]
    assert [e.output_state for e in result.trace] == [once.model_dump()]
    assert [e.output_state for e in result.trace] == [once.model_dump()]


class Colour(enum.Enum):
    RED = "red"
    BLUE = "blue"


class StrictPaint(BaseModel):
    model_config = ConfigDict(strict=True, use_enum_values=True)

    colour: Colour
    more: list[Colour | None] = []
    extra: Json[Any] = None


async def test_a_strict_class_accepts_its_instances_of_enum_values(store: Any) -> None:
    """A strict class that keeps the values of enum members accepts its own instances, also from a store."""
    paint = StrictPaint(colour=Colour.RED, more=[Colour.BLUE, None], extra="[1]")
    runner = quick_without_retries(store=store)
    last = node("b", same, input=StrictPaint, output=StrictPaint)
    steps = [node("a", returning(paint), output=StrictPaint), last]
    result = await runner.run(steps, Num(), run_id="r")
    assert (result.status, result.final_state) == (RunStatus.COMPLETED, paint)
    again = await runner.run(steps, Num(), run_id="r", resume=True)
    assert (again.status, again.final_state) == (RunStatus.RESUMED, paint)
    wrong = paint.model_copy(update={"colour": "green"})
    result = await runner.run([node("a", returning(wrong), output=StrictPaint)], Num())
    assert "colour: Input should be 'red' or 'blue'" in result.failure.message


@pytest.mark.core
async def test_a_violation_of_the_nodes_own_making_is_shown() -> None:
    """A ContractViolation that a node made, incomplete, is a failure like any other, redacted too."""

    class Own(ContractViolation):
        def __init__(self) -> None:
            pass

    seen: list[str] = []
    runner = quick(hooks=record_node_hooks(seen), redact=lambda state: state, contract_retries={"a": 1})
    result = await runner.run([node("a", failing_with(Own))], Num())
    assert (result.status, seen) == (RunStatus.FAILED, ["start", "failure"])


@pytest.mark.core
@pytest.mark.parametrize("kind", [asyncio.CancelledError, LookupError])
@pytest.mark.parametrize("at", ["input", "output"])
async def test_a_validator_that_raises_otherwise_is_a_violation(kind: type[BaseException], at: str) -> None:
    """A validator that raises a CancelledError refused a value: FAILED, each start and the run ended."""

    class Refusing(BaseModel):
        n: int = 0

        @field_validator("n")
        @classmethod
        def refuse(cls, value: int) -> int:
            if value == 5:
                raise kind("no")
            return value

    argument, promised = (Refusing, Num) if at == "input" else (Num, Refusing)
    seen: list[str] = []

    async def end(*_: Any) -> None:
        seen.append("run end")

    runner = quick(hooks=record_node_hooks(seen, on_run_end=end))
    nodes = [stroma_node("a", input=argument, output=promised)(returning({"n": 5}))]
    result = await runner.run(nodes, Num(n=5))
    assert result.status is RunStatus.FAILED
    assert result.failure.message.startswith(f"Contract violation for 'a' ({at})")
    assert seen == [*(["start"] if at == "output" else []), "failure", "run end"]
