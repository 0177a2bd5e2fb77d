"""Documented path of the Temporal dispatcher; it is in :mod:`stroma.drivers.temporal`."""

from stroma.drivers.temporal import StromaPlugin, TemporalRunner, register_search_attributes, stroma_worker

__all__ = ["StromaPlugin", "TemporalRunner", "register_search_attributes", "stroma_worker"]
