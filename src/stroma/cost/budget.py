"""Budgets of a run and the error for an exceeded one."""

from __future__ import annotations

from typing import Final, Literal

from pydantic import ConfigDict, Field

from stroma._utils.models import LazyModel

__all__ = ["BudgetExceeded", "ExecutionBudget"]


Dimension = Literal["tokens", "cost", "latency"]


class BudgetExceeded(Exception):
    """A run went over a limit.

    Attributes:
        dimension: "tokens", "cost" (USD) or "latency" (ms).
        limit, actual: both in the dimension's unit.
        node_id: the node whose attempt crossed the limit.

    Where: ``result.failure`` of a PARTIAL run; out of ``CostTracker.check_budget``.
    Cause: the run, failed attempts and earlier processes included, spent more than its ``ExecutionBudget``.
    Fix: raise the limit that the message names and run with ``resume=True``; paid outputs are stored.
    """

    def __init__(self, dimension: Dimension, limit: float, actual: float, node_id: str) -> None:
        super().__init__(dimension, limit, actual, node_id)
        self.dimension = dimension
        self.limit = limit
        self.actual = actual
        self.node_id = node_id

    def __str__(self) -> str:
        name, unit = _UNITS[self.dimension]
        return (
            f"budget exceeded: {name} limit {self.limit:.12g}{unit}, used {self.actual:.12g}{unit} "
            f"({self.dimension}) at node {self.node_id!r}; raise {name}, then resume the run"
        )


_UNITS: Final[dict[str, tuple[str, str]]] = {
    "tokens": ("max_tokens_total", " tokens"),
    "cost": ("max_cost_usd", " USD"),
    "latency": ("max_latency_ms", " ms"),
}


#: Of limits in whole numbers: what floats can be compared with, and every clock takes.
LARGEST: Final = 10**30


class ExecutionBudget(LazyModel):
    """Limits of one run; None means no limit. Exactly at a limit is within it; 0 means spend nothing.

    Attributes:
        max_tokens_total: tokens of all attempts, input and output.
        max_cost_usd: cost of all attempts in US dollars.
        max_latency_ms: time that the attempts take, in milliseconds.

    Raises pydantic's ValidationError for a limit that it does not know: one that is misspelt would be none.
    """

    model_config = ConfigDict(extra="forbid")

    max_tokens_total: int | None = Field(default=None, ge=0, le=LARGEST)
    max_cost_usd: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    max_latency_ms: int | None = Field(default=None, ge=0, le=LARGEST)

    @classmethod
    def unlimited(cls) -> ExecutionBudget:
        """Return a budget without any limit."""
        return cls.model_construct()  # no validator: building the first one loads every plugin of pydantic


def limits(budget: ExecutionBudget) -> tuple[tuple[Dimension, float], ...]:
    """Return the limits that are set, in the order in which they are checked."""
    limits: list[tuple[Dimension, float]] = []
    if budget.max_tokens_total is not None:
        limits.append(("tokens", budget.max_tokens_total))
    if budget.max_cost_usd is not None:
        limits.append(("cost", budget.max_cost_usd))
    if budget.max_latency_ms is not None:
        limits.append(("latency", budget.max_latency_ms))
    return tuple(limits)
