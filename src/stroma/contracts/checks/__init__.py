"""The static checker: pipelines that cannot work, or may not, reported before anything runs."""

from stroma.contracts.checks.check import check_nodes
from stroma.contracts.checks.types import CheckFailed, Finding

__all__ = ["CheckFailed", "Finding", "check_nodes"]
