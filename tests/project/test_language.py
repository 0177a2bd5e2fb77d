"""Language of the source."""

from __future__ import annotations

import ast
from pathlib import Path

import stroma

SOURCE = Path(stroma.__file__).parent
#: First words that name a question in place of an action or a thing.
BANNED = {"What", "Whether", "Who", "Whose", "How", "Where", "When"}


def test_no_docstring_begins_with_a_question_word() -> None:
    """The first line of a docstring is an imperative sentence or a noun phrase."""
    found = []
    for path in sorted(SOURCE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, (ast.Module, ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                words = (ast.get_docstring(node) or "").split()
                if words and words[0] in BANNED:
                    found.append(f"{path.relative_to(SOURCE)}:{getattr(node, 'lineno', 1)} {words[0]}")
    assert found == []
