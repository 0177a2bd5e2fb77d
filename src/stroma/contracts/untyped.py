"""The output of nodes without a contract. Imported on demand: root models of pydantic load slowly."""

from __future__ import annotations

from typing import Any

from pydantic import RootModel


class UntypedState(RootModel[Any]):
    """The output of a node without a contract, as it was returned."""
