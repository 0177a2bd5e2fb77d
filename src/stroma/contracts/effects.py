"""Statements on the outcome of an effect: a call that changes the world, and must not be made twice blindly."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["NotDone", "Unknown"]


@dataclass(frozen=True, slots=True)
class NotDone:
    """Statement that a call of an effect did not happen and no longer can: the effect may be called again.

    ``reason``: for the log.
    """

    reason: str = ""


@dataclass(frozen=True, slots=True)
class Unknown:
    """Statement that the outcome of a call of an effect is not known yet: the run is suspended until a person decides.

    ``reason``: shown to that person.
    """

    reason: str = ""
