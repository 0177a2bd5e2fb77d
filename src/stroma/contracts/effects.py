"""Statements on the outcome of an effect: a call that must not be made twice blindly."""

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
    """Statement that the outcome of a call of an effect is not known: the run waits for a person.

    ``reason``: shown to that person.
    """

    reason: str = ""
