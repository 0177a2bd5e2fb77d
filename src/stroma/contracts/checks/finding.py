"""Findings: reports on a pipeline that cannot work, or may not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from stroma.contracts.checks.types import Kind

__all__ = ["CheckFailed", "Finding", "Giver"]


@dataclass(frozen=True, slots=True)
class Giver:
    """A node or group that returned something. ``at``: its position, and its place in groups: "2", "2.0"."""

    node_id: str
    at: str


@dataclass(frozen=True, slots=True)
class Finding:
    """One place where what a node gives does not, or not always, satisfy what the next one takes.

    Attributes:
        severity: "error": it can never work. "warning": it may fail, or may not be what was meant.
        kind: a word for what is wrong; docs/checks.md has all of them.
        source, target: the ids of the node that gives and of the one that takes; "input" is what the run
            begins with.
        source_at, target_at: where they stand: the position, and the place in groups ("2", "2.0"); "step 0"
            of a step that a flow names.
        path: the field, as the target calls it: "address.street", "items[].price"; "" for the whole.
        source_type, target_type: both types in words; "" where there is none.
        message: what is wrong.
        fix: what to do about it.
    """

    severity: Literal["error", "warning"]
    kind: Kind
    source: str
    target: str
    source_at: str
    target_at: str
    path: str
    source_type: str
    target_type: str
    message: str
    fix: str

    @classmethod
    def between(
        cls,
        by: Giver,
        to: Giver,
        *,
        severity: Literal["error", "warning"] = "warning",
        kind: Kind,
        path: str = "",
        types: tuple[str, str] = ("", ""),
        message: str,
        fix: str,
    ) -> Finding:
        """Return the finding about what one node returns and another takes."""
        return cls(
            severity, kind, by.node_id, to.node_id, by.at, to.at, path, types[0], types[1], message, fix
        )

    def __str__(self) -> str:
        where = f"{self.source!r} -> {self.target!r}" + (f", {self.path}" if self.path else "")
        return f"{self.severity} ({self.kind}): {where}: {self.message}; {self.fix}"


class CheckFailed(ValueError):
    """The nodes of a pipeline cannot work one after the other, by their contracts.

    Attributes:
        findings: all errors, each a Finding with its fix.

    Where: out of ``run()`` with ``RunConfig(check=True)``, before the store is opened and anything is called.
    Cause: a node's output lacks a field that the next node needs, or returns it as a type that the next node
    never accepts.
    Fix: do what each finding says; ``runner.check(nodes)`` and ``stroma check`` give the same list, with the
    warnings.
    """

    def __init__(self, findings: Sequence[Finding]) -> None:
        super().__init__(tuple(findings))
        self.findings = tuple(findings)

    def __str__(self) -> str:
        count = len(self.findings)
        head = "1 thing in this pipeline" if count == 1 else f"{count} things in this pipeline"
        return "\n".join([f"{head} can never work:", *(f"  {finding}" for finding in self.findings)])
