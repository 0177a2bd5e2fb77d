"""Time limits of nodes."""

from __future__ import annotations

from typing import Self

from pydantic import ConfigDict, Field, model_validator

from stroma._utils.models import StrictModel
from stroma.cost.budget import LARGEST

__all__ = ["NodeTimeout", "limits_ms"]


class NodeTimeout(StrictModel):
    """The time limits of a node, or of a group, for an entry of ``node_timeouts``; at least one of them.

    Attributes:
        total_ms: limit in milliseconds of the function as a whole; a plain number is the same.
        idle_ms: limit in milliseconds of the time without an event. Each ``current_node().emit(...)`` renews
            it; that of a group is renewed by every node inside.
    """

    model_config = ConfigDict(frozen=True)

    total_ms: int | None = Field(default=None, gt=0, le=LARGEST)
    idle_ms: int | None = Field(default=None, gt=0, le=LARGEST)

    @model_validator(mode="after")
    def _has_a_limit(self) -> Self:
        if self.total_ms is None and self.idle_ms is None:
            raise ValueError("NodeTimeout has no limit; pass total_ms or idle_ms")
        return self


def limits_ms(limit: int | NodeTimeout | None) -> tuple[int | None, int | None]:
    """Return the total and idle limit in milliseconds of an entry of ``node_timeouts``, or None."""
    return (limit.total_ms, limit.idle_ms) if isinstance(limit, NodeTimeout) else (limit, None)
