"""`stroma resume --dry-run`: what a resume would keep, what it would call, and what keeping saves."""

from __future__ import annotations

from typing import Any

from stroma._utils.text import clean, count, money, plural, span
from stroma.checkpoint.history import History, place_of
from stroma.checkpoint.records import AttemptRecord, RunRecord
from stroma.cli.errors import Code
from stroma.cli.formatting import id_word
from stroma.cli.output import emit, err, out
from stroma.cli.resume_changes import changes_of
from stroma.cli.stores import Database
from stroma.contracts.node import find_node
from stroma.runner.compatibility import Change
from stroma.runner.runner import Pipeline

__all__ = ["tell_plan"]

_ALL = 10_000_000


def tell_plan(
    database: Database,
    record: RunRecord,
    pipeline: Pipeline | None,
    target: str | None,
    start_at: str | None,
    as_json: bool,
) -> int:
    """Say what a resume would do, and do nothing. The exit code is that of the resume, as far as it can be told."""
    with database.explained():
        attempts, _ = History(database.reader).attempts(record.run_id, _ALL)
    before = _position(attempts, pipeline, start_at)
    kept = _kept(attempts, before)
    again = _again(attempts, kept, pipeline)
    changes: list[Change] = []
    if pipeline is not None and target is not None:
        changes = [
            change
            for change in changes_of(database, record, pipeline, target)
            if before is None or change.at == "input" or int(change.at.partition(".")[0]) < before
        ]
    # A group's time is its own; what its children took is part of it.
    seconds = sum(one.duration_ms for one in kept if not one.branch) / 1000
    tokens, cost = sum(one.tokens for one in kept), sum(one.cost_usd for one in kept)
    code = Code.OK
    if record.holder is not None:
        code = Code.ENVIRONMENT
    elif changes:
        code = Code.USAGE
    if as_json:
        emit(
            {
                "schema": "stroma.plan/1",
                "run_id": record.run_id,
                "status": record.status,
                "from": start_at,
                "resumable": code is Code.OK,
                "holder": record.holder,
                "kept": [_data(one) for one in kept],
                "saves": {"tokens": tokens, "cost_usd": cost, "seconds": seconds},
                "calls": again,
                "changes": [_change(change) for change in changes],
            }
        )
        return code
    out.line(
        f"kept    {plural(sum(not one.branch for one in kept), 'node')}, in groups {sum(bool(one.branch) for one in kept):,}"
    )
    for one in kept:
        if not one.branch:
            used = f"  {count(one.tokens)}, {money(one.cost_usd)}" if one.tokens else ""
            out.line(
                f"          {place_of(one):<6} {clean(one.node_id, 60)}  {span(one.duration_ms / 1000)}{used}"
            )
    out.line(f"saves   {span(seconds)}, {count(tokens)}, {money(cost)} that are not spent again")
    what = ", ".join(clean(node_id, 60) for node_id in again[:50]) or "nothing: every node has its output"
    if pipeline is None and again:
        what = f"{what}, and what follows"
    out.line(f"calls   {what}")
    for change in changes:
        out.line(
            ("changed ", "bold red"),
            f"{change.at}  {clean(change.node_id, 60)}: {clean(change.message, 1000)}",
        )
    if record.holder is not None:
        err.line(
            ("busy: ", "yellow"),
            f"the run is being run by {clean(record.holder)}; wait for it: {database.hint('resume', id_word(record.run_id), target or 'FILE.py:NAME', options=('--attach',))}",
        )
    elif changes:
        err.line("it cannot be resumed as it is; restore what is named, or resume before it with --from")
    else:
        options = ("--from", start_at) if start_at is not None else ()
        hint = database.hint("resume", id_word(record.run_id), target or "FILE.py:NAME", options=options)
        err.line(f"nothing was done; go on with: {hint}")
    return code


def _position(attempts: list[AttemptRecord], pipeline: Pipeline | None, start_at: str | None) -> int | None:
    """Where a resume would begin; None: at the first position without an output."""
    if start_at is None:
        return None
    if pipeline is not None:
        return [find_node(node).node_id for node in pipeline.nodes].index(start_at)
    return next(one.position for one in attempts if one.node_id == start_at and not one.branch)


def _kept(attempts: list[AttemptRecord], before: int | None) -> list[AttemptRecord]:
    """The attempts whose outputs would be restored."""
    places: dict[tuple[int, str], AttemptRecord] = {}
    for one in attempts:
        if one.output_bytes is not None and (before is None or one.position < before):
            places[one.position, one.branch] = one
    return list(places.values())


def _again(attempts: list[AttemptRecord], kept: list[AttemptRecord], pipeline: Pipeline | None) -> list[str]:
    done = {one.position for one in kept if not one.branch}
    if pipeline is not None:
        nodes = [find_node(node).node_id for node in pipeline.nodes]
        return [node_id for position, node_id in enumerate(nodes) if position not in done]
    tried = {one.position: one.node_id for one in attempts if not one.branch}
    return [node_id for position, node_id in sorted(tried.items()) if position not in done]


def _data(one: AttemptRecord) -> dict[str, Any]:
    return {
        "position": one.position,
        "branch": one.branch,
        "node_id": one.node_id,
        "tokens": one.tokens,
        "cost_usd": one.cost_usd,
        "seconds": one.duration_ms / 1000,
    }


def _change(change: Change) -> dict[str, Any]:
    return {"at": change.at, "node_id": change.node_id, "message": change.message}
