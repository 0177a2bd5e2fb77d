"""Language of source and pages: docstrings, messages, identifiers, the prose of README and docs."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from tests.project.sources import FILES, SOURCE, parsed

ROOT = Path(__file__).parents[2]

#: First words of a docstring that name a question in place of an action or a thing.
QUESTION_WORDS = {"What", "Whether", "Who", "Whose", "How", "Where", "When"}

#: Participles that say nothing of the value; name the value or the action.
BANNED_NAMES = {"asked", "begun", "found", "given", "kept", "made", "said", "told"}

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


def place(path: Path, line: int) -> str:
    """Return the place of a line in the source."""
    return f"{path.relative_to(SOURCE)}:{line}"


def bound_names(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Yield each name that a module binds, with its line: variables, parameters, functions, classes."""
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


PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]

#: Words and shapes of sentences that pages do not use, each with what to write.
BANNED_PROSE = {
    r"\b(un)?told\b|\btells?\b": "call, report, show, pending",
    r"\bkept\b": "stored, saved, recorded",
    r"\bbeg[au]n\b": "started",
    r"\bgo(es|ing)? on\b|\bwent on\b": "continue, resume",
    r"\bof which\b": "two sentences",
    r"\b[Bb]ut for\b": "except",
    r"\b(no|some|every)body\b|\b[Ww]hoever\b|\b[Ww]hichever\b": "the user, the process, any, each",
    r"\banew\b|\bonce more\b": "again",
    r"\bin vain\b": "without a result",
    r"\bof (your|its|their|one's) own\b|\bone's own\b": "your own, its own, separate",
    r"\b(comes?|becomes?) of\b": "happens to, results",
    r"\ball the same\b": "still",
    r"\bthe like\b": "similar",
    r"\blately\b": "recently",
    r"\bat work\b": "running, active",
    r"\bpictur(e|es|ed)\b": "snapshot, image",
    r"\b[Mm]end(s|ed|ing)?\b": "fix, repair",
    r"\bsaid\b": "stated, reported, message",
    r"\bstands? (in|at|on|under|beside|below|there|for)\b": "is, appears",
    r"^(What|Who|Whether|Nor)\b(?!.*\?$)": "a sentence with a noun as its subject",
}

MOST_WORDS = 35
MOST_WORDS_IN_README = 25
AVERAGE_WORDS = 18


@dataclass(frozen=True)
class Prose:
    """Text of a page for people, without code: its paragraphs and list items, and the cells of its tables."""

    blocks: list[str]
    cells: list[str]

    @classmethod
    def of(cls, text: str) -> Prose:
        """Return the prose of a Markdown page. Inline code counts as one word, a link as its text."""
        text = re.sub(r"^ *(`{3,})[^\n]*\n.*?^ *\1 *$", "\n", text, flags=re.MULTILINE | re.DOTALL)
        text = re.sub(r"<!--.*?-->|!\[[^\]]*\]\([^)]*\)|<[^>\n]+>", "", text, flags=re.DOTALL)
        text = re.sub(r"`+[^`\n]+`+", "CODE", text)
        # Docstrings of tests, which the page of the guarantees lists.
        text = re.sub(r"^- \[.*\]\(\.\./tests/\S+\)$", "", text, flags=re.MULTILINE)
        text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", text)
        text = re.sub(r"(?<!\w)[*_]{1,3}(?=\S)|(?<=\S)[*_]{1,3}(?!\w)", "", text)
        blocks: list[list[str]] = [[]]
        cells: list[str] = []
        for line in map(str.strip, text.splitlines()):
            if line.startswith("|"):
                cells += [cell.strip() for cell in line.strip("|").split(" | ") if cell.strip("|-: ")]
            if not line or line.startswith(("|", "#", ":::")):
                blocks.append([])
            elif item := re.match(r"(?:[-*+>]|\d+\.) +(.*)", line):
                blocks.append([item[1]])
            else:
                blocks[-1].append(line)
        return cls([" ".join(lines) for lines in blocks if lines], cells)


def sentences(text: str) -> list[str]:
    """Split a paragraph into its sentences."""
    parts = re.split(r"(?<=[.!?])[\")]*\s+(?=[A-Z\"'(0-9])", text)
    return [part for part in parts if re.search(r"\w", part)]


def count_words(sentence: str) -> int:
    """Return the number of words of a sentence."""
    return len(re.findall(r"\w[\w'.,/-]*", sentence))


def prose_problems(text: str, most: int = MOST_WORDS) -> list[str]:
    """Return the banned words and shapes in a page, its long sentences and too high an average."""
    prose = Prose.of(text)
    in_blocks = [one for block in prose.blocks for one in sentences(block)]
    problems = []
    for one in in_blocks + [one for cell in prose.cells for one in sentences(cell)]:
        for pattern, better in BANNED_PROSE.items():
            if match := re.search(pattern, one):
                problems.append(f"{match[0]!r} in {one!r}: write {better}")
        if count_words(one) > most:
            problems.append(f"{count_words(one)} words, at most {most}: {one!r}")
    counts = [count_words(one) for one in in_blocks]
    if counts and sum(counts) / len(counts) >= AVERAGE_WORDS:
        problems.append(
            f"sentences of {sum(counts) / len(counts):.1f} words on average: {AVERAGE_WORDS} is too many"
        )
    return problems


def test_pages_use_plain_short_sentences() -> None:
    """Pages have no banned word or shape; sentences have at most 35 words (README: 25), 18 on average."""
    wrong = []
    for page in PAGES:
        most = MOST_WORDS_IN_README if page.name == "README.md" else MOST_WORDS
        wrong += [f"{page.relative_to(ROOT)}: {one}" for one in prose_problems(page.read_text("utf-8"), most)]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("The run goes on after that.", "continue"),
        ("| a | What it does |\n", "noun"),
        ("- A list\n  whose item nobody\n  reads.", "nobody"),
        (f"One {'word ' * 35}sentence.", "37 words"),
        ("One " + "word " * 16 + "sentence.", "18.0 words"),
    ],
)
def test_each_problem_of_prose_is_found(text: str, problem: str) -> None:
    """The check above finds banned words in paragraphs, lists and tables, and sentences that are too long."""
    assert [one for one in prose_problems(text) if problem in one] != []


def test_code_and_questions_are_no_prose() -> None:
    """Code, comments and the addresses of links are not read; a question may begin with What."""
    page = "What is a run?\n\n```python\n# told\n```\n\n<!-- told -->\n\n`told` and [a page](told.md).\n"
    assert prose_problems(page) == []
