"""Failure classes, retry policies, errors, and how an exception becomes a failure."""

from typing import TYPE_CHECKING

from stroma._utils.lazy import lazy

if TYPE_CHECKING:
    from stroma.contracts.contract import ContractViolation as ContractViolation
    from stroma.cost.budget import BudgetExceeded as BudgetExceeded
    from stroma.failures.classes import FailureClass as FailureClass
    from stroma.failures.errors import CircuitOpen as CircuitOpen
    from stroma.failures.errors import ItemFailure as ItemFailure
    from stroma.failures.errors import LimitError as LimitError
    from stroma.failures.errors import PlaceError as PlaceError
    from stroma.failures.errors import RunFailed as RunFailed
    from stroma.failures.errors import SharedBudgetExceeded as SharedBudgetExceeded
    from stroma.failures.errors import Suspend as Suspend
    from stroma.failures.errors import WaitedTooLong as WaitedTooLong
    from stroma.failures.errors import WorkerLost as WorkerLost
    from stroma.failures.failure import Classifier as Classifier
    from stroma.failures.failure import Failure as Failure
    from stroma.failures.failure import NodeContext as NodeContext
    from stroma.failures.failure import StepContext as StepContext
    from stroma.failures.failure import classify as classify
    from stroma.failures.policy import FailurePolicy as FailurePolicy
    from stroma.failures.policy import PolicyMap as PolicyMap
    from stroma.failures.policy import RetryBudget as RetryBudget
    from stroma.failures.policy import default_policy_map as default_policy_map

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
