"""What a node may be, what is refused when it is defined, and what it returned by mistake."""

import asyncio
import functools
import pickle
import warnings
from typing import Any

import pytest
from pydantic import BaseModel, RootModel, ValidationError
from tests.kit import Note, Num, One, context_of, give_one, node, quick_without_retries, returning, same

from stroma import (
    ContractViolation,
    ExecutionBudget,
    FailureClass,
    FailurePolicy,
    NodeContract,
    ReliabilityContext,
    RunConfig,
    RunStatus,
    StromaRunner,
    Suspend,
    current_node,
    execute_step,
    map_over,
    parallel,
)
from stroma.contracts.node import takes_context


@pytest.mark.parametrize(
    ("kind", "misspelt"),
    [
        (ExecutionBudget, {"max_tokens": 100}),
        (FailurePolicy, {"max_retry": 0}),
        (NodeContract, {"node_id": "n", "input_schema": Num, "output_schema": Num, "upcasts": None}),
        (RunConfig, {"budgets": None}),
    ],
)
def test_a_misspelt_setting_is_refused(kind: Any, misspelt: dict[str, Any]) -> None:
    """A limit, a policy or a contract with an unknown field is an error that names it."""
    with pytest.raises(ValidationError, match="Extra inputs are not permitted") as raised:
        kind(**misspelt)
    assert list(misspelt)[-1] in str(raised.value)


def context(**config: Any) -> ReliabilityContext:
    runner = quick_without_retries(**config)
    return context_of(runner)


async def test_what_cannot_be_a_node() -> None:
    """What cannot be called cannot be a node; a callable without a signature takes the state alone."""
    with pytest.raises(TypeError, match="not callable"):
        node("a", 5)

    class Unsigned:
        __signature__ = "none"

        async def __call__(self, state: Num) -> Any:
            return {"n": 1}

    result = await quick_without_retries().run([node("a", Unsigned())], Num())
    assert result.final_state == Num(n=1)

    first = node("a", same)
    second = node("b", first)
    assert await second(Num(n=7)) == Num(n=7)
    assert (first._stroma_node_id, second._stroma_node_id) == ("a", "b")


async def test_what_a_step_may_be_given() -> None:
    """The input of a step is a model: anything else is a TypeError that names the step."""
    with pytest.raises(TypeError, match="'a'"):
        await execute_step("a", same, {"n": 1}, context())


async def test_where_a_node_stands_can_be_printed() -> None:
    """repr(current_node()) names run, node, position and attempt."""
    shown: list[str] = []

    async def func(state: Num) -> Any:
        shown.append(repr(current_node()))
        return state

    await quick_without_retries().run([node("a", func)], Num(), run_id="r")
    assert shown == ["<node 'a' of run 'r', position 0, attempt 1>"]


@pytest.mark.parametrize("name", ["", "a b", "1"])
def test_map_over_wants_names_of_fields(name: str) -> None:
    """map_over refuses what can be no field's name, where it is made."""
    with pytest.raises(ValueError, match="is not the name of a field"):
        map_over(name, node("a", same), into="out")
    with pytest.raises(ValueError, match="is not the name of a field"):
        map_over("items", node("a", same), into=name)


async def test_a_single_node_is_told_to_stand_in_a_list() -> None:
    """run(node, state) and run(parallel(...), state) say to use a list; a function hears how to be a node."""
    a = node("a", give_one, output=One)
    for single in (a, parallel(a), map_over("items", a, into="items")):
        with pytest.raises(TypeError, match="in a list"):
            await quick_without_retries().run(single, Num())

    async def plain(state: Num) -> Any:
        return {}

    for nodes in (plain, [plain]):
        with pytest.raises(TypeError, match="decorate it with @stroma_node"):
            await quick_without_retries().run(nodes, Num())


async def add(state: Num, amount: Any) -> Any:
    return {"n": state.n + (amount["amount"] if isinstance(amount, dict) else amount)}


def with_amount(func: Any) -> Any:
    @functools.wraps(func)
    async def wrapper(state: Num) -> Any:
        return await func(state, 5)

    return wrapper


def passing_on(func: Any) -> Any:
    @functools.wraps(func)
    async def wrapper(*args: Any, **kwargs: Any) -> Any:
        return await func(*args, **kwargs)

    return wrapper


class PassingOn:
    """A decorator that is a class."""

    def __init__(self, func: Any) -> None:
        functools.update_wrapper(self, func)

    def __call__(self, *args: Any) -> Any:
        return self.__wrapped__(*args)  # type: ignore[attr-defined]


class Service:
    @passing_on
    async def add_one(self, state: Num) -> Any:
        return await add(state, 1)

    add_amount = passing_on(lambda self, state, ctx: add(state, ctx))


@pytest.mark.parametrize(
    ("func", "added"),
    [
        (with_amount(add), 5),
        (passing_on(with_amount(add)), 5),
        (PassingOn(with_amount(add)), 5),
        (functools.partial(passing_on(add), Num(n=100)), None),
        (functools.lru_cache(with_amount(add)), None),
        (passing_on(add), 7),
        (passing_on(passing_on(add)), 7),
        (PassingOn(add), 7),
        (Service().add_one, 1),
        (Service().add_amount, 7),
    ],
)
async def test_a_decorated_function_takes_what_its_decorator_takes(func: Any, added: int | None) -> None:
    """A decorator that supplies an argument itself does not get the context for it."""
    if added is None:
        assert not takes_context(func)
        return
    result = await quick_without_retries(context={"amount": 7}).run([node("a", func)], Num(n=1))
    assert result.final_state == Num(n=1 + added), result.failure


class Texts(BaseModel):
    items: list[Note] = [Note()]
    text: str = ""


async def answer() -> dict[str, str]:
    return {"text": "x"}


async def forgot_await(state: Any) -> Any:
    return answer()


async def forgot_await_beside_usage(state: Any) -> Any:
    return answer(), 5


def forgot_await_of_a_task(state: Any) -> Any:
    async def give() -> Any:
        return asyncio.ensure_future(answer())

    return give()


async def forgot_return(state: Any) -> Any:
    state.text = "y"


def forgot_return_in_a_thread(state: Any) -> Any:
    state.text = "y"


async def yields(state: Any) -> Any:
    yield {"text": "x"}


def yields_in_a_thread(state: Any) -> Any:
    yield {"text": "x"}


async def returns_five(state: Any) -> Any:
    return {"text": "x"}, 1, 2, "gpt-4o-mini", "more"


async def returns_one(state: Any) -> Any:
    return ({"text": "x"},)


async def returns_suspension(state: Any) -> Any:
    return Suspend("Is it right?")


MISTAKES: list[tuple[Any, str]] = [
    (forgot_await, "the function returned a coroutine; did you forget await?"),
    (forgot_await_beside_usage, "the function returned a coroutine; did you forget await?"),
    (forgot_await_of_a_task, "the function returned an awaitable Task; did you forget await?"),
    (forgot_return, "the function returned None; return the output"),
    (forgot_return_in_a_thread, "the function returned None; return the output"),
    (yields, "the function returned an async generator; return the output in place of yielding it"),
    (yields_in_a_thread, "the function returned a generator; return the output in place of yielding it"),
    (returns_suspension, "the function returned the exception Suspend; raise it"),
    (
        returns_five,
        "the function returned a tuple of 5; return the output, (output, response), (output, tokens), "
        "(output, input_tokens, model) or (output, input_tokens, output_tokens, model)",
    ),
    (
        returns_one,
        "the function returned a tuple of 1; return the output, (output, response), (output, tokens), "
        "(output, input_tokens, model) or (output, input_tokens, output_tokens, model)",
    ),
]


@pytest.mark.parametrize(("func", "says"), MISTAKES, ids=lambda value: getattr(value, "__name__", ""))
@pytest.mark.parametrize("place", ["node", "child", "item", "step"])
async def test_what_a_function_returned_by_mistake_is_named(func: Any, says: str, place: str) -> None:
    """A coroutine, None, a generator, an exception or a tuple of a wrong length is named, with the fix."""
    runner = StromaRunner.quick()
    contract: NodeContract[Any, Any] = NodeContract(node_id="ask", input_schema=Note, output_schema=Note)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # No "coroutine was never awaited" beside the message.
        if place == "step":
            ctx = context_of(runner)
            result = await execute_step("ask", func, Note(), ctx, contract=contract)
        else:
            node = runner.node("ask", input=Note, output=Note)(func)
            nodes = {"node": node, "child": parallel(node), "item": map_over("items", node, into="out")}
            result = await runner.run([nodes[place]], Texts())
    assert (result.status, result.failure.failure_class) == (RunStatus.FAILED, FailureClass.TERMINAL)
    assert result.failure.reason == "contract"
    assert result.failure.message == f"Contract violation for 'ask' (output): {says}"
    violation = result.failure.exception
    assert isinstance(violation, ContractViolation)
    assert says in (result.failure.as_prompt() or "")
    assert str(pickle.loads(pickle.dumps(violation))) == str(violation)


async def test_outputs_that_a_contract_takes_are_no_mistakes() -> None:
    """None and a tuple of five are outputs like any other where the contract takes them."""

    class Nothing(RootModel[None]):
        pass

    class Five(RootModel[tuple[int, ...]]):
        pass

    runner = StromaRunner.quick()
    none = runner.node("none", input=Note, output=Nothing)(returning(None))
    five = runner.node("five", input=Note, output=Five)(returning((1, 2, 3, 4, 5)))
    for one in (none, five):
        assert (await runner.run([one], Note())).status is RunStatus.COMPLETED


async def test_other_wrong_outputs_are_told_field_by_field() -> None:
    """What is wrong inside an output is still what pydantic says of its fields."""
    runner = StromaRunner.quick()
    ask = runner.node("ask", input=Note, output=Note)(returning({"text": None}))
    result = await runner.run([ask], Note())
    assert (
        result.failure.message
        == "Contract violation for 'ask' (output): text: Input should be a valid string"
    )
