"""Contracts: the pydantic models that a node's input and output must satisfy; statements on effects."""

from __future__ import annotations

import inspect
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator, Mapping
from dataclasses import dataclass
from functools import partial
from types import CoroutineType
from typing import TYPE_CHECKING, Any, Final, Generic, Literal, NamedTuple, TypeAlias, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError, field_validator, model_validator

from stroma._utils.access import error_text
from stroma._utils.models import StrictModel
from stroma.contracts.schema import schema_of


@dataclass(frozen=True, slots=True)
class NotDone:
    """Statement that a call of an effect did not happen and no longer can: the effect may be called again.

    ``reason``: for the log.
    """

    reason: str = ""


@dataclass(frozen=True, slots=True)
class Unknown:
    """Statement that the outcome of a call of an effect is not known: the run waits for a person.

    ``reason``: shown to that person. ``retry_seconds``: the run is due again after so long, and a worker
    asks ``reconcile`` again. Raises ValueError for a time that is not above 0.
    """

    reason: str = ""
    retry_seconds: float | None = None

    def __post_init__(self) -> None:
        if self.retry_seconds is not None and not 0 < self.retry_seconds < float("inf"):
            raise ValueError(f"retry_seconds must be above 0, got {self.retry_seconds!r}")


In = TypeVar("In", bound=BaseModel)
Out = TypeVar("Out", bound=BaseModel)
Direction = Literal["input", "output"]
#: What traces show a node as; None shows it as a step of the pipeline.
Role = Literal["agent", "tool", "chain", "retriever"]

#: States, for the input and the idempotency key of an effect, if its last call happened: its output, or a
#: statement.
Reconcile: TypeAlias = Callable[
    [In, str],
    "Out | Mapping[str, Any] | NotDone | Unknown | Awaitable[Out | Mapping[str, Any] | NotDone | Unknown]",
]

_SHOWN_ERRORS = 5


def check_id(value: str, what: str) -> str:
    """Return a legal run or node id unchanged; any text is one, but for what no store can keep.

    Raises ValueError for the empty string, a NUL and lone surrogates.
    """
    if not isinstance(value, str):
        raise ValueError(f"{what} must be a string, not {type(value).__name__}")
    if not value:
        raise ValueError(f"{what} must not be empty")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:
            raise ValueError(
                f"{what} {value!r} must be valid Unicode text, but contains a lone surrogate"
            ) from None
    if "\0" in value:
        raise ValueError(f"{what} {value!r} must not contain NUL characters")
    return value


class NodeContract(StrictModel, Generic[In, Out]):
    """The contract of a node: the models of its input and its output.

    Attributes:
        node_id: id of the node, unique in its pipeline.
        input_schema: pydantic model of the input.
        output_schema: pydantic model of the output.
        upcast: function that converts an output of an earlier ``output_schema`` (a dict of its fields) into
            one that the present schema accepts. A resume calls it when the schemas differ.
        effect: the node changes something outside, and a second call would do harm. A call with an unknown
            outcome is not repeated; ``reconcile`` or a person decides.
        reconcile: function, async or not, of the state and the idempotency key. It returns the output of the
            call, NotDone() or Unknown(). Without it, or if it returns Unknown() or raises, the run is
            SUSPENDED with reason "effect" until a person decides.
        role: "agent", "tool", "retriever" or "chain", as which traces show the node.
        place: Temporal task queue whose workers call the function, such as "gpu"; None: the process that
            drives the run. Experimental. See ``docs/temporal.md``.
    """

    model_config = ConfigDict(arbitrary_types_allowed=True)

    node_id: str
    input_schema: type[In]
    output_schema: type[Out]
    upcast: Callable[[Any], Any] | None = None
    effect: bool = False
    reconcile: Callable[[Any, str], Any] | None = None
    role: Role | None = None
    place: str | None = None

    if TYPE_CHECKING:
        # pydantic's mypy plugin would take the classes as Any, and the node's types would go unchecked.
        def __init__(
            self,
            *,
            node_id: str,
            input_schema: type[In],
            output_schema: type[Out],
            upcast: Callable[[Any], Any] | None = None,
            effect: bool = False,
            reconcile: Reconcile[In, Out] | None = None,
            role: Role | None = None,
            place: str | None = None,
        ) -> None: ...

    @field_validator("node_id")
    @classmethod
    def _legal_id(cls, value: str) -> str:
        return check_id(value, "node id")

    @field_validator("place")
    @classmethod
    def _legal_place(cls, value: str | None) -> str | None:
        return None if value is None else check_id(value, "place")

    @model_validator(mode="after")
    def _only_effects_reconcile(self) -> Any:
        if self.reconcile is not None and not self.effect:
            raise ValueError(
                f"node {self.node_id!r} has reconcile= but is not an effect; pass effect=True, "
                "or remove reconcile="
            )
        if self.reconcile is not None and not _takes_two(self.reconcile):
            raise ValueError(
                f"reconcile of node {self.node_id!r} must take the state and the idempotency key, got "
                f"{inspect.signature(self.reconcile)}; define it as (state, idempotency_key)"
            )
        return self


def _takes_two(func: Callable[..., Any]) -> bool:
    try:
        inspect.signature(func).bind(None, "")
    except TypeError:
        return False
    except ValueError:  # A builtin has no signature.
        pass
    return True


class ContractViolation(Exception):
    """A value did not satisfy its contract.

    Attributes:
        node_id: the node at whose boundary it happened.
        direction: "input" or "output".
        raw: the offending value as a dict.
        errors: pydantic's error dicts (``type``, ``loc``, ``msg``, ``input``).
        schema: the model that it should have been; None if that is not known.

    Where: ``result.failure`` of a FAILED run; out of ``BoundaryValidator`` and
    ``ContractRegistry.validate_*``.
    Cause: the input of a node, or what it returned, is not what its schema says.
    Fix: correct the node or the schema at the fields that are named. ``contract_retries`` grants further
    attempts; in them, send ``current_node().last_failure.as_prompt()`` to the model.
    """

    schema: type[BaseModel] | None = None

    def __init__(self, node_id: str, direction: Direction, raw: dict[str, Any], errors: list[Any]) -> None:
        super().__init__(node_id, direction, raw, errors)
        self.node_id = node_id
        self.direction: Direction = direction
        self.raw = raw
        self.errors = errors

    def __str__(self) -> str:
        shown = [_describe(error) for error in self.errors[:_SHOWN_ERRORS]]
        rest = len(self.errors) - len(shown)
        text = "; ".join(shown) + (f"; ... and {rest} more" if rest > 0 else "")
        return f"Contract violation for {self.node_id!r} ({self.direction}): {text}"

    def __repr__(self) -> str:
        # Without the raw value, which may hold what no log should have.
        return f"{type(self).__name__}({str(self)!r})"

    def __reduce__(self) -> Any:
        # Without the class: one that was made in a function cannot be pickled, nor what refers to it.
        attributes = {name: value for name, value in self.__dict__.items() if name != "schema"}
        return type(self), self.args, attributes

    def as_prompt(self, *, max_chars: int = 2000) -> str:
        """Return the errors as a text for the model that produced the output, of at most ``max_chars``.

        For each field it has the error, the received value and the expected type, in a compact form of the
        schema. Secrets of the schema (``SecretStr``) are masked.
        """
        from stroma.contracts.repair_prompt import repair_prompt

        return repair_prompt(self.direction, self.errors, self.raw, self.schema, max_chars)


def _describe(error: Any) -> str:
    if not isinstance(error, dict):
        return str(error)
    path = ".".join(str(part) for part in error.get("loc", ()))
    message = str(error.get("msg", "invalid"))
    if isinstance(error.get("input"), (str, bytes)):
        from stroma.contracts.repair_prompt import describe_text

        message = describe_text(error) or message
    return f"{path}: {message}" if path else message


def as_violation(
    node_id: str, direction: Direction, raw: Any, error: BaseException, schema: type[BaseModel] | None = None
) -> ContractViolation:
    """Return the ContractViolation for an exception that a validator raised."""
    if isinstance(error, ValidationError):
        errors: list[Any] = list(error.errors(include_url=False))
    else:  # A validator may raise anything at all.
        errors = [{"type": type(error).__name__, "loc": (), "msg": error_text(error), "input": raw}]
    shown = raw if issubclass(type(raw), dict) else {"value": raw}  # Its __class__ is code of its own.
    violation = ContractViolation(node_id, direction, shown, errors)
    violation.__cause__ = error
    violation.schema = schema
    return violation


#: What a node may return.
RETURN_SHAPES: Final = (
    "return the output, (output, response), (output, tokens), (output, input_tokens, model) or "
    "(output, input_tokens, output_tokens, model)"
)


def output_violation(
    node_id: str, output: Any, error: BaseException, schema: type[BaseModel]
) -> ContractViolation:
    """Return the violation for an output; it names what can only be a mistake in the function."""
    why = _mistake_in(output)
    if why is None:
        return as_violation(node_id, "output", output, error, schema)
    kind = type(output)
    if kind is CoroutineType:
        output.close()  # Else Python warns of it once more, wherever it is freed.
    shown = output if output is None or kind is tuple else f"<{kind.__name__}>"
    violation = ContractViolation(
        node_id, "output", {"value": shown}, [{"type": "returned", "loc": (), "msg": why, "input": shown}]
    )
    violation.__cause__ = error
    violation.schema = schema
    return violation


def _mistake_in(output: Any) -> str | None:
    """Return what is wrong with a value that no node returns on purpose; None for any other."""
    kind = type(output)
    if output is None:
        return "the function returned None; return the output"
    if issubclass(kind, (AsyncGenerator, Generator)):
        which = "an async generator" if issubclass(kind, AsyncGenerator) else "a generator"
        return f"the function returned {which}; return the output in place of yielding it"
    if issubclass(kind, Awaitable):
        which = "a coroutine" if kind is CoroutineType else f"an awaitable {kind.__name__}"
        return f"the function returned {which}; did you forget await?"
    if issubclass(kind, BaseException):
        return f"the function returned the exception {kind.__name__}; raise it"
    if kind is tuple and len(output) not in (2, 3, 4):
        return f"the function returned a tuple of {len(output)}; {RETURN_SHAPES}"
    return None


class BoundaryValidator:
    """Validates one raw value against one side of a contract."""

    def __call__(
        self, contract: NodeContract[Any, Any], direction: Direction, raw: dict[str, Any]
    ) -> BaseModel:
        """Return the validated model; raises ContractViolation."""
        schema = contract.input_schema if direction == "input" else contract.output_schema
        try:
            return schema_of(schema).validate(raw)
        except Exception as error:
            raise as_violation(contract.node_id, direction, raw, error, schema) from error


class Decorated(NamedTuple):
    """The contract that a decorator registered last for a node id, and the function that got it.

    Attributes:
        owner: the function for messages, with its file and line where it has them.
        place: module, file and qualified name of the function.
    """

    contract: NodeContract[Any, Any]
    owner: str
    place: tuple[str, str, str]

    @classmethod
    def of(cls, func: Any, contract: NodeContract[Any, Any]) -> Decorated:
        """Return the record of a function that a decorator is applied to."""
        plain = func
        while isinstance(plain, partial):
            plain = plain.func
        named = plain if hasattr(plain, "__qualname__") else type(plain)
        code = getattr(plain, "__code__", None)
        module, name = str(named.__module__), named.__qualname__
        if code is None:
            return cls(contract, f"{module}.{name}", (module, "", name))
        file = code.co_filename
        return cls(contract, f"{name} ({file}:{code.co_firstlineno})", (module, file, name))

    def is_redefined_by(self, other: Decorated) -> bool:
        """Return True for the same definition again: in a notebook, by a reload, or as ``__main__``."""
        module, file, name = self.place
        return name == other.place[2] and (module == other.place[0] or file == other.place[1] != "")


class ContractRegistry:
    """The contracts of a runner, by node id."""

    def __init__(self) -> None:
        self._contracts: dict[str, NodeContract[Any, Any]] = {}
        #: What ``runner.node`` gave ids to.
        self.decorated: dict[str, Decorated] = {}
        #: Ids of steps without a contract: tools and nodes of agent frameworks.
        self.step_ids: set[str] = set()
        self._validator = BoundaryValidator()

    def register(self, contract: NodeContract[Any, Any]) -> None:
        """Add a contract, replacing the one that its node id had."""
        self._contracts[contract.node_id] = contract

    def decorate(self, func: Any, contract: NodeContract[Any, Any]) -> None:
        """Register the contract of a function that a decorator makes a node.

        The same function, defined again, replaces the earlier one. Raises ValueError if the id belongs to
        another function.
        """
        node_id, latest = contract.node_id, Decorated.of(func, contract)
        earlier = self.decorated.get(node_id)
        if earlier is not None and not earlier.is_redefined_by(latest):
            raise ValueError(
                f"node id {node_id!r} belongs to {earlier.owner}, and {latest.owner} cannot have it too; "
                "rename one of them"
            )
        self.decorated[node_id] = latest
        self.register(contract)

    @property
    def ids(self) -> set[str]:
        """Return the node ids that have a contract."""
        return set(self._contracts)

    @property
    def known_ids(self) -> set[str]:
        """Return the ids of all nodes and steps that were registered, with a contract or without."""
        return self._contracts.keys() | self.step_ids

    def get(self, node_id: str) -> NodeContract[Any, Any]:
        """Return the contract of a node. Raises KeyError."""
        try:
            return self._contracts[node_id]
        except KeyError:
            raise KeyError(
                f"no contract is registered for node {node_id!r}; register one, or decorate the node"
            ) from None

    def find(self, node_id: str) -> NodeContract[Any, Any] | None:
        """Return the contract of a node, or None."""
        return self._contracts.get(node_id)

    def validate_input(self, node_id: str, raw: dict[str, Any]) -> BaseModel:
        """Validate a raw input; raises KeyError or ContractViolation."""
        return self._validator(self.get(node_id), "input", raw)

    def validate_output(self, node_id: str, raw: dict[str, Any]) -> BaseModel:
        """Validate a raw output; raises KeyError or ContractViolation."""
        return self._validator(self.get(node_id), "output", raw)


StepContract = NodeContract
StepViolation = ContractViolation
