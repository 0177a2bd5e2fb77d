"""Names of a package, or of a module, that are loaded when they are first asked for."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping


def lazy(
    module: str, names_of: Mapping[str, tuple[str, ...]], package: str | None = None
) -> tuple[Callable[[str], object], Callable[[], list[str]]]:
    """Return the ``__getattr__`` and ``__dir__`` of a module, and set its ``__all__`` if it has none.

    ``names_of``: names by their defining module, which ``__all__`` lists: constants, classes, functions.
    ``package``: where those modules are; None if the module is a package, and they are in it.
    """
    homes = {name: home for home, names in names_of.items() for name in names}
    in_order = sorted(homes, key=lambda name: (not name.isupper(), not name[0].isupper(), name))
    vars(sys.modules[module]).setdefault("__all__", in_order)

    def load(name: str) -> object:
        home = homes.get(name)
        if home is None:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(f"{package or module}.{home}"), name)
        # Asked for again, it is found without this.
        setattr(sys.modules[module], name, value)
        return value

    def known() -> list[str]:
        return sorted({*vars(sys.modules[module]), *homes})

    return load, known
