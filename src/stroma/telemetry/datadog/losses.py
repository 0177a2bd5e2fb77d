"""Losses of the tracer's writer and of a client of DogStatsD."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from stroma.telemetry.losses import LossCounter, Losses

__all__ = ["watch_client", "watch_writer"]


def watch_writer(losses: Losses, tracer: Any) -> None:
    """Count the traces that the writer of a tracer drops."""
    writer = getattr(getattr(tracer, "_span_aggregator", None), "writer", None)
    tries = "_send_payload_with_backoff"  # Of the writer that tries again, else the other one's.
    send = tries if hasattr(writer, tries) else "_send_payload"
    losses.watch(writer, send, "traces", _sent)
    losses.watch(writer, "_metrics_dist", "traces", _dropped)


def watch_client(losses: Losses, statsd: Any) -> None:
    """Count the packets that a client of DogStatsD drops."""
    losses.watch(statsd, "_xmit_packet", "packets of metrics", _transmitted)
    losses.watch(statsd, "_account_dropped_queue_full", "packets of metrics", _overflows)


def _sent(counter: LossCounter, send: Callable[..., Any]) -> Callable[..., Any]:
    """Return a sender of payloads that counts those that the agent refuses."""

    def counted(payload: Any, count: int, *arguments: Any, **options: Any) -> Any:
        try:
            response = send(payload, count, *arguments, **options)
        except Exception as error:
            counter.add(count, type(error).__name__)
            raise
        status = getattr(response, "status", 200)
        if isinstance(status, int) and status >= 400:
            counter.add(count, f"status {status}")
        return response

    return counted


def _dropped(counter: LossCounter, distribution: Callable[..., Any]) -> Callable[..., Any]:
    """Return a recorder of the writer's own measures that counts traces which do not fit into its buffer."""

    def counted(name: str, count: int = 1, *arguments: Any, **options: Any) -> Any:
        if name in ("buffer.dropped.traces", "encoder.dropped.traces"):
            counter.add(count, name)
        return distribution(name, count, *arguments, **options)

    return counted


def _transmitted(counter: LossCounter, transmit: Callable[..., Any]) -> Callable[..., Any]:
    """Return a sender of packets that counts those it cannot send."""

    def counted(*arguments: Any, **options: Any) -> Any:
        sent = transmit(*arguments, **options)
        if sent is False:
            counter.add(1, "the agent cannot be reached")
        return sent

    return counted


def _overflows(counter: LossCounter, drop: Callable[..., Any]) -> Callable[..., Any]:
    """Return a method that counts the packets that found the queue full."""

    def counted(*arguments: Any, **options: Any) -> Any:
        counter.add(1, "the queue is full")
        return drop(*arguments, **options)

    return counted
