"""Documented path of the Temporal driver; it is in :mod:`stroma.drivers.temporal`."""

from stroma.drivers.temporal import (
    MissingNode,
    RemoteFailure,
    StromaPlugin,
    TemporalRunner,
    TemporalStream,
    register_search_attributes,
    stroma_worker,
)

__all__ = [
    "MissingNode",
    "RemoteFailure",
    "StromaPlugin",
    "TemporalRunner",
    "TemporalStream",
    "register_search_attributes",
    "stroma_worker",
]
