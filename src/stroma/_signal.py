"""The view of a context dict that names a fallback model."""

from __future__ import annotations

from typing import Any

__all__ = ["MODEL_KEY", "SignalView"]

#: The key under which a fallback model is signalled in a node's ctx.
MODEL_KEY = "_stroma_model"


class SignalView(dict[str, Any]):
    """The user's context dict with one key added: reads and writes go through, the added key never lands there."""

    __slots__ = ("_base", "_signal")

    def __init__(self, base: dict[str, Any], model: str) -> None:
        # The same again in the dict itself, for what reads dicts from C and never calls a method: json.dumps, say.
        super().__init__(base)
        super().__setitem__(MODEL_KEY, model)
        self._base = base
        self._signal = {MODEL_KEY: model}

    def __reduce__(self) -> Any:  # A copy or a pickle is a plain dict: nothing can write through from there.
        return (dict, (self._merged(),))

    def __reversed__(self) -> Any:
        return reversed(self._merged())

    def _mirror(self) -> None:
        super().clear()
        super().update(self._merged())

    def _of(self, key: Any) -> dict[str, Any]:
        return self._signal if key == MODEL_KEY else self._base

    def __getitem__(self, key: str) -> Any:
        return self._of(key)[key]

    def __setitem__(self, key: str, value: Any) -> None:
        self._of(key)[key] = value
        self._mirror()

    def __delitem__(self, key: str) -> None:
        del self._of(key)[key]
        self._mirror()

    def __contains__(self, key: object) -> bool:
        return key in self._of(key)

    def _merged(self) -> dict[str, Any]:
        return {**self._base, **self._signal}

    def __iter__(self) -> Any:
        return iter(self._merged())

    def __len__(self) -> int:
        return len(self._merged())

    def __bool__(self) -> bool:
        return True

    def __repr__(self) -> str:
        return repr(self._merged())

    def __eq__(self, other: object) -> bool:
        return self._merged() == other

    __hash__ = None

    def get(self, key: str, default: Any = None) -> Any:
        return self._of(key).get(key, default)

    def keys(self) -> Any:
        return self._merged().keys()

    def values(self) -> Any:
        return self._merged().values()

    def items(self) -> Any:
        return self._merged().items()

    def copy(self) -> dict[str, Any]:
        return self._merged()

    def pop(self, key: str, *default: Any) -> Any:
        value = self._of(key).pop(key, *default)
        self._mirror()
        return value

    def setdefault(self, key: str, default: Any = None) -> Any:
        value = self._of(key).setdefault(key, default)
        self._mirror()
        return value

    def update(self, *args: Any, **kwargs: Any) -> None:
        for key, value in dict(*args, **kwargs).items():
            self[key] = value

    def clear(self) -> None:
        self._base.clear()
        self._mirror()

    def popitem(self) -> tuple[str, Any]:
        item = self._base.popitem()
        self._mirror()
        return item

    def __or__(self, other: Any) -> Any:
        return self._merged() | other

    def __ror__(self, other: Any) -> Any:
        return other | self._merged()

    def __ior__(self, other: Any) -> Any:
        self.update(other)
        return self
