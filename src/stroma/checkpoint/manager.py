"""One interface to all stores: sync or async, simple or journal."""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Awaitable, Callable
from typing import Any, Final, NamedTuple, Protocol, runtime_checkable

from pydantic import BaseModel

from stroma.checkpoint.entries import RunRequest
from stroma.checkpoint.errors import CorruptCheckpoint, StoreError
from stroma.checkpoint.sessions import Session, SimpleSession
from stroma.contracts.schema import schema_of


@runtime_checkable
class CheckpointStore(Protocol):
    """Store of the last state of each node of each run."""

    def save(self, run_id: str, node_id: str, state: BaseModel) -> None: ...
    def load(self, run_id: str, node_id: str) -> BaseModel | None: ...
    def delete(self, run_id: str) -> None: ...


@runtime_checkable
class AsyncCheckpointStore(Protocol):
    """Store of the last state of each node of each run, with async calls."""

    async def save(self, run_id: str, node_id: str, state: BaseModel) -> None: ...
    async def load(self, run_id: str, node_id: str) -> BaseModel | None: ...
    async def delete(self, run_id: str) -> None: ...


class CheckpointKey(NamedTuple):
    """Key of a checkpoint."""

    run_id: str
    node_id: str


@runtime_checkable
class JournalStore(Protocol):
    """Store of runs. Awaitable results are awaited."""

    def open_run(self, request: RunRequest) -> Session | Awaitable[Session]: ...


#: What nodes without a contract returned; its module is ours, and need not be loaded yet.
_UNTYPED: Final = "stroma.contracts.untyped:UntypedState"


def _not_a_store(value: object) -> TypeError:
    """Return the error for an object that is not a store, without its text: a URL may contain a password."""
    if isinstance(value, type):
        return TypeError(
            f"store must be an instance, got the class {value.__name__}; pass {value.__name__}(...)"
        )
    if isinstance(value, (str, os.PathLike)):
        return TypeError(f"store must be a store, got {type(value).__name__}; pass open_store(url)")
    return TypeError(f"store must have save, load and delete, got {type(value).__name__}")


async def _await_if_needed(value: Any) -> Any:
    return await value if inspect.isawaitable(value) else value


class CheckpointManager:
    """Saves and loads checkpoints through any store. Raises TypeError for any other object."""

    def __init__(self, store: CheckpointStore | AsyncCheckpointStore) -> None:
        # Checked here, and not when the first output is saved, which has been paid for then.
        if isinstance(store, type) or not (hasattr(store, "save") or hasattr(store, "open_run")):
            raise _not_a_store(store)
        self.store = store

    async def checkpoint(self, run_id: str, node_id: str, state: BaseModel) -> None:
        """Save the state of a node."""
        await _await_if_needed(self.store.save(run_id, node_id, state))

    async def resume(self, run_id: str, node_id: str, schema: type[BaseModel]) -> BaseModel | None:
        """Return the saved state of a node as a ``schema``, or None.

        Raises CorruptCheckpoint (a TypeError) for a state of another class.
        """
        load_typed = getattr(self.store, "load_typed", None)
        if load_typed is not None:
            typed: BaseModel | None = await _await_if_needed(load_typed(run_id, node_id, schema))
            return typed
        state: BaseModel | None = await _await_if_needed(self.store.load(run_id, node_id))
        if state is not None and not isinstance(state, schema):
            raise CorruptCheckpoint(
                f"the checkpoint of node {node_id!r} in run {run_id!r} is a {type(state).__name__}, not a "
                f"{schema.__name__}; restore the schema, or run the node again"
            )
        return state

    async def clear(self, run_id: str) -> None:
        """Delete all data of one run."""
        await _await_if_needed(self.store.delete(run_id))

    def open_run(self, request: RunRequest) -> Session | Awaitable[Session]:
        """Begin or continue an execution. Raises StoreError if that needs a journal."""
        # Not isinstance(), which takes microseconds for a protocol.
        open_run: Callable[[RunRequest], Session | Awaitable[Session]] | None = getattr(
            self.store, "open_run", None
        )
        if open_run is not None:
            return open_run(request)
        if request.deliver:
            raise StoreError(
                f"{type(self.store).__name__} has no journal, so it has no record of pending hooks; use a "
                'journal store such as SQLiteStore, or hook_delivery="at_most_once"'
            )
        if request.if_exists in ("resume", "return") and request.discard_from is None:
            raise StoreError(
                f"{type(self.store).__name__} has no journal, so it has no record of where run "
                f"{request.run_id!r} stopped; use resume_from=, or a journal store such as SQLiteStore"
            )
        return SimpleSession(self.store, request.run_id, request.version)


def schema_ref(schema: type[BaseModel]) -> str:
    """Return "module:qualname" of a schema."""
    return f"{schema.__module__}:{schema.__qualname__}"


def resolve_schema(ref: str) -> type[BaseModel]:
    """Return the class of a reference. Only imported modules are searched; nothing is imported.

    Raises LookupError if it does not exist, TypeError("resolved schema is not a BaseModel").
    """
    if ref == _UNTYPED:
        from stroma.contracts.untyped import UntypedState

        return UntypedState
    module, _, qualname = ref.partition(":")
    if module not in sys.modules:
        raise LookupError(f"module {module!r} of schema {ref!r} is not imported; import it first")
    schema: Any = sys.modules[module]
    for name in qualname.split("."):
        # Not getattr(), which may run code of a module or class.
        names = getattr(schema, "__dict__", {})
        if name not in names:
            raise LookupError(f"module {module!r} has no {qualname!r}")
        schema = names[name]
    if not (isinstance(schema, type) and issubclass(schema, BaseModel)):
        raise TypeError("resolved schema is not a BaseModel")
    return schema


def coerce(state: BaseModel, schema: type[BaseModel]) -> BaseModel:
    """Return a state as an instance of a schema. Raises TypeError, ValidationError."""
    if not (isinstance(schema, type) and issubclass(schema, BaseModel)):
        raise TypeError("schema must be a BaseModel type")
    return schema_of(schema).convert(state)


_schema_ref = schema_ref
_resolve_schema = resolve_schema
