"""Shared limits: budgets, rate limits, circuit breakers."""

from typing import TYPE_CHECKING

from stroma._utils.lazy import lazy

if TYPE_CHECKING:
    from stroma.limits.breaker import Breaker as Breaker
    from stroma.limits.rate_limit import Limit as Limit
    from stroma.limits.shared_budget import BudgetState as BudgetState
    from stroma.limits.shared_budget import SharedBudget as SharedBudget

_HOMES = {
    "limits.breaker": ("Breaker",),
    "limits.rate_limit": ("Limit",),
    "limits.shared_budget": ("BudgetState", "SharedBudget"),
}

__getattr__, __dir__ = lazy(__name__, _HOMES, "stroma")
