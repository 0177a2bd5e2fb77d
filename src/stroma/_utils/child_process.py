"""Commands of ours in processes of their own."""

from __future__ import annotations

import os
import sys
from typing import Final

#: Environment variables that admit to a process of ours, which its children have no use for.
_TOKENS: Final = ("STROMA_UI_TOKEN",)


def child_command(*words: str) -> list[str]:
    """Return the words that run `stroma` in this Python, without modules from the current directory."""
    return [sys.executable, "-P", "-m", "stroma", *words]


def child_environment(**more: str) -> dict[str, str]:
    """Return the environment for a child: that of this process without tokens, and ``more``."""
    return {name: value for name, value in os.environ.items() if name not in _TOKENS} | more
