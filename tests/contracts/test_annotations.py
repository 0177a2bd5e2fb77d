"""Annotations of the functions behind nodes: the source of their contracts, or compared with them."""

# Annotations are strings here, as the names in them may be those of a function.
from __future__ import annotations

import functools
from collections.abc import Awaitable, Callable
from typing import Annotated, Any, Optional, Protocol, TypeVar, Union

import pytest
from pydantic import BaseModel
from tests.kit import words

from stroma import Flow, NodeContract, NotDone, StromaRunner, Unknown, stroma_flow, stroma_node
from stroma.contracts.node import framework_node


class A(BaseModel):
    n: int = 0


class B(BaseModel):
    m: int = 0


class SubA(A):
    more: int = 0


class HasN(Protocol):
    n: int


Model = TypeVar("Model", bound=BaseModel)
Alias = A


async def takes_b(state: B) -> dict[str, Any]: ...
async def returns_b(state: A) -> B: ...
async def returns_usage(state: A) -> tuple[B, int]: ...
async def returns_nothing(state: A): ...  # type: ignore[no-untyped-def]
async def returns_maybe(state: A) -> B | None: ...
async def takes_text(state: str) -> A: ...
async def returns_list(state: A) -> list[B]: ...
async def takes_union(state: B | HasOther, ctx: dict[str, Any]) -> A: ...
async def takes_quoted(state: "Annotated[B, 1]") -> Any: ...  # noqa: UP037
def plain(state: B) -> A: ...


class HasOther(BaseModel): ...


@pytest.mark.parametrize(
    ("func", "says"),
    [
        (takes_b, "input=A, and its function is annotated with B"),
        (returns_b, "output=A, and its function is annotated with B"),
        (returns_usage, "output=A, and its function is annotated with B"),
        (returns_maybe, r"output=A, and its function is annotated with .*B \| None"),
        (takes_union, r"input=A, and its function is annotated with .*B \| .*HasOther"),
        (takes_quoted, "input=A, and its function is annotated with B"),
        (plain, "input=A, and its function is annotated with B"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_contract_that_differs_from_the_annotation_is_refused(func: Any, says: str) -> None:
    """A model in the contract against the function's annotation is a TypeError at decoration, with both."""
    runner = StromaRunner.quick()
    for decorate in (runner.node("a", input=A, output=A), stroma_node("a", input=A, output=A)):
        with pytest.raises(TypeError, match=f"^node 'a' has {says}; let them agree$"):
            decorate(func)
    assert runner.registry.ids == set()


def test_classes_of_a_function_are_compared() -> None:
    """An annotation with a class of the function around is that class, whatever the module calls so."""

    class A(BaseModel): ...

    class C(BaseModel): ...

    runner = StromaRunner.quick()

    @runner.node("local", input=A, output=C)
    async def local(state: A) -> C: ...

    with pytest.raises(TypeError, match=r"input=.*<locals>.*|input=A"):

        @runner.node("a", input=A, output=C)
        async def differs(state: B) -> C: ...

    with pytest.raises(TypeError, match="annotated with C"):

        @runner.node("b", input=A, output=A)
        async def also(state: A) -> C: ...


async def no_annotation(state): ...
async def loose(state: Any) -> Any: ...
async def returns_dict(state: A) -> dict[str, Any]: ...
async def returns_tuple(state: A) -> tuple[Any, ...]: ...
async def returns_some_tuple(state: A) -> tuple: ...
async def returns_a_and_usage(state: A) -> tuple[A, int, str]: ...
async def takes_base(state: BaseModel) -> SubA: ...
async def takes_sub(state: SubA) -> BaseModel: ...
async def optional(state: Optional[A]) -> Union[B, A]: ...  # noqa: UP007, UP045
async def union_with_dict(state: B | dict[str, Any]) -> B | dict[str, Any]: ...
async def generic(state: Model) -> Model: ...
async def protocol(state: HasN) -> None: ...
async def alias(state: Alias) -> Annotated[A, "x"]: ...
async def unknown(state: NotThere) -> AlsoNot: ...  # noqa: F821
async def returns_unknown(state: A) -> tuple[AlsoNot, int]: ...  # noqa: F821
def awaitable(state: A) -> Awaitable[B]: ...
async def only_keywords(*, state: B) -> Any: ...


def wraps(func: Callable[[B], Any]) -> Any:
    @functools.wraps(func)
    async def wrapper(state: A) -> Any:
        return func(B())

    return wrapper


class Nodes:
    class A(BaseModel): ...

    async def method(self, state: A) -> A: ...


@pytest.mark.parametrize(
    "func",
    [
        no_annotation,
        loose,
        returns_dict,
        returns_tuple,
        returns_some_tuple,
        returns_a_and_usage,
        takes_base,
        takes_sub,
        optional,
        union_with_dict,
        generic,
        protocol,
        alias,
        unknown,
        awaitable,
        only_keywords,
        wraps(lambda state: state),
        functools.partial(takes_b),
        Nodes.method,
        Nodes().method,
        print,
    ],
    ids=lambda func: getattr(func, "__qualname__", "partial"),
)
def test_annotations_that_may_be_right_are_accepted(func: Any) -> None:
    """Whatever is not certainly another model is accepted."""
    runner = StromaRunner.quick()
    runner.node("a", input=A, output=A)(func)
    assert runner.registry.ids == {"a"}


def test_annotations_whose_scope_is_not_known_are_accepted() -> None:
    """A function that is decorated elsewhere than it was defined may mean any class of its own scope."""

    def make() -> Any:
        class B(BaseModel): ...

        async def node(state: B) -> B: ...

        return node, B

    func, model = make()
    runner = StromaRunner.quick()
    runner.node("a", input=model, output=model)(func)
    runner.node("b", input=A, output=A)(func)


def test_a_class_that_was_defined_again_is_accepted() -> None:
    """As in a notebook, where the cell of the models ran once more."""

    def define() -> Any:
        class State(BaseModel): ...

        return State

    old, State = define(), define()

    async def node(state: State) -> State: ...

    StromaRunner.quick().node("a", input=old, output=old)(node)


def test_flows_are_compared_in_the_same_way() -> None:
    """A flow whose contract differs from its annotation is a TypeError, also with local classes."""

    class Own(BaseModel): ...

    runner = StromaRunner.quick()
    for decorator in (runner.flow("f", input=A, output=Own), stroma_flow("f", input=A, output=Own)):
        with pytest.raises(
            TypeError, match=r"^flow 'f' has input=A, and its function is annotated with B; let them agree$"
        ):

            @decorator
            async def differs(flow: Flow, state: B) -> Own: ...

    @runner.flow("g")
    async def annotated(flow: Flow, state: Own) -> Own: ...

    assert runner.registry.get("g").input_schema is Own


def test_functions_of_frameworks_have_annotations_of_their_own() -> None:
    """A framework calls its functions with its own state, which need not be the contract's."""
    contract: NodeContract[Any, Any] = NodeContract(node_id="a", input_schema=A, output_schema=A)
    node: Any = framework_node("a", contract)(takes_b)
    assert node._stroma_contract is contract


@pytest.mark.parametrize("contract", [A, A(), "a"])
def test_a_node_needs_a_contract(contract: Any) -> None:
    """A contract that is not one is a TypeError at decoration."""
    with pytest.raises(
        TypeError, match=r"contract of node 'a' must be a NodeContract, got .*; pass NodeContract"
    ):
        stroma_node("a", contract)


async def rate(state: A) -> tuple[B, int]:
    return B(m=state.n), 7


def test_the_annotations_are_the_contract() -> None:
    """A node without parentheses has its function's name as its id, and the models of its annotations."""
    runner = StromaRunner.quick()

    @runner.node
    async def double(state: A) -> A:
        return A(n=2 * state.n)

    @runner.node(effect=True)
    def book(state: A, ctx: dict[str, Any]) -> SubA:
        return SubA(n=state.n, more=ctx["more"])

    result = runner.run_sync(
        [double, stroma_node("rated")(book), stroma_node(rate)], A(n=2), context={"more": 5}
    )
    assert result.final_state == B(m=4)
    assert [e.node_id for e in result.trace] == ["double", "rated", "rate"]
    assert result.total_tokens == 7
    assert runner.registry.get("double").output_schema is A
    assert (runner.registry.get("book").output_schema, runner.registry.get("book").effect) == (SubA, True)


def test_a_node_without_a_runner_takes_the_parameters_of_one_with_it() -> None:
    """``stroma_node`` takes models and the other fields of a contract, as ``runner.node`` does."""

    async def look_up(state: A, key: str) -> B | NotDone | Unknown: ...

    @stroma_node("pay", input=A, output=B, upcast=dict, effect=True, reconcile=look_up, role="tool")
    async def pay(state: Any) -> Any: ...

    assert pay._stroma_contract == NodeContract(
        node_id="pay",
        input_schema=A,
        output_schema=B,
        upcast=dict,
        effect=True,
        reconcile=look_up,
        role="tool",
    )
    undecided: Any = stroma_node
    contract = NodeContract(node_id="pay", input_schema=A, output_schema=B)
    with pytest.raises(TypeError, match="node 'pay' has a contract and other parameters; pass them to"):
        undecided("pay", contract, effect=True)


def test_a_reconcile_that_cannot_be_called_is_refused() -> None:
    """Its parameters, and the models of its annotations, are those of the effect."""

    async def of_others(state: B, key: str) -> B: ...
    async def returns_other(state: A, key: str) -> A | NotDone: ...
    async def pay(state: A) -> B: ...

    async def takes_one(state: A) -> B: ...

    wrongs: list[tuple[Any, str]] = [
        (of_others, "reconcile of node 'pay' has input=A, and its function is annotated with B"),
        (returns_other, "reconcile of node 'pay' has output=B, and its function"),
        (takes_one, "reconcile of node 'pay' must take the state and the idempotency key, got"),
    ]
    for wrong, says in wrongs:
        with pytest.raises((TypeError, ValueError), match=says):
            stroma_node(effect=True, reconcile=wrong)(pay)


def test_what_is_passed_wins_over_the_annotation() -> None:
    """A model that is passed is the contract's; the other one comes from the annotation, and both agree."""
    runner = StromaRunner.quick()
    contract = runner.node("narrow", output=SubA)(a_to_a)._stroma_contract
    assert (contract.input_schema, contract.output_schema) == (A, SubA)
    with pytest.raises(TypeError, match="output=B, and its function is annotated with A"):
        runner.node("wide", output=B)(a_to_a)


async def a_to_a(state: A) -> A:
    return state


class Methods:
    """Nodes in a class: a decorator there gets the function, which takes ``self`` first."""

    def of_an_object(self, state: A) -> A:
        return state

    @classmethod
    def of_the_class(cls, state: A) -> A:
        return state


@pytest.mark.parametrize("method", [Methods().of_an_object, Methods.of_the_class])
async def test_a_bound_method_is_a_node(method: Any) -> None:
    """A bound method is a node with the contract of its annotations, like a function."""
    runner = StromaRunner.quick()
    result = await runner.run([runner.node(method)], A(n=1))
    assert result.output == A(n=1)


@pytest.mark.parametrize(
    ("func", "says"),
    [
        (
            Methods.of_an_object,
            r"'of_an_object' is marked inside its class; mark a bound method, as in runner.node",
        ),
        (
            classmethod(Methods.of_an_object),
            r"'of_an_object' is marked inside its class; mark a bound method, as in runner.node",
        ),
        (staticmethod(a_to_a), "node 'a_to_a' is a staticmethod; put @staticmethod above the decorator"),
        (lambda state: state, "has no name; pass an id to the decorator"),
        (functools.partial(a_to_a), "has no name; pass an id to the decorator"),
        (returns_nothing, "node 'returns_nothing' has no output model; annotate the return value with one"),
        (returns_maybe, r"annotated with .*B \| None as output, which is not a pydantic model; annotate the"),
        (
            takes_union,
            r"is annotated with .* as input, which is not a pydantic model; annotate the parameter",
        ),
        (takes_text, "'takes_text' is annotated with str as input, which is not a pydantic model"),
        (returns_list, r"annotated with list\[.*B\] as output, which is not a pydantic model"),
        (
            unknown,
            "annotated with NotThere as input, which cannot be resolved where it is defined; pass input=",
        ),
        (returns_unknown, r"annotated with .*AlsoNot.* as output, which cannot be resolved .*; pass output="),
    ],
    ids=words(
        "method classmethod staticmethod lambda partial none maybe union text list unknown unknown_output"
    ),
)
def test_a_node_without_models(func: Any, says: str) -> None:
    """A function whose annotations name no model of input or output is refused with the parameter to pass."""
    for decorate in (stroma_node, StromaRunner.quick().node):
        with pytest.raises(TypeError, match=says):
            decorate(func)
        if isinstance(func, classmethod):
            with pytest.raises(TypeError, match=says):
                decorate("of_an_object", input=A, output=A)(func)


async def test_a_flow_without_parentheses() -> None:
    """A flow without an id has the name of its function."""
    runner = StromaRunner.quick()

    @runner.flow
    async def triage(flow: Flow, state: A) -> A:
        return await flow.step(stroma_node(a_to_a), state)

    @stroma_flow
    async def apart(flow: Flow, state: A) -> B:
        return B(m=state.n)

    assert (await runner.run(triage, A(n=3))).final_state == A(n=3)
    assert (await runner.run(apart, A(n=3))).final_state == B(m=3)
    assert (triage.node.node_id, apart.node.node_id) == ("triage", "apart")
