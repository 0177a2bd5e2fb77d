"""Temporal as a dispatcher: it decides which worker drives a run, and replaces a lost worker.

:class:`TemporalRunner` submits runs, :func:`stroma_worker` drives them, on any number of machines. The runs
are in a store that all of them share. Importing this package needs ``temporalio``.
"""

from __future__ import annotations

from stroma._utils.distributions import missing

try:
    import temporalio  # noqa: F401
except ImportError as error:
    raise missing("temporalio", "stroma.temporal", "temporal") from error

from stroma.drivers.temporal.runner import TemporalRunner
from stroma.drivers.temporal.worker import StromaPlugin, register_search_attributes, stroma_worker

__all__ = ["StromaPlugin", "TemporalRunner", "register_search_attributes", "stroma_worker"]
