"""`stroma show`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import click

from stroma._utils.text import clean, format_duration, format_usage, pluralize
from stroma.checkpoint.durable.states import AsyncStates
from stroma.checkpoint.entries import Statement, Waiting
from stroma.checkpoint.events import EventPlace
from stroma.checkpoint.history.bars import find_progress, in_order, place_of, sum_waste
from stroma.checkpoint.history.facts import (
    effect_state,
    is_at_work,
    is_plain_code,
    resume_options,
    unanswered,
)
from stroma.checkpoint.history.reader import History, Inputs
from stroma.checkpoint.history.redaction import Payload
from stroma.checkpoint.queue import COMPLETE, QUEUED
from stroma.checkpoint.records import FAILED, AttemptRecord, RunRecord
from stroma.cli.commands.completion import complete_run
from stroma.cli.commands.runs import done_text, run_data
from stroma.cli.errors import Code, Problem, frame_lines
from stroma.cli.formatting import format_age, format_local_time, id_word, localize, style_status, to_iso
from stroma.cli.output import Part, emit, err, out, table
from stroma.cli.redaction import load_redact, redact_option
from stroma.cli.stores import TARGET, Database, db_option
from stroma.cli.suspended import resume_advice, waiting_data, waiting_hints
from stroma.runner.follow import decode_events
from stroma.trace.events import place_text
from stroma.trace.outline import duration, fold, outline, shown_place
from stroma.trace.rejected import RejectedOutput
from stroma.trace.story import Bar, Story, waits
from stroma.trace.terminal import RunLine, lines_of

_EVENT_PAGE_SIZE: Final = 100  # batches


@click.command()
@click.argument("run_", metavar="RUN", shell_complete=complete_run)
@click.option("--node", metavar="NODE", help="Only the attempts of this node.")
@click.option("--attempt", type=click.IntRange(min=1), metavar="N", help="Only the Nth attempts.")
@click.option("--input", "wants_input", is_flag=True, help="Print the inputs of the attempts as JSON.")
@click.option("--output", "wants_output", is_flag=True, help="Print the committed outputs as JSON.")
@click.option(
    "--rejected", "wants_rejected", is_flag=True, help="Print outputs that broke their contract as JSON."
)
@click.option("--tree", "as_tree", is_flag=True, help="Draw groups, flows and attempts as a tree.")
@click.option("--unfold", is_flag=True, help="Show each item of a map and each repeated call of a node.")
@click.option("--timing", is_flag=True, help="Show start and waiting time of each attempt.")
@redact_option
@click.option("--json", "as_json", is_flag=True, help='Print one JSON object, schema "stroma.show/1".')
@db_option
def show(run_: str, redact: str | None, as_json: bool, db: str | None, **options: Any) -> int:
    """Show one run, attempt by attempt.

    RUN is a run id, a prefix of one, or "last". AT is the position in the run; children of groups are
    indented below their group, with their branch. Items of a map, and repeated calls of one node in a flow,
    are one line with the first calls that failed in the end below it. With --tree, the sleeps and questions
    of the flow are shown.

    With --input, --output or --rejected, stdout has one JSON value per attempt; if there are several, a line
    names the attempt of each.
    """
    view = _View(**options)
    database = Database.from_option(db)
    record = database.find(run_)
    history = History(database.reader, load_redact(redact))
    attempts = in_order(database.reader.attempts(record.run_id))
    waiting = history.store.waiting(record.run_id)
    selected = [one for one in attempts if view.selects(one.node_id, one.attempt)]
    if not selected and not view.selects_all:
        raise _no_such_attempt(attempts, record, view)
    states = _states(history, record, selected, view)
    code = Code.ENVIRONMENT if any(one.damaged for one in attempts) else Code.OK
    if as_json:
        emit(
            {
                "schema": "stroma.show/1",
                "run": run_data(record),
                **facts_data(database.reader, record),
                "suspended": [question_data(history, one) for one in waiting],
                **_data(record, attempts, selected, states),
            }
        )
        return code
    if view.wants_input or view.wants_output or view.wants_rejected:
        return _print_states(selected, states, code)
    story = history.outline(record, attempts, waiting)
    _print_head(record, story)
    _print_site(history, record)
    for text in _describe_progress(database.reader, record, story, attempts):
        _print_fact("in flight", text)
    if selected or (story.waits and view.as_tree):
        _print_attempts(record, story, view)
    _print_all_rejected(history, record, selected)
    for one in attempts:
        if one.damaged:
            output = f"the output of node {clean(one.node_id, 100)!r} at {shown_place(place_of(one))}"
            err.line(("stroma: ", "bold red"), f"{output} is damaged; resume from there to recompute it")
    if record.status not in COMPLETE:
        _print_next_steps(database, record, unanswered(waiting), of_program=is_plain_code(attempts))
    return code


@dataclass(frozen=True, slots=True)
class _View:
    """The options that select what is shown of a run."""

    node: str | None
    attempt: int | None
    wants_input: bool
    wants_output: bool
    wants_rejected: bool
    as_tree: bool
    unfold: bool
    timing: bool

    @property
    def selects_all(self) -> bool:
        return self.node is None and self.attempt is None

    def selects(self, node_id: str, attempt: int) -> bool:
        return self.node in (None, node_id) and self.attempt in (None, attempt)


_State = tuple[str, Payload]


def _data(
    record: RunRecord,
    attempts: list[AttemptRecord],
    selected: list[AttemptRecord],
    states: list[list[_State]],
) -> dict[str, Any]:
    """Return the attempts and their sums for ``--json``."""
    tokens, cost = sum_waste(attempts)
    return {
        "wasted_tokens": tokens,
        "wasted_cost_usd": cost,
        "attempts": [
            attempt_data(record, one) | {what: payload.value for what, payload in payloads}
            for one, payloads in zip(selected, states, strict=True)
        ],
    }


def question_data(history: History, one: Waiting) -> dict[str, Any]:
    """Return a question and its answer in the form of the JSON schemas."""
    answered_at = to_iso(one.answered_ms) if one.is_answered else None
    return waiting_data(one) | {"answer": history.answer_of(one).value, "answered_at": answered_at}


def facts_data(store: AsyncStates, record: RunRecord) -> dict[str, Any]:
    """Return the owner of a run and the last calls of its effects for ``--json``."""
    facts = store.facts_of(record.run_id)
    lease_until = None if facts.lease_until_ms is None else to_iso(facts.lease_until_ms)
    return {
        "owner": {"place": facts.owner, "is_gone": facts.is_lost, "lease_until": lease_until},
        "deaths": facts.deaths,
        "failed_items": facts.failed_items,
        "effects": [
            {
                "position": position,
                "branch": branch,
                "node_id": call.node_id,
                "call": call.number,
                "idempotency_key": call.key,
                "started": to_iso(call.started_ms),
                "state": effect_state(record, call),
                "statement": call.statement and _statement_data(call.statement),
            }
            for (position, branch), call in facts.effects.items()
        ],
    }


def _statement_data(stated: Statement) -> dict[str, Any]:
    return {"number": stated.number, "happened": stated.happened, "source": stated.source}


def _no_such_attempt(attempts: list[AttemptRecord], record: RunRecord, view: _View) -> Problem:
    of_node = f" of node {view.node!r}" if view.node is not None else ""
    which = f"no attempt {view.attempt}" if view.attempt is not None else "no attempt"
    nodes = ", ".join(dict.fromkeys(clean(one.node_id, 60) for one in attempts[:1000])) or "none"
    return Problem(
        f"run {clean(record.run_id)} has {which}{of_node}", f"its nodes are: {nodes}", code=Code.NOT_FOUND
    )


def _states(
    history: History, record: RunRecord, selected: list[AttemptRecord], view: _View
) -> list[list[_State]]:
    """Return the requested states of each attempt."""
    inputs = Inputs(history, record.run_id, selected)
    rows: list[list[_State]] = []
    for one in selected:
        states: list[_State] = []
        if view.wants_input:
            states.append(("input", inputs.of(one)))
        if view.wants_output:
            output = history.output_of(one)
            if one.output_bytes is not None or one.damaged or len(selected) == 1:
                states.append(("output", output))
        if view.wants_rejected:
            rejected = history.rejected_of(record.run_id, one)
            if rejected is not None or len(selected) == 1:
                problem = "no rejected output is stored" if rejected is None else None
                states.append(("rejected", Payload(rejected and rejected.to_json(), problem)))
        rows.append(states)
    return rows


def _print_states(selected: list[AttemptRecord], states: list[list[_State]], code: int) -> int:
    several = sum(map(len, states)) > 1
    if not any(states):
        err.line(("stroma: ", "bold red"), "these attempts have no such state")
        return code or Code.NOT_FOUND
    for one, payloads in zip(selected, states, strict=True):
        for what, payload in payloads:
            if several:
                out.line(
                    f"# {shown_place(place_of(one))} {clean(one.node_id, 100)}, attempt {one.attempt}: {what}"
                )
            if payload.problem is None:
                emit(payload.value)
                continue
            err.line(
                ("stroma: ", "bold red"),
                f"{what} of {clean(one.node_id, 100)!r}, attempt {one.attempt}: {clean(payload.problem)}",
            )
            if not several:
                return code or Code.NOT_FOUND
    return code


def attempt_data(record: RunRecord, a: AttemptRecord) -> dict[str, Any]:
    """Return an attempt in the form of the JSON schemas."""
    return {
        "position": a.position,
        "branch": a.branch,
        "node_id": a.node_id,
        "attempt": a.attempt,
        "started": to_iso(a.started_ms),
        "seconds": a.duration_ms / 1000,
        "function_seconds": a.function_ms / 1000,
        "outcome": a.outcome,
        "damaged": a.damaged,
        "committed": a.output_bytes is not None and not a.damaged,
        "class": a.failure_class,
        "reason": a.reason,
        "error_type": a.error_type,
        "message": a.message,
        "tokens": a.tokens,
        "output_tokens": a.output_tokens,
        "cost_usd": a.cost_usd,
        "model": a.model,
        "idempotency_key": a.idempotency_key(record.run_id, record.execution),
    }


# ---------------------------------------------------------------------- facts and next commands


def _print_fact(label: str, part: Part) -> None:
    out.fitted((f"{label:<9} ", "dim"), part, indent=10)


def _describe_progress(
    store: AsyncStates, record: RunRecord, story: Story, attempts: list[AttemptRecord]
) -> Iterator[str]:
    """Yield what is in flight beside calls of effects: attempts are stored at their end."""
    if not is_at_work(record):
        return
    started = _started_nodes(store, record)
    calls = store.facts_of(record.run_id).effects
    effects = {place_text(*place) for place, call in calls.items() if call.is_unknown}
    yield from (text for at, text in started.items() if at not in effects)
    if not started and not effects:  # Without stored events, only the next node of a list is known.
        progress = find_progress(record, attempts, story.first_ns, ())
        if progress is not None:
            since = format_local_time(story.first_ns // 1_000_000 + int(progress.since_ms))
            yield f"{clean(progress.label, 100)} (at {progress.at}), since {since}"


def _started_nodes(store: AsyncStates, record: RunRecord) -> dict[str, str]:
    """Return the nodes that the owner has started and not ended, by place, if it stores its events."""
    started: dict[str, str] = {}
    last = EventPlace(record.epoch, 0)
    while (page := store.read_events(record.run_id, last, _EVENT_PAGE_SIZE)) and page.batches:
        for _, event in decode_events(record.run_id, page, last):
            at = place_text(event.position, event.branch)
            if event.kind == "node_start":
                node = f"{clean(str(event.node_id), 100)} (at {shown_place(at)})"
                started[at] = f"{node}: attempt {event.attempt}"
            elif event.kind.startswith("node_") and event.kind not in ("node_event", "node_retry"):
                started.pop(at, None)
        last = page.batches[-1].last
    return started


#: Styles of facts by their label.
_FACT_STYLES: Final = {"failed": "yellow", "blocked": "yellow", "error": "red", "unknown": "yellow"}


def _print_head(record: RunRecord, story: Story) -> None:
    """Print what is known of a run, a line for each fact."""
    head: dict[str, Part] = {
        "run": (clean(record.run_id, 4000), "bold"),
        "pipeline": clean(record.pipeline),
        "status": style_status(story.status),
        "started": f"{format_local_time(record.started_ms)}, {format_age(record.started_ms)}",
        "duration": format_duration(story.seconds),
        "nodes": f"{done_text(record)}, {pluralize(len(story.bars), 'attempt')}",
        "spent": f"{format_usage(record.tokens, record.cost_usd)}",
    }
    tokens, cost = story.wasted
    if tokens or cost:
        head["wasted"] = f"{format_usage(tokens, cost)} on attempts without output"
    for label, part in head.items():
        _print_fact(label, part)
    for label, text in story.facts:
        _print_fact(label, (localize(text), _FACT_STYLES.get(label, "")))


def _print_site(history: History, record: RunRecord) -> None:
    """Print the line of the user's code where the attempt that stopped the run failed."""
    cause = record.cause
    if cause is None or record.status not in FAILED:
        return
    site = history.failure_site_of(record.run_id, cause)
    for line in frame_lines(*site.own[-1]) if site is not None and site.own else ():
        out.fitted(" " * 10, line, indent=10)


def _print_next_steps(
    database: Database, record: RunRecord, waiting: list[Waiting], *, of_program: bool
) -> None:
    """Print the commands that a run needs next; only its program can resume a run of plain code."""
    name, target = id_word(record.run_id), database.target_of(record)
    place = f"  (where the pipeline {clean(record.pipeline, 60)!r} is)" if target == TARGET else ""
    if record.holder is not None:
        _print_hint(
            f"wait for its result: {database.hint('resume', name, target, options=('--attach',))}", place
        )
        err.line(f"or pause it: {database.hint('pause', name)}")
        err.line(f"or cancel it: {database.hint('cancel', name)}")
        return
    if record.status == QUEUED:
        _print_hint(f"a worker with a free place starts it: {database.hint('worker', target)}", place)
        _print_hint(f"or start it here: {database.hint('drive', name, target)}", place)
        err.line(f"or cancel it: {database.hint('cancel', name)}")
        return
    for line in waiting_hints(database, record, target, waiting):
        err.line(line)
    if of_program:
        err.line(f"continue it with its program, under run_id={record.run_id!r} and resume=True")
        return
    command = database.hint("resume", name, target, options=resume_options(record))
    _print_hint(f"{resume_advice(record)}: {command}", place)


def _print_hint(command: str, place: str) -> None:
    """Print a command and where to run it, on a terminal in lines that fit."""
    if not err.is_terminal or len(command + place) <= err.columns:
        err.line(command + place)
        return
    err.hint(command)
    err.fitted(f"    {place.strip()}")


# ---------------------------------------------------------------------- attempts

_HEADER = ["AT", "NODE", "TRY", "OUTCOME", "CLASS", "REASON", "TIME", "TOKENS", "COST", "MODEL", "MESSAGE"]
_RIGHT: Final = ("TRY", "BEGAN", "WAITED", "TIME", "FUNCTIONS", "TOKENS", "COST")
#: Columns that a narrow terminal does without, in this order; with --timing the times stay longest.
_SPARE: Final = ("FUNCTIONS", "MODEL", "CLASS", "TOKENS", "AT", "REASON", "TRY", "WAITED")
_LAST_SPARE: Final = ("TIME", "COST", "OUTCOME")
_LAST_OF_TIMING: Final = ("COST", "OUTCOME", "BEGAN", "TIME")
_SHOWN_REJECTED: Final = 3  # rejected outputs below the attempts
_SHOWN_COMPLAINTS: Final = 10  # of each


def _print_attempts(record: RunRecord, story: Story, view: _View) -> None:
    """Print a line for each selected attempt; repeated calls and the items of a map are one line."""
    out.line()
    entries = outline(story.bars, story.waits if view.as_tree and view.selects_all else (), story.pipeline)
    if view.selects_all and not view.unfold:
        entries = fold(entries, items=True)
    lines = list(lines_of(entries, lambda bar: view.selects(bar.node_id, bar.attempt)))
    header = list(_HEADER)
    cells = [line.cells(message_length=120 if out.is_terminal else 4000) for line in lines]
    if view.timing:
        header[6:7] = ["BEGAN", "WAITED", "TIME", "FUNCTIONS"]
        _add_timing(lines, cells, story.bars, story.first_ns / 1e6 - record.started_ms)
        if not any(row.get("FUNCTIONS") for row in cells):  # They took the whole time of each attempt.
            header.remove("FUNCTIONS")
    rows: list[list[Part]] = []
    for number, (line, row) in enumerate(zip(lines, cells, strict=True)):
        before = _branches(lines, number) if view.as_tree else "  " * line.depth
        row["NODE"] = before + localize(row["NODE"])
        texts: list[Part] = [row.get(name, "") for name in header]
        if row.get("OUTCOME"):
            texts[header.index("OUTCOME")] = (row["OUTCOME"], line.style)
        rows.append(texts)
    right = frozenset(header.index(name) for name in _RIGHT if name in header)
    last = _LAST_OF_TIMING if view.timing else _LAST_SPARE
    spare = [header.index(name) for name in (*_SPARE, *last) if name in header]
    table(out, header, rows, right=right, spare=spare)


def _branches(lines: Sequence[RunLine], number: int) -> str:
    """Return the tree lines in front of a name."""
    depth = lines[number].depth
    branches = []
    for level in range(1, depth + 1):
        more = next((line.depth for line in lines[number + 1 :] if line.depth <= level), 0) == level
        branches.append(("├─ " if more else "└─ ") if level == depth else ("│  " if more else "   "))
    return "".join(branches)


def _add_timing(
    lines: Sequence[RunLine], cells: Sequence[dict[str, str]], bars: Sequence[Bar], began_ms: float
) -> None:
    """Add the times of attempts. ``began_ms``: time from the start of the run to that of the drawing."""
    waited = {id(bar): took for bar, _, took in waits(bars)}
    for line, row in zip(lines, cells, strict=True):
        bar = line.bar
        if bar is not None:
            # The start of a run is known to the millisecond, that of an attempt more exactly.
            row["BEGAN"] = f"+{max(0.0, began_ms + bar.began_ms) / 1000:.3f} s"
            row["WAITED"] = format_duration(waited[id(bar)] / 1000) if id(bar) in waited else ""
            row["TIME"] = duration(bar.took_ms)
            row["FUNCTIONS"] = "" if bar.function_ms is None else duration(bar.function_ms)


def _print_all_rejected(history: History, record: RunRecord, selected: Sequence[AttemptRecord]) -> None:
    """Print the last outputs that broke their contract, and how many there are if these are not all."""
    outputs = [
        (one, rejected)
        for one in sorted(selected, key=lambda one: one.started_ns)
        if one.reason == "contract" or one.outcome == "suspended"
        if (rejected := history.rejected_of(record.run_id, one)) is not None
    ]
    for attempt, rejected in outputs[-_SHOWN_REJECTED:]:
        _print_rejected(attempt, rejected)
    if len(outputs) > _SHOWN_REJECTED:
        more = f"the last {_SHOWN_REJECTED} of {len(outputs)} rejected outputs; all of them: --rejected"
        out.line((more, "dim"))


def _print_rejected(attempt: AttemptRecord, rejected: RejectedOutput) -> None:
    """Print the value beside each complaint of the contract."""
    out.line()
    node = f"{clean(attempt.node_id, 100)} at {shown_place(place_of(attempt))}, attempt {attempt.attempt}"
    out.line((f"rejected output of {node}", "bold"))
    for one in rejected.complaints[:_SHOWN_COMPLAINTS]:
        came = f"; got {value}" if (value := rejected.text_of(one)) else ""
        out.fitted(f"  {clean(one.field, 100)}: ", (clean(one.message, 300), "red"), came)
    more = rejected.more + max(0, len(rejected.complaints) - _SHOWN_COMPLAINTS)
    if more:
        out.line((f"  ... and {pluralize(more, 'complaint')} more", "dim"))
