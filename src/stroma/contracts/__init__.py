"""Contracts: schemas, validation at each boundary, snapshots of states, the static checker."""

from typing import TYPE_CHECKING

from stroma._utils.lazy import lazy

if TYPE_CHECKING:
    from stroma.contracts.checks.types import CheckFailed, Finding
    from stroma.contracts.contract import (
        BoundaryValidator,
        ContractRegistry,
        ContractViolation,
        NodeContract,
        NotDone,
        StepContract,
        StepViolation,
        Unknown,
    )
    from stroma.contracts.node import stroma_node, stroma_step
    from stroma.contracts.tagged_json import NotSerialisable

__all__ = [
    "BoundaryValidator",
    "CheckFailed",
    "ContractRegistry",
    "ContractViolation",
    "Finding",
    "NodeContract",
    "NotDone",
    "NotSerialisable",
    "StepContract",
    "StepViolation",
    "Unknown",
    "stroma_node",
    "stroma_step",
]

_HOMES = {
    "contracts.checks.types": ("CheckFailed", "Finding"),
    "contracts.contract": (
        "BoundaryValidator",
        "ContractRegistry",
        "ContractViolation",
        "NodeContract",
        "NotDone",
        "StepContract",
        "StepViolation",
        "Unknown",
    ),
    "contracts.node": ("stroma_node", "stroma_step"),
    "contracts.tagged_json": ("NotSerialisable",),
}

__getattr__, __dir__ = lazy(__name__, _HOMES, "stroma")
