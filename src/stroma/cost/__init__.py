"""Usage, prices and budgets."""

from typing import TYPE_CHECKING

from stroma._utils.lazy import lazy

if TYPE_CHECKING:
    from stroma.cost.budget import BudgetExceeded as BudgetExceeded
    from stroma.cost.budget import CostTracker as CostTracker
    from stroma.cost.budget import ExecutionBudget as ExecutionBudget
    from stroma.cost.budget import NodeUsage as NodeUsage
    from stroma.cost.budget import StepUsage as StepUsage
    from stroma.cost.fallback import FallbackPolicy as FallbackPolicy
    from stroma.cost.fallback import ModelHint as ModelHint
    from stroma.cost.fallback import resolve_model as resolve_model
    from stroma.cost.prices import KNOWN_MODELS as KNOWN_MODELS
    from stroma.cost.prices import estimate_cost_usd as estimate_cost_usd
    from stroma.cost.prices import update_prices as update_prices
    from stroma.cost.usage import Usage as Usage
    from stroma.cost.usage import UsageError as UsageError
    from stroma.cost.usage import usage_from as usage_from

_HOMES = {
    "cost.budget": ("BudgetExceeded", "CostTracker", "ExecutionBudget", "NodeUsage", "StepUsage"),
    "cost.fallback": ("FallbackPolicy", "ModelHint", "resolve_model"),
    "cost.prices": ("estimate_cost_usd", "KNOWN_MODELS", "update_prices"),
    "cost.usage": ("Usage", "usage_from", "UsageError"),
}

__getattr__, __dir__ = lazy(__name__, _HOMES, "stroma")
