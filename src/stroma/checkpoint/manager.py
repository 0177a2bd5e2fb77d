"""One way to talk to every store: sync or async, simple or journal."""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Awaitable, Callable
from typing import Any, Final

from pydantic import BaseModel

from stroma.checkpoint.errors import CorruptCheckpoint, StoreError
from stroma.checkpoint.protocols import AsyncCheckpointStore, CheckpointStore, RunRequest, Session
from stroma.checkpoint.sessions import SimpleSession

__all__ = ["CheckpointManager", "resolve_schema", "schema_ref"]


#: What nodes without a contract returned; its module is ours, and need not be loaded yet.
_UNTYPED: Final = "stroma.contracts.untyped:UntypedState"


def _no_store(given: object) -> str:
    """Describe an object that is not a store, without its text: a URL may hold a password."""
    if isinstance(given, type):
        return f"the class {given.__name__} was given as a store; make one of it: {given.__name__}(...)"
    mend = (
        "open_store(url)" if isinstance(given, (str, os.PathLike)) else "a store with save, load and delete"
    )
    return f"a {type(given).__name__} was given as a store; give {mend}"


async def _settle(value: Any) -> Any:
    return await value if inspect.isawaitable(value) else value


class CheckpointManager:
    """Saves and reads checkpoints through any store. Raises TypeError for what is none."""

    def __init__(self, store: CheckpointStore | AsyncCheckpointStore) -> None:
        # Now, and not when the first output is to be kept: that is paid for then.
        if isinstance(store, type) or not (hasattr(store, "save") or hasattr(store, "open_run")):
            raise TypeError(_no_store(store))
        self.store = store

    async def checkpoint(self, run_id: str, node_id: str, state: BaseModel) -> None:
        """Save the state of a node."""
        await _settle(self.store.save(run_id, node_id, state))

    async def resume(self, run_id: str, node_id: str, schema: type[BaseModel]) -> BaseModel | None:
        """The saved state of a node as a ``schema``, or None. Raises CorruptCheckpoint (a TypeError) for another class."""
        load_typed = getattr(self.store, "load_typed", None)
        if load_typed is not None:
            typed: BaseModel | None = await _settle(load_typed(run_id, node_id, schema))
            return typed
        state: BaseModel | None = await _settle(self.store.load(run_id, node_id))
        if state is not None and not isinstance(state, schema):
            raise CorruptCheckpoint(
                f"the checkpoint of node {node_id!r} in run {run_id!r} is a {type(state).__name__}, not a {schema.__name__}; "
                "restore the schema, or run the node again"
            )
        return state

    async def clear(self, run_id: str) -> None:
        """Delete everything kept of one run."""
        await _settle(self.store.delete(run_id))

    @property
    def keeps_journal(self) -> bool:
        """Return True if the store has a journal of runs and can resume them."""
        return hasattr(self.store, "open_run")

    def open_run(self, request: RunRequest) -> Session | Awaitable[Session]:
        """Begin or continue an execution. Raises StoreError if that needs a journal and the store keeps none."""
        # Not isinstance: a protocol takes microseconds to compare itself with a class.
        open_run: Callable[[RunRequest], Session | Awaitable[Session]] | None = getattr(
            self.store, "open_run", None
        )
        if open_run is not None:
            return open_run(request)
        if request.deliver:
            raise StoreError(
                f"{type(self.store).__name__} has no journal, so it cannot tell which hooks are due; use a journal store "
                'such as SQLiteStore, or hook_delivery="at_most_once"'
            )
        if request.if_exists in ("resume", "return") and request.discard_from is None:
            raise StoreError(
                f"{type(self.store).__name__} has no journal, so it cannot tell where run {request.run_id!r} stopped; "
                "use resume_from=, or a journal store such as SQLiteStore"
            )
        return SimpleSession(self.store, request.run_id)


def schema_ref(schema: type[BaseModel]) -> str:
    """ "module:qualname" of a schema."""
    return f"{schema.__module__}:{schema.__qualname__}"


def resolve_schema(ref: str) -> type[BaseModel]:
    """The class of a reference, looked up among *imported* modules: nothing is imported for it.

    Raises LookupError if there is none, TypeError("resolved schema is not a BaseModel").
    """
    if ref == _UNTYPED:
        from stroma.contracts.untyped import UntypedState

        return UntypedState
    module, _, qualname = ref.partition(":")
    if module not in sys.modules:
        raise LookupError(f"module {module!r} of schema {ref!r} is not imported; import it first")
    found: Any = sys.modules[module]
    for name in qualname.split("."):
        # Not getattr: a module or class may load code when it is asked for a name.
        names = getattr(found, "__dict__", {})
        if name not in names:
            raise LookupError(f"there is no {qualname!r} in module {module!r}")
        found = names[name]
    if not (isinstance(found, type) and issubclass(found, BaseModel)):
        raise TypeError("resolved schema is not a BaseModel")
    return found


_schema_ref = schema_ref
_resolve_schema = resolve_schema
