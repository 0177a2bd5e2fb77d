"""What a node without a contract returns. Loaded by the first that runs: pydantic's root models are not loaded for less."""

from __future__ import annotations

from typing import Any

from pydantic import RootModel

__all__ = ["Kept"]


class Kept(RootModel[Any]):
    """The output of a node without a contract, as it was returned."""
