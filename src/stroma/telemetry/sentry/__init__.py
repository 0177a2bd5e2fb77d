"""Sentry: one issue per final failure, at the span of the node that failed; spans for runs and nodes."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

from stroma._utils.distributions import missing
from stroma.telemetry.content import DENY_KEYS, Content, ContentMode
from stroma.telemetry.observer import ExporterHooks

if TYPE_CHECKING:
    from sentry_sdk.client import BaseClient

__all__ = ["sentry_hooks"]


def sentry_hooks(
    *,
    client: BaseClient | None = None,
    content: ContentMode = "none",
    deny_keys: Collection[str] = DENY_KEYS,
    max_bytes: int = 4096,
) -> ExporterHooks:
    """Create hooks that capture the failure that ended a run, once, and emit a span for each run and node.

    An attempt that is tried again is a breadcrumb. Issues are grouped by pipeline, node, failure class and
    type of the exception; an event points at the span of the failed node. Each run and each node has an
    isolation scope of its own, so that what one tags is not found in its neighbours. Spans are transactions,
    or with the SDK's ``trace_lifecycle="stream"`` streamed.

    Args:
        client: where to send to; the one of ``sentry_sdk.init()`` if none is given.
        content: see :class:`stroma.telemetry.content.Content`. In "none" events carry no messages; in no mode
            do they carry variables of stack frames.
        deny_keys: names of fields whose values are never sent.
        max_bytes: of one state or message.

    Raises ImportError with the line that installs the extra.
    """
    try:
        import sentry_sdk  # noqa: F401
    except ImportError as error:
        raise missing("sentry-sdk", "sentry_hooks", "sentry") from error
    from stroma.telemetry.sentry.exporter import Sentry

    return Sentry(client, Content.make(content, deny_keys, max_bytes)).hooks()
