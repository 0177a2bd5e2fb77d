"""The files of the package and their syntax trees, each parsed once for all rules of the source."""

from __future__ import annotations

import ast
import functools
from pathlib import Path

import stroma

SOURCE = Path(stroma.__file__).parent
FILES = sorted(SOURCE.rglob("*.py"))


@functools.cache
def parsed(path: Path) -> ast.Module:
    """Return the syntax tree of a source file."""
    return ast.parse(path.read_text("utf-8"))
