"""Looking at objects of classes that are not imported: a provider's exception, its response."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def safe_get(owner: Any, name: str) -> Any:
    """Return a key of a mapping or an attribute of another object; None if it cannot be read."""
    try:
        return owner.get(name) if isinstance(owner, Mapping) else getattr(owner, name, None)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException:
        return None
