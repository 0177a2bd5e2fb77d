"""Driver for Temporal clusters: a pipeline for StromaRunner runs there unchanged.

``TemporalRunner`` begins runs and waits for them; :func:`stroma_worker` is what does the work, on any number of machines.
Importing this package needs ``temporalio``.
"""

from __future__ import annotations

try:
    import temporalio  # noqa: F401
except ImportError as error:
    raise ImportError(
        "temporalio is required for stroma.temporal; install it with: pip install 'stroma-runner[temporal]'"
    ) from error

from stroma.drivers.remote.plans import MissingNode
from stroma.drivers.temporal.plugin import StromaPlugin, register_search_attributes, stroma_worker
from stroma.drivers.temporal.runner import TemporalRunner
from stroma.drivers.temporal.stream import TemporalStream
from stroma.failures.errors import RemoteFailure

__all__ = [
    "MissingNode",
    "RemoteFailure",
    "StromaPlugin",
    "TemporalRunner",
    "TemporalStream",
    "register_search_attributes",
    "stroma_worker",
]
