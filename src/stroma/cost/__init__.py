"""Usage, prices and budgets."""

from typing import TYPE_CHECKING

from stroma._utils.lazy import lazy

if TYPE_CHECKING:
    from stroma.cost.budget import BudgetExceeded, CostTracker, ExecutionBudget, NodeUsage, StepUsage
    from stroma.cost.fallback import FallbackPolicy, ModelHint, resolve_model
    from stroma.cost.prices import KNOWN_MODELS, estimate_cost_usd, update_prices
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
    "cost.budget": ("BudgetExceeded", "CostTracker", "ExecutionBudget", "NodeUsage", "StepUsage"),
    "cost.fallback": ("FallbackPolicy", "ModelHint", "resolve_model"),
    "cost.prices": ("estimate_cost_usd", "KNOWN_MODELS", "update_prices"),
    "cost.usage": ("Usage", "usage_from", "UsageError"),
}

__getattr__, __dir__ = lazy(__name__, _HOMES, "stroma")
