"""Nodes: the marker on a function and the frozen record behind it."""

from __future__ import annotations

import functools
import inspect
import sys
import threading
import types
import weakref
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Generic, Literal, Protocol, TypeAlias, TypeVar, overload

from pydantic import BaseModel

from stroma.contracts.annotations import check_annotations, infer_contract
from stroma.contracts.contract import ContractRegistry, NodeContract, Reconcile, Role, check_id

if TYPE_CHECKING:
    import typing_extensions

    from stroma.contracts.schema import Schema

    DepsT = typing_extensions.TypeVar("DepsT", default=dict[str, Any])
else:
    #: Class of the context, which nodes receive as ``ctx``.
    DepsT = TypeVar("DepsT")

In = TypeVar("In", bound=BaseModel)
Out = TypeVar("Out", bound=BaseModel)
Loose = TypeVar("Loose", bound="Mapping[str, Any] | tuple[Any, ...]")
TakenT = TypeVar("TakenT", bound=BaseModel, contravariant=True)
OutputT = TypeVar("OutputT", bound=BaseModel, covariant=True)
ContextT = TypeVar("ContextT", contravariant=True)
ReturnedT = TypeVar("ReturnedT", covariant=True)


#: What the annotated function of a node returns.
Returned: TypeAlias = BaseModel | tuple[Any, ...] | Coroutine[Any, Any, BaseModel | tuple[Any, ...]]


class LooseNode(Protocol, Generic[TakenT, OutputT, ReturnedT]):
    """A node whose function returns a dict or a tuple: for type checkers, its step returns the output."""

    @property
    def _stroma_output(self) -> OutputT: ...  # of type checkers only: at run time it is the function
    def __call__(self, state: TakenT, /) -> ReturnedT: ...


class LooseContextNode(Protocol, Generic[TakenT, ContextT, OutputT, ReturnedT]):
    """As LooseNode, of a function that takes ``(state, ctx)``."""

    @property
    def _stroma_output(self) -> OutputT: ...
    def __call__(self, state: TakenT, context: ContextT, /) -> ReturnedT: ...


#: What an annotated function returns beside its output: a response or usage.
Metered: TypeAlias = tuple[Out, Any] | tuple[Out, int, str] | tuple[Out, int, int, str]
#: An annotated function that returns its output with usage.
MeteredNode: TypeAlias = (
    Callable[[In], Coroutine[Any, Any, Metered[Out]]]
    | Callable[[In, Any], Coroutine[Any, Any, Metered[Out]]]
    | Callable[[In], Metered[Out]]
    | Callable[[In, Any], Metered[Out]]
)


class NodeDecorator(Protocol, Generic[In, Out, DepsT]):
    """Marks a function as a node: async or not, of ``(state)`` or ``(state, ctx)``, and returns it.

    ``DepsT``: the class of ``ctx``. The function takes the input model and returns the output model, a dict,
    or a tuple with usage (see :func:`stroma_node`); anything else is an error for type checkers.
    """

    @overload
    def __call__(
        self, func: Callable[[In], Coroutine[Any, Any, Out]], /
    ) -> Callable[[In], Coroutine[Any, Any, Out]]: ...
    @overload
    def __call__(
        self, func: Callable[[In], Coroutine[Any, Any, Loose]], /
    ) -> LooseNode[In, Out, Coroutine[Any, Any, Loose]]: ...
    @overload
    def __call__(
        self, func: Callable[[In, DepsT], Coroutine[Any, Any, Out]], /
    ) -> Callable[[In, DepsT], Coroutine[Any, Any, Out]]: ...
    @overload
    def __call__(
        self, func: Callable[[In, DepsT], Coroutine[Any, Any, Loose]], /
    ) -> LooseContextNode[In, DepsT, Out, Coroutine[Any, Any, Loose]]: ...
    @overload
    def __call__(self, func: Callable[[In], Out], /) -> Callable[[In], Out]: ...
    @overload
    def __call__(self, func: Callable[[In], Loose], /) -> LooseNode[In, Out, Loose]: ...
    @overload
    def __call__(self, func: Callable[[In, DepsT], Out], /) -> Callable[[In, DepsT], Out]: ...
    @overload
    def __call__(self, func: Callable[[In, DepsT], Loose], /) -> LooseContextNode[In, DepsT, Out, Loose]: ...


ResultT = TypeVar("ResultT", bound=Returned)


class AnnotatedNodeDecorator(Protocol, Generic[DepsT]):
    """Marks a function as a node with the contract that its annotations describe, and returns it."""

    @overload
    def __call__(self, func: Callable[[In], ResultT], /) -> Callable[[In], ResultT]: ...
    @overload
    def __call__(self, func: Callable[[In, DepsT], ResultT], /) -> Callable[[In, DepsT], ResultT]: ...


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class Node:
    """One function with an id. Inspected once, when it is made.

    Attributes:
        wants_context: the function takes ``(state, ctx)``.
        is_async: calling it gives a coroutine; otherwise it runs in a thread.
    """

    node_id: str
    func: Callable[..., Any]
    contract: NodeContract[Any, Any] | None
    wants_context: bool
    is_async: bool
    #: The engine's note of the contract's schemas, kept from run to run: a cell, since this is frozen.
    plan: list[tuple[Schema, Schema, NodeContract[Any, Any]] | None] = field(
        default_factory=lambda: [None], repr=False
    )

    def call(self, state: BaseModel, context: Any) -> Any:
        """Call the function with the arguments that it takes. For the engine, and groups called by hand."""
        return self.func(state, context) if self.wants_context else self.func(state)


@dataclass(frozen=True, slots=True, eq=False)
class FlowNode(Node):
    """A flow in a sequence of nodes: the runner drives its body, the engine never calls it.

    Attributes:
        body: calls the function of the flow for ``(its run, state)``.
        max_concurrency: how many of its steps run at once; None is all.
    """

    body: Callable[[Any, Any], Coroutine[Any, Any, Any]] | None = None
    max_concurrency: int | None = None


class Group:
    """Several executions under one id, recorded as one event: ``parallel``, ``map_over``.

    Attributes:
        children: the nodes and groups inside.
        max_concurrency: how many children run at once; None is all.
        is_map: the one child runs once for each item; otherwise each child runs once.
        is_sequence: each child receives the output of the one before it; otherwise every child receives the
            group's input.
        items_field: the list field that holds the items of a map, or the name of its external items.
        output_field: the field that receives the outputs of a map; "" if they stay out of the state.
        has_external_items: the items of a map do not come from the state.
        collects_failures: a map goes on when an item fails for good.
    """

    is_map = False
    is_sequence = False
    items_field = ""
    output_field = ""
    has_external_items = False
    collects_failures = False

    def __init__(self, node_id: str, children: tuple[Node | Group, ...], max_concurrency: int | None) -> None:
        self.node_id = node_id
        self.children = children
        self.max_concurrency = max_concurrency

    def __repr__(self) -> str:
        return self.node_id

    @property
    def _stroma_node_id(self) -> str:
        return self.node_id

    def __call__(self, state: BaseModel) -> Awaitable[dict[str, Any]]:
        """Call each child once, with neither retries nor records, and merge their outputs."""
        return self.call_directly(state)

    async def run(self, ctx: Any, execution: Any, value: BaseModel) -> dict[str, Any]:
        """Execute each child and return the fields of the group's output. Only the engine calls this."""
        raise NotImplementedError

    async def call_directly(self, state: BaseModel) -> dict[str, Any]:
        """Call the functions without a run and return the fields of the output. TypeError for a map."""
        raise TypeError(f"{self.node_id} cannot be called directly; run it with a runner")

    def output_classes(
        self,
        input_class: type[BaseModel],
        class_of: Callable[[Node | Group, type[BaseModel]], type[BaseModel]],
    ) -> list[type[BaseModel]]:
        """Return the class of each child's output; ``class_of``: that of a child for its input's class."""
        classes: list[type[BaseModel]] = []
        for child in self.children:
            classes.append(class_of(child, input_class))
            if self.is_sequence:
                input_class = classes[-1]
        return classes

    def output_class(
        self, input_class: type[BaseModel], child_classes: Sequence[type[BaseModel]]
    ) -> type[BaseModel]:
        """Return the class of the group's output, for the class of its input and its children's outputs."""
        raise NotImplementedError

    def own_fields(self, output_class: type[BaseModel]) -> frozenset[str] | None:
        """Return the fields of the output that the group sets, not only passes on; None for any."""
        return None


def first_in(node: Node | Group) -> Node | Group:
    """Return the first node of a sequence, which receives its input; any other node or group unchanged."""
    while isinstance(node, Group) and node.is_sequence:
        node = node.children[0]
    return node


def last_in(node: Node | Group) -> Node | Group:
    """Return the last node of a sequence, which makes its output; any other node or group unchanged."""
    while isinstance(node, Group) and node.is_sequence:
        node = node.children[-1]
    return node


def contract_of_node(node: Node | Group | None, registry: ContractRegistry) -> NodeContract[Any, Any] | None:
    """Return the contract of a node: the registered one, else that of its marker; None of a group."""
    return registry.find(node.node_id) or node.contract if isinstance(node, Node) else None


def output_class(contract: NodeContract[Any, Any] | None) -> type[BaseModel]:
    """Return the class of the output of a node, by its contract."""
    if contract is not None:
        return contract.output_schema
    from stroma.contracts.untyped import UntypedState

    return UntypedState


def held_by(state: Any) -> Any:
    """Return the output of a node without a contract, unwrapped; any other state unchanged."""
    from stroma.contracts.untyped import UntypedState

    return state.root if isinstance(state, UntypedState) else state


def takes_context(func: Callable[..., Any]) -> bool:
    """Return True if a function has a second positional parameter, for the run's context."""
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return sum(p.kind in positional for p in _parameters_of(func)) >= 2


def _parameters_of(func: Any) -> Sequence[inspect.Parameter]:
    """Return the parameters that a call goes by: of a decorated function, those of the decorator's.

    If that passes on ``*args``, they are those of the function that it wraps.
    """
    try:
        own = [*inspect.signature(func, follow_wrapped=False).parameters.values()]
    except (TypeError, ValueError):  # Some builtins have no signature.
        own = []
    if own and all(p.kind is not inspect.Parameter.VAR_POSITIONAL for p in own):
        return own
    if type(func) is not types.MethodType and hasattr(func, "__wrapped__"):
        return _parameters_of(func.__wrapped__)
    try:
        return [*inspect.signature(func).parameters.values()]
    except (TypeError, ValueError):
        return []


def gives_coroutine(func: Callable[..., Any]) -> bool:
    """Return True if a call returns a coroutine, as far as can be decided without calling."""
    while isinstance(func, functools.partial):
        func = func.func
    call = getattr(func, "__call__", None)  # noqa: B004
    return inspect.iscoroutinefunction(func) or inspect.iscoroutinefunction(call)


def make_node(node_id: str, func: Callable[..., Any], contract: NodeContract[Any, Any] | None) -> Node:
    """Return the record of a function as a node. Raises TypeError, or ValueError for an invalid id."""
    if not callable(func):
        raise TypeError(f"{func!r} cannot be a node: it is not callable")
    return Node(check_id(node_id, "node id"), func, contract, takes_context(func), gives_coroutine(func))


def mark(func: Any, node_id: str, contract: NodeContract[Any, Any] | None) -> Any:
    """Mark a function as a node and return it; one that has another id is wrapped, not renamed."""
    node = make_node(node_id, func, contract)
    taken = getattr(func, "_stroma_node_id", node_id) != node_id
    if taken or not _accepts_attributes(func):
        func = _forward(func)
    func._stroma_node_id = node_id
    func._stroma_contract = contract
    func._stroma_node = node
    with _marked_lock:
        _marked.add(node)
    return func


#: The nodes of this process that decorators made.
_marked: Final[weakref.WeakSet[Node]] = weakref.WeakSet()
_marked_lock = threading.Lock()


def marked_nodes() -> list[Node]:
    """Return all nodes that decorators made in this process and that somebody still has."""
    with _marked_lock:
        return list(_marked)


def _accepts_attributes(func: Any) -> bool:
    try:
        func._stroma_node_id = getattr(func, "_stroma_node_id", None)
    except AttributeError:  # A bound method, or an object with slots.
        return False
    return True


def _forward(func: Callable[..., Any]) -> Callable[..., Any]:
    # A wrapper for the marker only: the node's record keeps the function itself, so nothing is called through
    # it unless somebody calls the decorated name by hand.
    def forward(*args: Any, **kwargs: Any) -> Any:
        return func(*args, **kwargs)

    functools.update_wrapper(forward, func)
    for name in ("_stroma_node_id", "_stroma_contract", "_stroma_node"):
        forward.__dict__.pop(name, None)
    return forward


_FORWARDING: Final = _forward(_forward).__code__


def find_node(obj: Any) -> Node | Group:
    """Return the record of a node or group. Raises TypeError for any other object."""
    node: Node | None
    try:  # getattr() with a default takes half as long again, and a run asks for each of its nodes.
        node, node_id, contract = obj._stroma_node, obj._stroma_node_id, obj._stroma_contract
    except AttributeError:
        node, node_id = getattr(obj, "_stroma_node", None), getattr(obj, "_stroma_node_id", None)
        contract = getattr(obj, "_stroma_contract", None)
    # A decorator on top has the attributes of what it wraps, and a bound method those of its function: each
    # is a node of its own.
    if (
        node is not None
        and (node.func is obj or getattr(obj, "__code__", None) is _FORWARDING)
        and node_id == node.node_id
        and contract is node.contract
    ):
        return node
    if isinstance(obj, (Node, Group)):
        return obj
    if node_id is None:
        raise _not_a_node(obj)
    # Marked by hand, through the two published attributes.
    node = make_node(node_id, obj, contract)
    if type(obj) is types.FunctionType:
        obj.__dict__["_stroma_node"] = node  # Looking at its signature takes 10 us.
    return node


def _not_a_node(obj: Any) -> TypeError:
    """Return the error for an object that is not a node, with what the caller probably meant."""
    if isinstance(obj, Awaitable):
        return TypeError(f"{obj!r} is not a stroma node; pass the node itself, without calling it")
    if isinstance(obj, (list, tuple)) or hasattr(obj, "nodes"):  # A pipeline: its config may hold secrets.
        return TypeError(f"a {type(obj).__name__} is not a stroma node; pass its nodes one by one")
    return TypeError(f"{obj!r} is not a stroma node; decorate it with @stroma_node or @runner.node")


def mark_annotated(
    func: Any,
    node_id: str | None,
    scope: types.FrameType,
    models: tuple[type[BaseModel] | None, type[BaseModel] | None] = (None, None),
    **options: Any,
) -> Any:
    """Mark a function as a node with the contract of its annotations; see :func:`infer_contract`."""
    node_id = name_of(func) if node_id is None else node_id
    if isinstance(func, staticmethod):  # Its class has the function inside, without the mark.
        raise TypeError(
            f"node {node_id!r} is a staticmethod; put @staticmethod above the decorator of the node"
        )
    return mark(func, node_id, infer_contract("node", node_id, func, models, scope, **options))


def name_of(func: Any) -> str:
    """Return the name of a function, which is the default id. Raises TypeError without a name."""
    name = getattr(func, "__name__", "<lambda>")
    if name == "<lambda>":
        raise TypeError(f"{func!r} has no name; pass an id to the decorator")
    return str(name)


@overload
def stroma_node(func: Callable[[In], ResultT], /) -> Callable[[In], ResultT]: ...
@overload
def stroma_node(func: Callable[[In, ContextT], ResultT], /) -> Callable[[In, ContextT], ResultT]: ...
@overload
def stroma_node(node_id: str, contract: NodeContract[In, Out]) -> NodeDecorator[In, Out, Any]: ...
@overload
def stroma_node(
    node_id: str | None = None,
    *,
    input: type[In],
    output: type[Out],
    upcast: Callable[[Any], Any] | None = None,
    effect: bool = False,
    reconcile: Reconcile[In, Out] | None = None,
    role: Role | None = None,
    place: str | None = None,
) -> NodeDecorator[In, Out, Any]: ...
@overload
def stroma_node(
    node_id: str | None = None,
    *,
    upcast: Callable[[Any], Any] | None = None,
    effect: bool = False,
    reconcile: Reconcile[Any, Any] | None = None,
    role: Role | None = None,
    place: str | None = None,
) -> AnnotatedNodeDecorator[Any]: ...
def stroma_node(
    node_id: str | Callable[..., Any] | None = None,
    contract: NodeContract[Any, Any] | Literal["annotated"] | None = "annotated",
    *,
    input: type[BaseModel] | None = None,
    output: type[BaseModel] | None = None,
    upcast: Callable[[Any], Any] | None = None,
    effect: bool = False,
    reconcile: Reconcile[Any, Any] | None = None,
    role: Role | None = None,
    place: str | None = None,
) -> Any:
    """Mark a function as a node with a contract.

    The function takes ``(state)`` or ``(state, ctx)`` and returns the output as a dict or a model, or a tuple
    ``(output, response)`` with the provider's response (see :func:`stroma.usage_from`), ``(output, tokens)``,
    ``(output, input_tokens, model)`` or ``(output, input_tokens, output_tokens, model)``.
    A plain ``def`` runs in its own daemon thread; a timeout abandons that thread, it cannot stop it.

    Args:
        node_id: id of the node, unique in its pipeline. Default: the name of the function; then
            ``@stroma_node`` needs no parentheses.
        contract: the whole contract, in place of the parameters below.
        input: model of the input. Default: that of the function's annotation.
        output: model of the output. Default: that of the annotation, or of the tuple that begins with one.
        upcast: see NodeContract.
        effect: see NodeContract.
        reconcile: see NodeContract.
        role: see NodeContract.
        place: see NodeContract.

    Raises TypeError if the contract is not one, or the function's annotations name other models or none.
    """
    models = input, output
    options = {"upcast": upcast, "effect": effect, "reconcile": reconcile, "role": role, "place": place}
    if node_id is not None and not isinstance(node_id, str):
        return mark_annotated(node_id, None, sys._getframe(1))
    if contract != "annotated" and any((*models, *options.values())):
        raise TypeError(f"node {node_id!r} has a contract and other parameters; pass them to NodeContract")
    if contract not in (None, "annotated") and not isinstance(contract, NodeContract):
        raise TypeError(
            f"the contract of node {node_id!r} must be a NodeContract, got {contract!r}; "
            "pass NodeContract(node_id=..., input_schema=..., output_schema=...)"
        )

    def decorate(func: Any) -> Any:
        if contract == "annotated":
            return mark_annotated(func, node_id, sys._getframe(1), models, **options)
        name = name_of(func) if node_id is None else node_id
        if contract is not None:
            check_annotations(f"node {name!r}", func, contract, sys._getframe(1))
        return mark(func, name, contract)

    return decorate


stroma_step = stroma_node


def framework_node(node_id: str, contract: NodeContract[In, Out]) -> NodeDecorator[In, Out, Any]:
    """Mark a function of an agent framework as a node with a contract, as :func:`stroma_node` does.

    Its annotations are not compared with the contract: the framework reads them, and calls it with its own
    state.
    """

    def decorate(func: Any) -> Any:
        return mark(func, node_id, contract)

    return decorate


def apart_in(nodes: Sequence[Node | Group]) -> tuple[tuple[int, str], ...]:
    """Return the places of map items whose outputs are not in the state: (position, start of branch)."""
    places: list[tuple[int, str]] = []
    for position, node in enumerate(nodes):
        if isinstance(node, Group):
            _find_apart(node, position, "", places)
    return tuple(places)


def _find_apart(group: Group, position: int, beginning: str, places: list[tuple[int, str]]) -> None:
    if group.is_map:
        if not group.output_field:
            places.append((position, beginning))
        return
    for index, child in enumerate(group.children):
        if isinstance(child, Group):
            _find_apart(child, position, f"{beginning}{index}.", places)
