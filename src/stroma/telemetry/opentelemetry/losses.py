"""Losses of processors, readers and exporters of the OpenTelemetry SDK."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from stroma.telemetry.losses import LossCounter, Losses

__all__ = ["watch_providers"]


def watch_providers(losses: Losses, providers: Iterable[Any]) -> None:
    """Count what the providers drop; processors and readers that were added since the last call, too."""
    for provider in providers:
        spans = getattr(getattr(provider, "_active_span_processor", None), "_span_processors", ())
        for processor in spans:
            losses.watch(getattr(processor, "span_exporter", None), "export", "spans", _results)
            batch = getattr(processor, "_batch_processor", None)
            losses.watch(getattr(batch, "_metrics", None), "drop_items", "spans", _overflows)
        for reader in getattr(provider, "_metric_readers", ()):
            losses.watch(getattr(reader, "_exporter", None), "export", "metrics", _results)


def _results(counter: LossCounter, export: Callable[..., Any]) -> Callable[..., Any]:
    """Return an export() that counts what it fails to send."""

    def counted(batch: Any, *arguments: Any, **options: Any) -> Any:
        size = len(batch) if isinstance(batch, (list, tuple)) else 1
        try:
            result = export(batch, *arguments, **options)
        except Exception as error:
            counter.add(size, type(error).__name__)
            raise
        if getattr(result, "name", "") == "FAILURE":
            counter.add(size, "the exporter failed")
        return result

    return counted


def _overflows(counter: LossCounter, drop: Callable[..., Any]) -> Callable[..., Any]:
    """Return a drop_items() that counts what found the queue full."""

    def counted(count: int, *arguments: Any, **options: Any) -> Any:
        counter.add(count, "the queue is full")
        return drop(count, *arguments, **options)

    return counted
