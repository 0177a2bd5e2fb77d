"""The W3C trace context of a run."""

from __future__ import annotations

import re
from typing import Final

from stroma.engine.context import ReliabilityContext

__all__ = ["set_traceparent"]

# Any version but ff, with ids that are not all zeros; 00 has no more fields;
# https://www.w3.org/TR/trace-context/
_TRACEPARENT: Final = re.compile(
    r"(?!ff|00.{53}-)[0-9a-f]{2}-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}(-.*)?"
)


def set_traceparent(ctx: ReliabilityContext, traceparent: str) -> None:
    """Set the trace context of a run; an invalid one is logged and ignored, as it may come over the network."""
    if _TRACEPARENT.fullmatch(traceparent):
        ctx.traceparent = traceparent
    else:
        ctx.run_logger.warning("traceparent %r is not a W3C trace context and is ignored", traceparent[:200])
