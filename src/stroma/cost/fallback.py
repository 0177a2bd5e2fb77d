"""Model hints: the model that a node should use, and the point from which a cheaper one is due."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from stroma.cost.budget import CostTracker, ExecutionBudget


@dataclass
class ModelHint:
    """The model that a node prefers, for code that chooses models itself."""

    node_id: str
    preferred_model: str
    fallback_model: str | None = None
    max_tokens: int | None = None


@dataclass
class FallbackPolicy:
    """Use ``fallback_model`` for ``preferred_model`` once ``at_budget_pct`` of ``max_cost_usd`` is spent.

    Attributes:
        preferred_model: the model that the node declares.
        fallback_model: the cheaper model.
        at_budget_pct: share of ``max_cost_usd`` that must be spent, from 0 to 1. Raises ValueError for any
            other.
    """

    preferred_model: str
    fallback_model: str
    at_budget_pct: float = 0.80

    def __post_init__(self) -> None:
        if not 0 <= self.at_budget_pct <= 1:
            raise ValueError(f"at_budget_pct must be a share from 0 to 1, got {self.at_budget_pct!r}")


def resolve_model(
    declared_model: str | None, tracker: CostTracker, budget: ExecutionBudget, fallbacks: list[FallbackPolicy]
) -> str | None:
    """Return the fallback of the first rule for ``declared_model`` whose share is spent, else that model.

    Args:
        declared_model: the model to replace; None stays None.
        tracker: the cost of the run so far.
        budget: the budget with the limit; without ``max_cost_usd`` no model is replaced.
        fallbacks: the rules, in order.
    """
    if declared_model is None or budget.max_cost_usd is None:
        return declared_model
    for rule in fallbacks:
        if rule.preferred_model == declared_model and is_reached(rule, tracker, budget.max_cost_usd):
            return rule.fallback_model
    return declared_model


def is_reached(rule: FallbackPolicy, tracker: CostTracker, max_cost_usd: float) -> bool:
    """Return True if spending has reached the rule's share of the limit. A limit of 0 is always reached."""
    return tracker.used("cost") >= round(rule.at_budget_pct * max_cost_usd, 9)


def fallback_due(
    tracker: CostTracker, budget: ExecutionBudget, fallbacks: Sequence[FallbackPolicy]
) -> str | None:
    """Return the fallback of the highest threshold that is reached, following chains, or None."""
    if budget.max_cost_usd is None:
        return None
    due = [rule for rule in fallbacks if is_reached(rule, tracker, budget.max_cost_usd)]
    return max(due, key=lambda rule: rule.at_budget_pct).fallback_model if due else None


#: The key under which a fallback model is signalled in a node's ctx.
MODEL_KEY = "_stroma_model"


class FallbackView(dict[str, Any]):
    """The user's context dict with ``MODEL_KEY`` added. It reads and writes through; the key never does."""

    __slots__ = ("_base", "_signal")

    def __init__(self, base: dict[str, Any], model: str) -> None:
        self._base = base
        self._signal: dict[str, Any] = {MODEL_KEY: model}
        self._mirror()

    def _mirror(self) -> None:
        """Store the same items in the dict itself, for C code such as that of json.dumps."""
        super().clear()
        super().update(self.copy())

    def _part_with(self, key: object) -> dict[str, Any]:
        return self._signal if key == MODEL_KEY else self._base

    def copy(self) -> dict[str, Any]:
        return {**self._base, **self._signal}

    def __getitem__(self, key: str) -> Any:
        return self._part_with(key)[key]

    def __setitem__(self, key: str, value: Any) -> None:
        self._part_with(key)[key] = value
        self._mirror()

    def __delitem__(self, key: str) -> None:
        del self._part_with(key)[key]
        self._mirror()

    def __iter__(self) -> Iterator[str]:
        return iter(self.copy())

    def __len__(self) -> int:
        return len(self.copy())

    def __reversed__(self) -> Iterator[str]:
        return reversed(self.copy())

    def __repr__(self) -> str:
        return repr(self.copy())

    def __or__(self, other: Any) -> Any:
        return self.copy() | other

    def __ror__(self, other: Any) -> Any:
        return other | self.copy()

    def __ior__(self, other: Any) -> Any:
        self.update(other)
        return self

    def __reduce__(self) -> Any:  # A copy or a pickle is a plain dict, and writes nothing through.
        return (dict, (self.copy(),))

    def clear(self) -> None:
        self._base.clear()
        self._mirror()

    def popitem(self) -> tuple[str, Any]:
        item = self._base.popitem()
        self._mirror()
        return item

    if not TYPE_CHECKING:  # dict's own methods would read and write the mirror alone.
        __contains__ = Mapping.__contains__
        __eq__ = Mapping.__eq__
        get = Mapping.get
        keys = Mapping.keys
        values = Mapping.values
        items = Mapping.items
        pop = MutableMapping.pop
        setdefault = MutableMapping.setdefault
        update = MutableMapping.update
