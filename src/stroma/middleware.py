"""Published path of the plain steps; they are in :mod:`stroma.runner.steps`."""

from stroma.engine.context import ReliabilityContext as ReliabilityContext
from stroma.runner.steps import StromaStep as StromaStep
from stroma.runner.steps import execute_step as execute_step

__all__ = ["ReliabilityContext", "StromaStep", "execute_step"]
