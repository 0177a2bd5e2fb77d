"""Shared limits: budgets, rate limits, circuit breakers."""

from typing import TYPE_CHECKING

from stroma._utils.lazy import lazy

if TYPE_CHECKING:
    from stroma.limits.breaker import Breaker
    from stroma.limits.rate_limit import Limit
    from stroma.limits.shared_budget import BudgetState, SharedBudget

__all__ = ["Breaker", "BudgetState", "Limit", "SharedBudget"]

_HOMES = {
    "Breaker": "limits.breaker",
    "BudgetState": "limits.shared_budget",
    "Limit": "limits.rate_limit",
    "SharedBudget": "limits.shared_budget",
}

__getattr__, __dir__ = lazy(__name__, _HOMES, "stroma")
