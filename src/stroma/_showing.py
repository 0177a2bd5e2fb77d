"""How a result and a trace show themselves: in a notebook, in a terminal, and as a file."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from stroma.page import Story, document, fragment

__all__ = ["Redact", "Shown"]

Redact = Callable[[dict[str, Any]], dict[str, Any]]


class Shown:
    """What can be told as a story of a run."""

    __slots__ = ()

    def _story(self, redact: Redact | None = None) -> Story:
        """All of it as plain data; ``redact`` is applied to each state."""
        raise NotImplementedError

    def to_html(self, path: str | os.PathLike[str] | None = None, *, redact: Redact | None = None) -> str:
        """One HTML file that stands by itself, to attach to a bug report: it loads nothing and runs nothing.

        ``path``: also written there, readable by its owner only. ``redact``: applied to each state; give the one of your
        RunConfig. Secrets of pydantic's types are masked all the same.
        """
        text = document(self._story(redact))
        if path is not None:
            with open(
                os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", encoding="utf-8"
            ) as file:
                file.write(text)
        return text

    def _repr_html_(self) -> str:
        return fragment(self._story())

    def __rich__(self) -> Any:
        from stroma._rich import renderable

        return renderable(self._story())
