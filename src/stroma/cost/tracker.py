"""Sums of what a run has used."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from stroma.cost.budget import BudgetExceeded, Dimension, ExecutionBudget, budget_exceeded
from stroma.cost.usage import UsageError, check_usage


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
        #: The figures of the engine's attempts, for :meth:`add`. They stand in the trace already: nothing is
        #: kept twice.
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
        row = self._nodes.get(node_id)
        if row is None:
            self._nodes[node_id] = [tokens, output_tokens, cost_usd, latency_ns, model]
        else:
            row[0] += tokens
            row[1] += output_tokens
            row[2] += cost_usd
            row[3] += latency_ns
            row[4] = model or row[4]

    def _added(self) -> list[tuple[str, int, int, float, int, str | None]]:
        """Return the sums by node id that were added here, without those of the engine's attempts."""
        return [(node_id, *row) for node_id, row in self._nodes.items()]

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
        # Asked twice for each node. Rounding adds less than the billionth that is looked at here, and is not
        # always needed.
        tokens, cost, latency = budget.max_tokens_total, budget.max_cost_usd, budget.max_latency_ms
        if tokens is not None and self._tokens + self.prior_tokens > tokens:
            return budget_exceeded(budget, "tokens", self.used("tokens"), node_id)
        if (
            cost is not None
            and self._cost + self._cost_carry + self.prior_cost_usd + 1e-9 > cost
            and (spent := self.used("cost")) > cost
        ):
            return budget_exceeded(budget, "cost", spent, node_id)
        if latency is not None and self.latency_ns / 1e6 + self.prior_latency_ms > latency:
            return budget_exceeded(budget, "latency", self.latency_ms, node_id)
        return None

    def summary(self) -> dict[str, NodeUsage]:
        """Return the sums by node id, as new records."""
        sums = CostTracker()
        for figures in (*self._added(), *self.per_node()):
            sums.add(*figures)
        return {
            node_id: NodeUsage(node_id, row[0], row[2], row[3] // 1_000_000, row[4], row[1])
            for node_id, row in sums._nodes.items()
        }
