"""Language of the source: docstrings, messages and identifiers."""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import stroma

SOURCE = Path(stroma.__file__).parent
FILES = sorted(SOURCE.rglob("*.py"))

#: First words of a docstring that name a question in place of an action or a thing.
QUESTION_WORDS = {"What", "Whether", "Who", "Whose", "How", "Where", "When"}

#: Participles that say nothing of the value; name the value or the action.
BANNED_NAMES = {"asked", "begun", "found", "given", "kept", "made", "said", "told"}

#: Names that others have written down: keys of stored data.
STORED_NAMES = {("drivers/remote/state.py", "begun")}  # in the histories of runs on Temporal

#: Words and phrases with the word to use.
BANNED_WORDS = {
    r"\bpictur(e|es|ed)\b": "snapshot, image",
    r"\b(un)?told\b": "called, reported, pending",
    r"\b[Mm]end(s|ed|ing)?\b": "fix, repair",
    r"\bputs? (it |them )?down\b": "record, store",
    r"\bc[ao]mes? to nothing\b": "failed, returned no output",
    r"\bat work on\b": "owner, lease",
    r"\b(go|goes|going|went) on with\b": "resume, continue",
    r"\bthe collector\b": "garbage collection",
    r"\bwaits for no answer\b": "is no longer waiting for an answer",
}


@functools.cache
def parsed(path: Path) -> ast.Module:
    """Return the syntax tree of a source file."""
    return ast.parse(path.read_text("utf-8"))


def place(path: Path, line: int) -> str:
    """Return the place of a line in the source."""
    return f"{path.relative_to(SOURCE)}:{line}"


def bound_names(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Yield each name that a module binds, with its line: variables, parameters, attributes, functions, classes."""
    for node in ast.walk(tree):
        name: Any = None
        if isinstance(node, (ast.Name, ast.Attribute)) and isinstance(node.ctx, ast.Store):
            name = node.id if isinstance(node, ast.Name) else node.attr
        elif isinstance(node, ast.arg):
            name = node.arg
        elif isinstance(
            node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.ExceptHandler, ast.MatchAs)
        ):
            name = node.name
        if name is not None:
            yield name, getattr(node, "lineno", 1)


def test_no_docstring_begins_with_a_question_word() -> None:
    """The first line of a docstring is an imperative sentence or a noun phrase."""
    wrong = []
    for path in FILES:
        for node in ast.walk(parsed(path)):
            if isinstance(node, (ast.Module, ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                words = (ast.get_docstring(node) or "").split()
                if words and words[0] in QUESTION_WORDS:
                    wrong.append(f"{place(path, getattr(node, 'lineno', 1))} {words[0]}")
    assert wrong == []


def test_no_name_is_a_bare_participle() -> None:
    """A variable, parameter, attribute, function or class is not called found, given, told or the like."""
    wrong = [
        f"{place(path, line)} {name}"
        for path in FILES
        for name, line in bound_names(parsed(path))
        if name.lower().strip("_") in BANNED_NAMES
        and (path.relative_to(SOURCE).as_posix(), name) not in STORED_NAMES
    ]
    assert wrong == []


def test_no_text_has_a_banned_word() -> None:
    """Docstrings, messages, comments and names use the words of the field."""
    banned = re.compile("|".join(BANNED_WORDS))
    wrong = []
    for path in FILES:
        for number, line in enumerate(path.read_text("utf-8").splitlines(), 1):
            match = banned.search(line)
            if match is not None:
                better = next(word for pattern, word in BANNED_WORDS.items() if re.search(pattern, match[0]))
                wrong.append(f"{place(path, number)} {match[0]!r}: write {better}")
    assert wrong == []


def test_no_two_classes_have_one_name() -> None:
    """Each class of the package has a name of its own."""
    places: dict[str, list[str]] = {}
    for path in FILES:
        for node in ast.walk(parsed(path)):
            if isinstance(node, ast.ClassDef):
                places.setdefault(node.name, []).append(place(path, node.lineno))
    assert {name: where for name, where in places.items() if len(where) > 1} == {}
