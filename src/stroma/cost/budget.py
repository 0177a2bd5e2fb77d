"""Budgets of a run and the error for an exceeded one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, Literal

from pydantic import Field, PrivateAttr

from stroma._utils.models import StrictModel
from stroma._utils.text import format_amount

Dimension = Literal["tokens", "cost", "latency"]


class BudgetExceeded(Exception):
    """A run went over a limit.

    Attributes:
        dimension: "tokens", "cost" (USD) or "latency" (ms).
        limit, actual: both in the dimension's unit.
        node_id: the node whose attempt crossed the limit.
        is_set_for_run: True if ``set_budget`` or a command set the limit for this run, so that it replaces
            the config's.

    Where: ``result.failure`` of a PARTIAL run; out of ``CostTracker.check_budget``.
    Cause: the run, failed attempts and earlier processes included, spent more than its ``ExecutionBudget``.
    Fix: raise the limit that the message names and run with ``resume=True``; paid outputs are stored.
    """

    def __init__(
        self, dimension: Dimension, limit: float, actual: float, node_id: str, is_set_for_run: bool = False
    ) -> None:
        super().__init__(dimension, limit, actual, node_id)
        self.dimension = dimension
        self.limit = limit
        self.actual = actual
        self.node_id = node_id
        self.is_set_for_run = is_set_for_run

    def __str__(self) -> str:
        name, unit, parameter = _UNITS[self.dimension]
        way = f"raise {name}"
        if self.is_set_for_run:
            option = parameter.replace("_", "-")
            way = (
                f"the limit was set for this run: raise it with set_budget({parameter}=...) or "
                f"`stroma budget RUN --{option}`"
            )
        return (
            f"budget exceeded: {name} limit {format_amount(self.limit, unit)}, used "
            f"{format_amount(self.actual, unit)} "
            f"({self.dimension}) at node {self.node_id!r}; {way}, then resume the run"
        )


#: By dimension: the field of ExecutionBudget, the unit, and the parameter of ``set_budget``.
_UNITS: Final[dict[str, tuple[str, str, str]]] = {
    "tokens": ("max_tokens_total", "tokens", "tokens"),
    "cost": ("max_cost_usd", "USD", "cost_usd"),
    "latency": ("max_latency_ms", "ms", "latency_ms"),
}


#: Of limits in whole numbers: what floats can be compared with, and every clock takes.
LARGEST: Final = 10**30


class ExecutionBudget(StrictModel):
    """Limits of one run; None means no limit. Exactly at a limit is within it; 0 means spend nothing.

    Attributes:
        max_tokens_total: tokens of all attempts, input and output.
        max_cost_usd: cost of all attempts in US dollars.
        max_latency_ms: time that the attempts take, in milliseconds.

    Raises pydantic's ValidationError for an unknown limit, which may be misspelt.
    """

    max_tokens_total: int | None = Field(default=None, ge=0, le=LARGEST)
    max_cost_usd: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    max_latency_ms: int | None = Field(default=None, ge=0, le=LARGEST)
    _set_for_run: frozenset[str] = PrivateAttr(default=frozenset())

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


def replace_limits(budget: ExecutionBudget, requested: Mapping[str, float]) -> ExecutionBudget:
    """Return a budget with the limits that were requested for one run, by field of ExecutionBudget."""
    replaced = budget.model_copy(update=dict(requested))
    replaced._set_for_run = budget._set_for_run | requested.keys()
    return replaced


def budget_exceeded(
    budget: ExecutionBudget, dimension: Dimension, actual: float, node_id: str
) -> BudgetExceeded:
    """Return the error for a limit of a budget that is crossed."""
    limit = getattr(budget, _UNITS[dimension][0])
    return BudgetExceeded(dimension, limit, actual, node_id, is_set_for_run(budget, dimension))


def is_set_for_run(budget: ExecutionBudget, dimension: Dimension) -> bool:
    """Return True if a limit was requested for one run, and does not come from its config."""
    return _UNITS[dimension][0] in budget._set_for_run
