"""One small change of the source."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Mutant:
    """One change of one file.

    Attributes:
        key: names it for as long as its function is not edited.
        file: below ``src/stroma``.
        function: dotted, without the module; empty at the top level.
        first, last: the lines that are changed, 1-based.
        begin, end: the lines of the function, or of the statement at the top level.
        old, new: the changed lines, before and after.
    """

    key: str
    file: str
    function: str
    first: int
    last: int
    begin: int
    end: int
    old: str
    new: str

    def source(self, text: str) -> str:
        """The whole file with the change in it."""
        lines = text.splitlines(keepends=True)
        return "".join([*lines[: self.first - 1], self.new, *lines[self.last :]])

    def shown(self) -> str:
        """The change, as lines of a diff."""
        minus = [f"- {line.strip()}" for line in self.old.splitlines()]
        plus = [f"+ {line.strip()}" for line in self.new.splitlines()]
        return "\n".join([*minus, *plus])
