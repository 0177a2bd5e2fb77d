"""Model hints: which model a node should use, and when a cheaper one is due."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from stroma.cost.budget import ExecutionBudget
from stroma.cost.tracker import CostTracker

__all__ = ["MODEL_KEY", "FallbackPolicy", "ModelHint", "SignalView", "resolve_model"]


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


#: The key under which a fallback model is signalled in a node's ctx.
MODEL_KEY = "_stroma_model"


class SignalView(dict[str, Any]):
    """The user's context dict with one key added: reads and writes go through, the added key never lands there."""

    __slots__ = ("_base", "_signal")

    def __init__(self, base: dict[str, Any], model: str) -> None:
        # The same again in the dict itself, for what reads dicts from C and never calls a method: json.dumps, say.
        super().__init__(base)
        super().__setitem__(MODEL_KEY, model)
        self._base = base
        self._signal = {MODEL_KEY: model}

    def __reduce__(self) -> Any:  # A copy or a pickle is a plain dict: nothing can write through from there.
        return (dict, (self._merged(),))

    def __reversed__(self) -> Any:
        return reversed(self._merged())

    def _mirror(self) -> None:
        super().clear()
        super().update(self._merged())

    def _of(self, key: Any) -> dict[str, Any]:
        return self._signal if key == MODEL_KEY else self._base

    def __getitem__(self, key: str) -> Any:
        return self._of(key)[key]

    def __setitem__(self, key: str, value: Any) -> None:
        self._of(key)[key] = value
        self._mirror()

    def __delitem__(self, key: str) -> None:
        del self._of(key)[key]
        self._mirror()

    def __contains__(self, key: object) -> bool:
        return key in self._of(key)

    def _merged(self) -> dict[str, Any]:
        return {**self._base, **self._signal}

    def __iter__(self) -> Any:
        return iter(self._merged())

    def __len__(self) -> int:
        return len(self._merged())

    def __bool__(self) -> bool:
        return True

    def __repr__(self) -> str:
        return repr(self._merged())

    def __eq__(self, other: object) -> bool:
        return self._merged() == other

    __hash__ = None

    def get(self, key: str, default: Any = None) -> Any:
        return self._of(key).get(key, default)

    def keys(self) -> Any:
        return self._merged().keys()

    def values(self) -> Any:
        return self._merged().values()

    def items(self) -> Any:
        return self._merged().items()

    def copy(self) -> dict[str, Any]:
        return self._merged()

    def pop(self, key: str, *default: Any) -> Any:
        value = self._of(key).pop(key, *default)
        self._mirror()
        return value

    def setdefault(self, key: str, default: Any = None) -> Any:
        value = self._of(key).setdefault(key, default)
        self._mirror()
        return value

    def update(self, *args: Any, **kwargs: Any) -> None:
        for key, value in dict(*args, **kwargs).items():
            self[key] = value

    def clear(self) -> None:
        self._base.clear()
        self._mirror()

    def popitem(self) -> tuple[str, Any]:
        item = self._base.popitem()
        self._mirror()
        return item

    def __or__(self, other: Any) -> Any:
        return self._merged() | other

    def __ror__(self, other: Any) -> Any:
        return other | self._merged()

    def __ior__(self, other: Any) -> Any:
        self.update(other)
        return self
