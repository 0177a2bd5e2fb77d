"""What can never work in a pipeline, or may not, said before anything runs."""

from stroma.contracts.checks.check import check_nodes
from stroma.contracts.checks.finding import CheckFailed, Finding

__all__ = ["CheckFailed", "Finding", "check_nodes"]
