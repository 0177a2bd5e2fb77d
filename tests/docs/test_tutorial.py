"""The tutorial, followed word for word by a newcomer in an empty folder."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from tests.docs.blocks import ROOT, Shell, Wrong, commands, of_page, reader_env, same, walk
from tests.kit import words

CHAPTERS = sorted((ROOT / "docs" / "tutorial").glob("[0-9]*.md"))


@pytest.mark.nightly
@pytest.mark.timeout(400)
def test_a_newcomer_who_follows_the_tutorial_never_meets_an_error(tmp_path: Path) -> None:
    """Every file saved and every line typed, in order, in one empty folder: each prints what is shown."""
    typed = 0
    with Shell(tmp_path, reader_env()) as shell:
        for chapter in CHAPTERS:
            for block, command, printed, expected in walk(chapter.read_text("utf-8"), chapter.stem, shell):
                assert same(printed, expected), (
                    f"{chapter.name}, line {block.line}: {command!r} printed {printed}, the page shows "
                    f"{expected}; "
                    "write it anew with: ./dev run python -m tests.docs.blocks docs/tutorial/*.md"
                )
                typed += 1
        # It was the package as it would be installed, not the source beside it.
        _, (where, *_) = shell.run("python -c 'import stroma; print(stroma.__file__)'")
    assert where.startswith(f"{tmp_path}/.venv/")
    assert typed > 35


def test_the_tutorial_has_eleven_chapters_that_lead_to_each_other() -> None:
    """Eleven chapters in order, each short, each with something to do, and each with a link to the next."""
    assert [chapter.stem for chapter in CHAPTERS] == words("""
        01-first-pipeline 02-contracts 03-failures-and-retries 04-cost 05-checkpoints-and-resume 06-hooks
        07-shared-context 08-parallel-and-map 09-if-while-how-many 10-tracing 11-going-to-production
    """)
    for number, chapter in enumerate(CHAPTERS):
        text = chapter.read_text("utf-8")
        assert text.startswith(f"# {number + 1}. ")
        assert len(text.splitlines()) < 200
        assert re.search(r"^```console$", text, re.MULTILINE)
        if number < 10:
            assert f"]({CHAPTERS[number + 1].name})" in text
        # Nothing on a page is beyond the newcomer: each block is a file, or lines for the shell.
        assert [
            block.line for block in of_page(text) if not block.title and block.language != "console"
        ] == []


@pytest.mark.parametrize(
    ("page", "error"),
    [
        ("```console\n$ echo yes\nno\n```\n", "printed"),
        ("```console\n$ false\n```\n", "ended with 1"),
        ('```python title="a.py"\n1 / 0\n```\n\n```console\n$ python a.py\n```\n', "ZeroDivisionError"),
    ],
)
def test_a_page_that_does_not_do_what_it_says_is_found(page: str, error: str, tmp_path: Path) -> None:
    """A line that prints something else, a command that fails and a file that cannot run are each noticed."""
    with Shell(tmp_path, reader_env()) as shell, pytest.raises(Wrong, match=error):
        for _, command, printed, expected in walk(page, "page", shell):
            if not same(printed, expected):
                raise Wrong(f"{command!r} printed {printed}")


def test_what_differs_from_run_to_run_is_no_difference() -> None:
    """Times, moments, fresh ids and the width of columns are passed over; everything else counts."""
    assert same(
        ["took 0.02 s at 12:03:04.123, run 0123456789abcdef0123456789abcdef"],
        ["took 1.5 s at 09:00:00, run " + "f" * 32],
    )
    assert same(["2026-11-25 17:32:49,   2.77 s ago"], ["2027-01-01 00:00:00, 1 m 2 s ago"])
    assert same(["a", "b", "c"], ["a", "...", "c"])
    assert not same(["COMPLETED 3"], ["COMPLETED 4"])
    assert not same(["a", "b"], ["a"])
    assert not same(["b"], ["...", "c"])
    assert commands("$ cat <<X\n> a\n> X\na\n") == [("cat <<X\na\nX", ["a"])]
