"""Failure classes, retry policies, errors, and how an exception becomes a failure."""

from typing import TYPE_CHECKING

from stroma._utils.lazy import lazy

if TYPE_CHECKING:
    from stroma.contracts.contract import ContractViolation
    from stroma.cost.budget import BudgetExceeded
    from stroma.failures.classes import FailureClass
    from stroma.failures.errors import (
        CircuitOpen,
        ItemFailure,
        LimitError,
        PlaceError,
        RunFailed,
        SharedBudgetExceeded,
        Suspend,
        WaitedTooLong,
        WorkerLost,
    )
    from stroma.failures.failure import Classifier, Failure, NodeContext, StepContext, classify
    from stroma.failures.policy import FailurePolicy, PolicyMap, RetryBudget, default_policy_map

__all__ = [
    "BudgetExceeded",
    "CircuitOpen",
    "Classifier",
    "ContractViolation",
    "Failure",
    "FailureClass",
    "FailurePolicy",
    "ItemFailure",
    "LimitError",
    "NodeContext",
    "PlaceError",
    "PolicyMap",
    "RetryBudget",
    "RunFailed",
    "SharedBudgetExceeded",
    "StepContext",
    "Suspend",
    "WaitedTooLong",
    "WorkerLost",
    "classify",
    "default_policy_map",
]

_HOMES = {
    "contracts.contract": ("ContractViolation",),
    "cost.budget": ("BudgetExceeded",),
    "failures.classes": ("FailureClass",),
    "failures.errors": (
        "CircuitOpen",
        "ItemFailure",
        "LimitError",
        "PlaceError",
        "RunFailed",
        "SharedBudgetExceeded",
        "Suspend",
        "WaitedTooLong",
        "WorkerLost",
    ),
    "failures.failure": ("Classifier", "classify", "Failure", "NodeContext", "StepContext"),
    "failures.policy": ("default_policy_map", "FailurePolicy", "PolicyMap", "RetryBudget"),
}

__getattr__, __dir__ = lazy(__name__, _HOMES, "stroma")
