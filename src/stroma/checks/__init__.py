"""What can never work in a pipeline, or may not, said before anything runs."""

from stroma.checks._check import check_nodes
from stroma.checks._finding import CheckFailed, Finding

__all__ = ["CheckFailed", "Finding", "check_nodes"]
