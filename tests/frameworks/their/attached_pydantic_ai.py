"""A plugin of pytest: every run of an agent is one of a guard, for Pydantic AI's own tests."""

from __future__ import annotations

import functools
from typing import Any

from guards import new_guard
from pydantic_ai import Agent

from stroma.adapters.pydantic_ai import StromaCapability


def _install() -> None:
    bare = Agent.iter

    @functools.wraps(bare)
    def iter(self: Any, *args: Any, **kwargs: Any) -> Any:
        kwargs["capabilities"] = [*(kwargs.get("capabilities") or ()), StromaCapability(new_guard())]
        return bare(self, *args, **kwargs)

    Agent.iter = iter  # type: ignore[method-assign,assignment]


_install()
