"""Fingerprints of model classes: short hashes that change when a contract does."""

from __future__ import annotations

import hashlib
import json
import warnings
from typing import Any

from pydantic import BaseModel

__all__ = ["fingerprint_of"]


def fingerprint_of(model: type[BaseModel]) -> str:
    """Return 16 hexadecimal digits that change when the fields, their types or their constraints change."""
    try:
        with (
            warnings.catch_warnings()
        ):  # pydantic warns of defaults that JSON cannot represent; a contract has none.
            warnings.simplefilter("ignore")
            shape = model.model_json_schema(by_alias=False)
        _drop_annotations(shape)
    except Exception:  # Not every type has a JSON schema.
        shape = {name: str(info.annotation) for name, info in model.model_fields.items()}
    return hashlib.sha256(json.dumps(shape, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _drop_annotations(shape: Any) -> None:
    """Drop titles, descriptions and examples: renaming a class or editing a description changes no contract."""
    if isinstance(shape, dict):
        for key in ("title", "description", "examples"):
            if not isinstance(shape.get(key), dict):  # A field may have this name.
                shape.pop(key, None)
        for value in shape.values():
            _drop_annotations(value)
    elif isinstance(shape, list):
        for value in shape:
            _drop_annotations(value)
