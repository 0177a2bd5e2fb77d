"""Models whose validators are made when they are first asked for: a program that imports us may ask for none."""

from __future__ import annotations

import threading
from typing import Any

from pydantic import BaseModel, ConfigDict

__all__ = ["Deferred"]

_ONE_AT_A_TIME = threading.RLock()


class Deferred(BaseModel):
    """The base of our models."""

    model_config = ConfigDict(defer_build=True)

    @classmethod
    def model_rebuild(cls, **options: Any) -> bool | None:
        """As pydantic's; two threads that ask for the validators at once get the same ones."""
        with _ONE_AT_A_TIME:  # pydantic before 2.14 has no lock of its own.
            return super().model_rebuild(**options)
