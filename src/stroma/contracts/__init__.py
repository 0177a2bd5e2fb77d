"""Contracts: schemas, validation at each boundary, snapshots of states, the static checker."""

from typing import TYPE_CHECKING

from stroma._utils.lazy import lazy

if TYPE_CHECKING:
    from stroma.contracts.checks.types import CheckFailed as CheckFailed
    from stroma.contracts.checks.types import Finding as Finding
    from stroma.contracts.contract import BoundaryValidator as BoundaryValidator
    from stroma.contracts.contract import ContractRegistry as ContractRegistry
    from stroma.contracts.contract import ContractViolation as ContractViolation
    from stroma.contracts.contract import NodeContract as NodeContract
    from stroma.contracts.contract import NotDone as NotDone
    from stroma.contracts.contract import StepContract as StepContract
    from stroma.contracts.contract import StepViolation as StepViolation
    from stroma.contracts.contract import Unknown as Unknown
    from stroma.contracts.node import stroma_node as stroma_node
    from stroma.contracts.node import stroma_step as stroma_step
    from stroma.contracts.tagged_json import NotSerialisable as NotSerialisable

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
