"""What a run spent, its budget, and model fallback. Money is in US dollars."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

from pydantic import ConfigDict, Field

from stroma._deferred import Deferred
from stroma.prices import KNOWN_MODELS, estimate_cost_usd
from stroma.usage import UsageError, check_usage

__all__ = [
    "KNOWN_MODELS",
    "BudgetExceeded",
    "CostTracker",
    "ExecutionBudget",
    "FallbackPolicy",
    "ModelHint",
    "NodeUsage",
    "StepUsage",
    "UsageError",
    "estimate_cost_usd",
    "resolve_model",
]

Dimension = Literal["tokens", "cost", "latency"]


class BudgetExceeded(Exception):
    """A run went over a limit.

    Attributes:
        dimension: "tokens", "cost" (USD) or "latency" (ms).
        limit, actual: both in the dimension's unit.
        node_id: the node whose attempt crossed the limit.

    Where: ``result.failure`` of a PARTIAL run; out of ``CostTracker.check_budget``.
    Cause: the run, failed attempts and earlier processes included, spent more than its ``ExecutionBudget``.
    Mend: raise the limit that the message names and run with ``resume=True``; what was paid for is kept.
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
            f"({self.dimension}) at node {self.node_id!r}; raise {name} to go on"
        )


_UNITS: Final[dict[str, tuple[str, str]]] = {
    "tokens": ("max_tokens_total", " tokens"),
    "cost": ("max_cost_usd", " USD"),
    "latency": ("max_latency_ms", " ms"),
}


#: Of limits in whole numbers: what floats can be compared with, and every clock takes.
LARGEST: Final = 10**30


class ExecutionBudget(Deferred):
    """Limits of one run; None means no limit. Exactly at a limit is within it; 0 means spend nothing.

    Raises pydantic's ValidationError for a limit that it does not know: one that is misspelt would be none.
    """

    model_config = ConfigDict(extra="forbid")

    max_tokens_total: int | None = Field(default=None, ge=0, le=LARGEST)
    max_cost_usd: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    max_latency_ms: int | None = Field(default=None, ge=0, le=LARGEST)

    @classmethod
    def unlimited(cls) -> ExecutionBudget:
        """A budget without any limit."""
        return cls()


@dataclass
class NodeUsage:
    """What a node used. ``tokens_used`` is input + output; ``cost_usd`` in dollars; ``latency_ms`` wall time."""

    node_id: str
    tokens_used: int
    cost_usd: float
    latency_ms: int
    model: str | None = None
    output_tokens: int = 0


StepUsage = NodeUsage


@dataclass
class ModelHint:
    """Which model a node would like, for code that chooses models by hand."""

    node_id: str
    preferred_model: str
    fallback_model: str | None = None
    max_tokens: int | None = None


@dataclass
class FallbackPolicy:
    """Use ``fallback_model`` for ``preferred_model`` once ``at_budget_pct`` (0 to 1) of ``max_cost_usd`` is spent."""

    preferred_model: str
    fallback_model: str
    at_budget_pct: float = 0.80


class CostTracker:
    """Running totals of a run, and the sums per node id."""

    __slots__ = (
        "_cost",
        "_cost_carry",
        "_nodes",
        "_tokens",
        "latency_ns",
        "per_node",
        "prior_cost_usd",
        "prior_latency_ms",
        "prior_tokens",
    )

    def __init__(self) -> None:
        #: The figures of the engine's attempts, for :meth:`add`. They stand in the trace already: nothing is kept twice.
        self.per_node: Callable[[], Iterable[tuple[str, int, int, float, int, str | None]]] = tuple
        # Per node id: tokens, output tokens, USD, ns, model. A plain list, since one is made for every node.
        self._nodes: dict[str, list[Any]] = {}
        self._tokens = 0
        self._cost = 0.0
        self._cost_carry = (
            0.0  # What each float addition lost (Neumaier), so that a million cents stay exact.
        )
        #: Wall time of attempts; the engine adds to it.
        self.latency_ns = 0
        # Spent by earlier processes on this execution: budgets remember it, this result's totals do not.
        self.prior_tokens = 0
        self.prior_cost_usd = 0.0
        self.prior_latency_ms = 0.0

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
                f"node {usage.node_id!r} reported cost_usd={usage.cost_usd!r}, latency_ms={usage.latency_ms!r}; "
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
        row = self._nodes.get(node_id)
        if row is None:
            self._nodes[node_id] = [tokens, output_tokens, cost_usd, latency_ns, model]
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
        """The same, not rounded, with what earlier processes spent."""
        return self.latency_ns / 1e6 + self.prior_latency_ms

    def used(self, dimension: Dimension) -> float:
        """What counts against a limit, in its unit, earlier processes included."""
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
        """The BudgetExceeded for the first limit that is crossed, or None."""
        # Asked twice for each node. Rounding adds less than the billionth that is looked at here, and is not always needed.
        tokens, cost, latency = budget.max_tokens_total, budget.max_cost_usd, budget.max_latency_ms
        if tokens is not None and self._tokens + self.prior_tokens > tokens:
            return BudgetExceeded("tokens", tokens, self.used("tokens"), node_id)
        if (
            cost is not None
            and self._cost + self._cost_carry + self.prior_cost_usd + 1e-9 > cost
            and (spent := self.used("cost")) > cost
        ):
            return BudgetExceeded("cost", cost, spent, node_id)
        if latency is not None and self.latency_ns / 1e6 + self.prior_latency_ms > latency:
            return BudgetExceeded("latency", latency, self.latency_ms, node_id)
        return None

    def summary(self) -> dict[str, NodeUsage]:
        """The sums by node id, as fresh records."""
        sums = CostTracker()
        for node_id, row in self._nodes.items():
            sums.add(node_id, row[0], row[1], row[2], row[3], row[4])
        for figures in self.per_node():
            sums.add(*figures)
        return {
            node_id: NodeUsage(node_id, row[0], row[2], row[3] // 1_000_000, row[4], row[1])
            for node_id, row in sums._nodes.items()
        }


def limits(budget: ExecutionBudget) -> tuple[tuple[Dimension, float], ...]:
    """The limits that are set, in the order in which they are checked."""
    found: list[tuple[Dimension, float]] = []
    if budget.max_tokens_total is not None:
        found.append(("tokens", budget.max_tokens_total))
    if budget.max_cost_usd is not None:
        found.append(("cost", budget.max_cost_usd))
    if budget.max_latency_ms is not None:
        found.append(("latency", budget.max_latency_ms))
    return tuple(found)


def resolve_model(
    declared_model: str | None, tracker: CostTracker, budget: ExecutionBudget, fallbacks: list[FallbackPolicy]
) -> str | None:
    """The fallback of the first rule for ``declared_model`` whose share of the cost limit is reached, else it."""
    if declared_model is None or budget.max_cost_usd is None:
        return declared_model
    for rule in fallbacks:
        if rule.preferred_model == declared_model and reached(rule, tracker, budget.max_cost_usd):
            return rule.fallback_model
    return declared_model


def reached(rule: FallbackPolicy, tracker: CostTracker, max_cost_usd: float) -> bool:
    """Whether the spending has reached the rule's share of the limit (a limit of 0 is reached at once)."""
    return tracker.used("cost") >= round(rule.at_budget_pct * max_cost_usd, 9)


def fallback_due(
    tracker: CostTracker, budget: ExecutionBudget, fallbacks: Sequence[FallbackPolicy]
) -> str | None:
    """The furthest fallback reached, following chains (a to b, b to c); None below every threshold."""
    if budget.max_cost_usd is None:
        return None
    due = [rule for rule in fallbacks if reached(rule, tracker, budget.max_cost_usd)]
    return max(due, key=lambda rule: rule.at_budget_pct).fallback_model if due else None
