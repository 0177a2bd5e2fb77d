"""Budgets of a run, the sums of what it has used, and the error for an exceeded limit."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal

from pydantic import Field, PrivateAttr

from stroma._utils.models import StrictModel
from stroma._utils.text import format_amount
from stroma.cost.usage import UsageError, check_usage

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


@dataclass
class NodeUsage:
    """The usage of a node. ``tokens_used``: input + output; ``cost_usd`` in dollars; ``latency_ms``: wall."""

    node_id: str
    tokens_used: int
    cost_usd: float
    latency_ms: int
    model: str | None = None
    output_tokens: int = 0


StepUsage = NodeUsage


@dataclass(eq=False, repr=False)
class CostTracker:
    """Running totals of a run, and the sums per node id."""

    #: The figures of the engine's attempts, for :meth:`add`. They stand in the trace already: nothing is kept
    #: twice.
    per_node: Callable[[], Iterable[tuple[str, int, int, float, int, str | None]]] = field(
        default=tuple, init=False
    )
    #: Sums of what was added here, without the engine's attempts, by node id: tokens, output tokens, USD, ns,
    #: model.
    added: dict[str, list[Any]] = field(default_factory=dict, init=False)

    _tokens = 0
    _cost = 0.0
    _cost_carry = 0.0  # What each float addition lost (Neumaier), so that a million cents stay exact.
    #: Wall time of attempts; the engine adds to it.
    latency_ns = 0
    # Spent by earlier processes on this execution: budgets remember it, this result's totals do not.
    prior_tokens = 0
    prior_cost_usd = 0.0
    prior_latency_ms = 0.0

    def record(self, usage: NodeUsage) -> None:
        """Add a usage. Raises UsageError for negative or non-finite figures, and records nothing then."""
        check_usage(usage.node_id, usage.tokens_used, usage.output_tokens)
        if (
            not math.isfinite(usage.cost_usd)
            or usage.cost_usd < 0
            or not math.isfinite(usage.latency_ms)
            or usage.latency_ms < 0
        ):
            raise UsageError(
                f"node {usage.node_id!r} reported cost_usd={usage.cost_usd!r}, "
                f"latency_ms={usage.latency_ms!r}; "
                "report finite figures, zero or more"
            )
        self.add(
            usage.node_id,
            usage.tokens_used,
            usage.output_tokens,
            usage.cost_usd,
            round(usage.latency_ms * 1e6),
            usage.model,
        )

    def add(
        self,
        node_id: str,
        tokens: int,
        output_tokens: int,
        cost_usd: float,
        latency_ns: int,
        model: str | None,
    ) -> None:
        """Add figures that were checked."""
        self.latency_ns += latency_ns
        self.spend(tokens, cost_usd)
        row = self.added.get(node_id)
        if row is None:
            self.added[node_id] = [tokens, output_tokens, cost_usd, latency_ns, model]
        else:
            row[0] += tokens
            row[1] += output_tokens
            row[2] += cost_usd
            row[3] += latency_ns
            row[4] = model or row[4]

    def spend(self, tokens: int, cost_usd: float) -> None:
        """Add to the totals alone; whoever calls it has the sums per node (see ``per_node``)."""
        self._tokens += tokens
        total = self._cost + cost_usd
        if self._cost >= cost_usd:
            self._cost_carry += (self._cost - total) + cost_usd
        else:
            self._cost_carry += (cost_usd - total) + self._cost
        self._cost = total

    @property
    def total_tokens(self) -> int:
        """Input and output tokens."""
        return self._tokens

    @property
    def total_cost_usd(self) -> float:
        """US dollars."""
        return self._cost + self._cost_carry

    @property
    def total_latency_ms(self) -> int:
        """Wall time of attempts in whole milliseconds, waits and hooks excluded."""
        return self.latency_ns // 1_000_000

    @property
    def latency_ms(self) -> float:
        """Return the unrounded wall time, including that of earlier processes."""
        return self.latency_ns / 1e6 + self.prior_latency_ms

    def used(self, dimension: Dimension) -> float:
        """Return the amount that counts against a limit, in its unit, including that of earlier processes."""
        if dimension == "tokens":
            return self._tokens + self.prior_tokens
        if dimension == "cost":
            # Nine decimals are far below any price; beyond them the sum is noise of the binary fractions.
            return round(self._cost + self._cost_carry + self.prior_cost_usd, 9)
        return self.latency_ms

    def check_budget(self, budget: ExecutionBudget, node_id: str) -> None:
        """Raise BudgetExceeded if a total stands above its limit."""
        exceeded = self.exceeded(budget, node_id)
        if exceeded is not None:
            raise exceeded

    def exceeded(self, budget: ExecutionBudget, node_id: str) -> BudgetExceeded | None:
        """Return the BudgetExceeded for the first limit that is crossed, or None."""
        tokens, cost, latency = budget.max_tokens_total, budget.max_cost_usd, budget.max_latency_ms
        if tokens is not None and self._tokens + self.prior_tokens > tokens:
            return budget_exceeded(budget, "tokens", self.used("tokens"), node_id)
        # A computed limit has that noise too.
        if cost is not None and (spent := self.used("cost")) > round(cost, 9):
            return budget_exceeded(budget, "cost", spent, node_id)
        if latency is not None and self.latency_ms > latency:
            return budget_exceeded(budget, "latency", self.latency_ms, node_id)
        return None

    def summary(self) -> dict[str, NodeUsage]:
        """Return the sums by node id, as new records."""
        sums = CostTracker()
        for node_id, row in self.added.items():
            sums.add(node_id, *row)
        for figures in self.per_node():
            sums.add(*figures)
        return {
            node_id: NodeUsage(node_id, row[0], row[2], row[3] // 1_000_000, row[4], row[1])
            for node_id, row in sums.added.items()
        }
