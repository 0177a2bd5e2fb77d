"""`stroma record`."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from pathlib import Path

import click

from stroma._utils.text import clean, short_id
from stroma.cli.commands.completion import complete_run
from stroma.cli.commands.replay import recorded_run, replay_run
from stroma.cli.errors import Code, Problem
from stroma.cli.formatting import id_word
from stroma.cli.loading import load_pipeline
from stroma.cli.output import err, out, write_private
from stroma.cli.stores import Database, db_option
from stroma.testing.recording import RecordedRun
from stroma.testing.replaying import Replay

_TEST = '''\
"""Run {run} of the pipeline {pipeline}, replayed by the current code: no node is called.

Written by `stroma record`; what the nodes returned stands in {data}.
"""

from pathlib import Path

{imports}

RUN = RecordedRun.load(Path(__file__).with_name({data!r}))
{pipeline_line}

def test_run_{name}_goes_the_same_way() -> None:
    """{story}"""
    replay = replay_sync(RUN, {pipeline_name})
    replay.assert_same()
{asserts}'''


@click.command()
@click.argument("run_", metavar="RUN", shell_complete=complete_run)
@click.argument("target", metavar="FILE_OR_MODULE:NAME")
@click.option(
    "--as-test",
    "path",
    metavar="TEST_FILE",
    type=click.Path(dir_okay=False, path_type=Path),
    required=True,
    help="Pytest file to write; its data file goes next to it.",
)
@click.option("--force", is_flag=True, help="Overwrite existing files.")
@db_option
def record(run_: str, target: str, path: Path, force: bool, db: str | None) -> int:
    """Write a recorded run as a regression test.

    The test replays the run without calling a node (see `stroma replay`), and fails if the code behaves
    differently. Values that the config of the pipeline redacts are not written.
    """
    if not path.name:
        raise click.UsageError("--as-test needs the name of a file")
    database = Database.from_option(db)
    whole = recorded_run(database, run_)
    pipeline = load_pipeline(target)
    hide = None if pipeline.config is None else pipeline.config.redact
    redacted_run = whole if hide is None else whole.redacted(hide)
    if hide is None and not database.reader._payloads.plain:
        err.line(("note: ", "yellow"), "the store encrypts states; what is written here is not encrypted")
    outcome = replay_run(redacted_run, pipeline)
    if not outcome.is_same:
        raise _differs(
            outcome,
            redacted=redacted_run != whole,
            hint=database.hint("replay", id_word(whole.run_id), target),
        )
    data = path.with_name(f"{path.stem}.run.json")
    for file in (path, data):
        if file.exists() and not force:
            raise Problem(f"{file} exists already", "pass another name, or --force")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        recorded = json.dumps(redacted_run.to_json(), indent=2, ensure_ascii=False) + "\n"
        write_private(data, recorded)
        write_private(path, _test(redacted_run, outcome, target, path, data))
    except OSError as error:
        raise Problem(
            f"cannot write the test: {error}", "pass another file", code=Code.ENVIRONMENT
        ) from error
    out.line(str(path))
    out.line(str(data))
    err.line(f"run it with: pytest {path}")
    return Code.OK


def _differs(outcome: Replay, *, redacted: bool, hint: str) -> Problem:
    lines = [clean(str(difference), 500) for difference in outcome.differences[:5]]
    fix = f"see all differences: {hint}"
    if redacted:
        fix += "; or redact has left what no contract takes: have it give other values of the same type"
    return Problem(
        f"the code behaves differently from run {clean(outcome.recorded.run_id)}, so its test would fail",
        *lines,
        fix,
        code=Code.DIFFERENT,
    )


def _test(run: RecordedRun, outcome: Replay, target: str, path: Path, data: Path) -> str:
    place, _, name = target.rpartition(":")
    imports, line, called = _pipeline(place, name, path)
    attempts = Counter((one.position, one.node_id) for one in run.attempts if not one.branch)
    nodes = ", ".join(
        clean(node_id, 60) + (f" ({number} attempts)" if number > 1 else "")
        for (_, node_id), number in sorted(attempts.items())
    )
    asserts = [f"    assert replay.result.total_tokens == {outcome.result.total_tokens}\n"]
    story = f"It came so far: {nodes}."
    if outcome.stopped is None:
        asserts.insert(0, f"    assert replay.status == {str(outcome.status)!r}\n")
        story = f"It is {outcome.status}: {nodes or 'no node was called'}."
    return _TEST.format(
        run=_plain(short_id(run.run_id)),
        pipeline=_plain(run.pipeline),
        data=data.name,
        imports=imports,
        pipeline_line=line,
        name=re.sub(r"\W+", "_", id_word(run.run_id), flags=re.ASCII).strip("_").lower()[:60]
        or "of_another_day",
        story=_plain(story),
        pipeline_name=called,
        asserts="".join(asserts),
    )


def _plain(text: str) -> str:
    """Return text that is safe in a docstring."""
    return text.replace("\\", "/").replace('"', "'")


def _pipeline(place: str, name: str, path: Path) -> tuple[str, str, str]:
    """Return imports, a line of code and an expression that load the pipeline."""
    ours = "from stroma.testing import RecordedRun, replay_sync"
    if place.endswith(".py") or Path(place).exists():
        way = Path(os.path.relpath(Path(place).resolve(), path.parent.resolve())).as_posix()
        line = f"PIPELINE = pipeline_in(Path(__file__).parent / {way!r}, {name!r})\n"
        return "from stroma.testing import RecordedRun, pipeline_in, replay_sync", line, "PIPELINE"
    first, _, rest = name.partition(".")
    return f"{ours}\n\nfrom {place} import {first}", "", f"{first}{'.' + rest if rest else ''}"
