"""The guard that the plugins attach."""

from stroma import FailureClass, FailurePolicy, StromaRunner
from stroma.adapters import Guard

NEVER = {each: FailurePolicy(max_retries=0, backoff_seconds=0) for each in FailureClass}


def new_guard() -> Guard:
    """Return a guard that retries nothing."""
    return Guard(StromaRunner.quick(policy_map=NEVER))
