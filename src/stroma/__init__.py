"""Stroma: guarantees around the steps of an LLM or agent pipeline, and every step in sight.

Every public name can be imported from here; each is loaded when it is first asked for.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from stroma._utils.distributions import warn_of_other_distribution
from stroma._utils.lazy import lazy

if TYPE_CHECKING:
    from stroma.checkpoint import *
    from stroma.contracts import *
    from stroma.cost import *
    from stroma.engine import *
    from stroma.failures import *
    from stroma.hooks import *
    from stroma.limits import *
    from stroma.runner import *
    from stroma.trace import *

#: All names of these rooms are public, but for one that only modules have. Where two rooms have a name, the
#: later one is its home.
_ROOMS = ("runner", "trace", "failures", "contracts", "cost", "engine", "hooks", "limits")
_NOT_HERE = ("PolicyMap",)
_HOMES = {
    room: tuple(name for name in import_module(f"stroma.{room}").__all__ if name not in _NOT_HERE)
    for room in _ROOMS
}
_HOMES["checkpoint"] = (
    "AsyncCheckpointStore",
    "AsyncInMemoryStore",
    "CheckpointLost",
    "CheckpointManager",
    "CheckpointNotFound",
    "CheckpointStore",
    "CorruptCheckpoint",
    "Fenced",
    "InMemoryStore",
    "PipelineChanged",
    "PostgresStore",
    "RedisStore",
    "RequestRefused",
    "RunBusy",
    "RunExists",
    "SQLiteStore",
    "StoreError",
    "SyncRedisStore",
    "open_store",
)


warn_of_other_distribution(__file__)
__getattr__, __dir__ = lazy(__name__, _HOMES)
