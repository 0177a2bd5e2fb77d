"""Usage, prices and budgets."""

from typing import TYPE_CHECKING

from stroma._utils.lazy import lazy

if TYPE_CHECKING:
    from stroma.cost.budget import BudgetExceeded, ExecutionBudget
    from stroma.cost.fallback import FallbackPolicy, ModelHint, resolve_model
    from stroma.cost.prices import KNOWN_MODELS, estimate_cost_usd, update_prices
    from stroma.cost.tracker import CostTracker, NodeUsage, StepUsage
    from stroma.cost.usage import Usage, UsageError, usage_from

__all__ = [
    "KNOWN_MODELS",
    "BudgetExceeded",
    "CostTracker",
    "ExecutionBudget",
    "FallbackPolicy",
    "ModelHint",
    "NodeUsage",
    "StepUsage",
    "Usage",
    "UsageError",
    "estimate_cost_usd",
    "resolve_model",
    "update_prices",
    "usage_from",
]

_HOMES = {
    "BudgetExceeded": "cost.budget",
    "CostTracker": "cost.tracker",
    "ExecutionBudget": "cost.budget",
    "FallbackPolicy": "cost.fallback",
    "KNOWN_MODELS": "cost.prices",
    "ModelHint": "cost.fallback",
    "NodeUsage": "cost.tracker",
    "StepUsage": "cost.tracker",
    "Usage": "cost.usage",
    "UsageError": "cost.usage",
    "estimate_cost_usd": "cost.prices",
    "resolve_model": "cost.fallback",
    "update_prices": "cost.prices",
    "usage_from": "cost.usage",
}

__getattr__, __dir__ = lazy(__name__, _HOMES, "stroma")
