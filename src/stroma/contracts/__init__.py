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
    "BoundaryValidator": "contracts.contract",
    "CheckFailed": "contracts.checks.types",
    "ContractRegistry": "contracts.contract",
    "ContractViolation": "contracts.contract",
    "Finding": "contracts.checks.types",
    "NodeContract": "contracts.contract",
    "NotDone": "contracts.contract",
    "NotSerialisable": "contracts.tagged_json",
    "StepContract": "contracts.contract",
    "StepViolation": "contracts.contract",
    "Unknown": "contracts.contract",
    "stroma_node": "contracts.node",
    "stroma_step": "contracts.node",
}

__getattr__, __dir__ = lazy(__name__, _HOMES, "stroma")
