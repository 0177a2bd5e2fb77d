"""Preview of a resume: outputs that it would restore, nodes it would call, changes that prevent it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from stroma._utils.text import clean, format_duration, format_usage, pluralize, typed
from stroma.checkpoint import CheckpointManager, Committed, InMemoryStore, PipelineChanged
from stroma.checkpoint.entries import Intent, is_of_pipeline
from stroma.checkpoint.history.bars import place_of
from stroma.checkpoint.history.facts import resume_options, status_of
from stroma.checkpoint.history.reader import History
from stroma.checkpoint.identity import child_indexes, is_called, with_outer
from stroma.checkpoint.queue import COMPLETE
from stroma.checkpoint.records import AttemptRecord, RunRecord
from stroma.cli.errors import Code, Problem
from stroma.cli.formatting import id_word
from stroma.cli.inputs import stored_input
from stroma.cli.output import emit, err, out
from stroma.cli.stores import Database
from stroma.contracts.codec import describe_error
from stroma.contracts.contract import ContractRegistry
from stroma.contracts.node import FlowNode, Group, Node, contract_of_node, find_node
from stroma.contracts.schema import schema_of
from stroma.contracts.untyped import UntypedState
from stroma.engine.config import RunConfig
from stroma.engine.context import ReliabilityContext
from stroma.engine.restore import check_place, check_unfinished_call, read_output
from stroma.runner.pipeline import Pipeline, code_of
from stroma.trace.events import place_text
from stroma.trace.outline import shown_place


@dataclass(frozen=True, slots=True)
class Incompatibility:
    """A reason that an output cannot be restored. ``at``: its position, and place in groups: "2.0"."""

    at: str
    node_id: str
    message: str


def changes_since(
    run_id: str,
    commits: Mapping[tuple[int, str], Committed],
    nodes: Sequence[Node | Group],
    registry: ContractRegistry,
    config: RunConfig | None = None,
    calls: Iterable[tuple[tuple[int, str], Intent]] = (),
) -> list[Incompatibility]:
    """Return the changes that prevent a resume of committed outputs by (position, branch).

    ``calls``: those of effects whose outcome is unknown, with their places.

    Decides as a resume does. Nothing is written, and no user code is called but validators and upcasts.
    """
    config = (config or RunConfig()).model_copy(update={"run_id": run_id})
    ctx = ReliabilityContext.for_run(config, registry, CheckpointManager(InMemoryStore()))
    changes: list[Incompatibility] = []
    for (position, branch), committed in sorted(commits.items()):
        try:
            check_place(ctx, nodes, position, branch, committed)
            _read(ctx, nodes, committed, position, branch)
        except Exception as error:  # A validator or an upcast may raise anything.
            if isinstance(error, PipelineChanged):
                message = str(error)
            else:
                why = typed(type(error).__name__, describe_error(error)[0])
                message = (
                    f"the output of node {committed.node_id!r} cannot be read back: {why}; restore its "
                    "schema, pass upcast= to the node, or resume from there to run it again"
                )
            changes.append(Incompatibility(place_text(position, branch), committed.node_id, message))
    for place, call in calls:
        try:
            check_unfinished_call(ctx, nodes, *place, call)
        except PipelineChanged as error:
            changes.append(Incompatibility(str(place[0]), call.node_id, str(error)))
    return changes


def _read(
    ctx: ReliabilityContext, nodes: Sequence[Node | Group], committed: Committed, position: int, branch: str
) -> None:
    """Read an output back as a resume does; raises what prevents it. That of a group is merged."""
    if position >= len(nodes):
        return  # Changes are allowed.
    node = nodes[position]
    if is_called(branch):
        return  # The schema of a called step is known when it is called.
    for index in child_indexes(branch):
        if not isinstance(node, Group) or (not node.is_map and index >= len(node.children)):
            return
        node = node.children[0 if node.is_map else index]
    if isinstance(node, Group) or committed.is_failed_item:
        return
    contract = contract_of_node(node, ctx.registry)
    schema = schema_of(UntypedState if contract is None else contract.output_schema)
    changed = committed.contract.partition(":")[0] != schema.fingerprint
    read_output(schema, committed, contract.upcast if changed and contract is not None else None)


def print_plan(
    database: Database,
    record: RunRecord,
    pipeline: Pipeline,
    target: str,
    start_at: str | None,
    as_json: bool,
) -> int:
    """Print what a resume would do, and return the exit code that it would have."""
    attempts, _ = History(database.reader).attempts(record.run_id)
    before = None  # Without --from the first position without output.
    if start_at is not None:
        before = [find_node(node).node_id for node in pipeline.nodes].index(start_at)
    restored = _restored(attempts, before)
    done = {one.position for one in restored if not one.branch}
    called = [find_node(node).node_id for at, node in enumerate(pipeline.nodes) if at not in done]
    effects = database.reader.facts_of(record.run_id).effects
    unknown = [] if record.holder else [(at, call) for at, call in effects.items() if call.is_unknown]
    changes = [
        change
        for change in _find_changes(database, record, pipeline, target, unknown)
        if before is None or change.at == "input" or int(change.at.partition(".")[0]) < before
    ]
    code = Code.OK
    if record.holder is not None:
        code = Code.ENVIRONMENT
    elif changes:
        code = Code.USAGE
    if as_json:
        data = {
            "schema": "stroma.plan/1",
            "run_id": record.run_id,
            "status": status_of(record),
            "from": start_at,
            "resumable": code is Code.OK,
            "holder": record.holder,
            "kept": [_data(one) for one in restored],
            "saves": dict(zip(("tokens", "cost_usd", "seconds"), _savings(restored), strict=True)),
            "settles": [call.key for _, call in unknown],
            "calls": called,
            "changes": [asdict(change) for change in changes],
        }
        emit(data)
        return code
    for _, call in unknown if not changes else ():
        text = f"settles effect {clean(call.node_id, 60)!r} first: nobody knows if call {call.number}"
        out.line(f"{text} happened; its reconcile or a person states it")
    _print_plan(restored, called, changes)
    if record.holder is not None:
        err.line(
            ("busy: ", "yellow"),
            f"the run is already running in {clean(record.holder)}; wait for it: ",
            database.hint("resume", id_word(record.run_id), target, options=("--attach",)),
        )
    elif changes:
        err.line("the run cannot be resumed; restore the listed nodes, or resume before them with --from")
    elif record.status in COMPLETE and start_at is None:
        err.line(f"the run is {record.status}; a resume would call nothing")
    else:
        is_flow = isinstance(find_node(pipeline.nodes[0]), FlowNode)
        if record.blocked is not None:
            this, mark = code_of(pipeline).name, record.blocked
            which = f"code {clean(mark.codes[-1], 120)}" if mark.codes else "another version of the code"
            text = f"could not continue it: {clean(mark.message, 1000)}"
            if this in mark.codes[-1:]:
                text = f"this code ({this}) {text}"
            else:
                text = f"{which} {text}; this is code {this}{'' if is_flow else ', which fits'}"
            err.line(("blocked: ", "yellow"), text)
        if is_flow:
            compare = database.hint("replay", id_word(record.run_id), target)
            err.line("the calls of a flow were not compared; compare them with: ", compare)
        options = resume_options(record) if start_at is None else ("--from", start_at)
        hint = database.hint("resume", id_word(record.run_id), target, options=options)
        err.line(f"nothing was done; resume with: {hint}")
    return code


def _savings(restored: list[AttemptRecord]) -> tuple[int, float, float]:
    """Return the tokens, US dollars and seconds of restored outputs."""
    # The time of a group that has ended includes that of its children.
    places = {(one.position, one.branch) for one in restored}
    ms = sum(
        one.duration_ms
        for one in restored
        if places.isdisjoint((one.position, outer) for outer in [*with_outer(one.branch), ""][1:])
    )
    return sum(one.tokens for one in restored), sum(one.cost_usd for one in restored), ms / 1000


def _print_plan(restored: list[AttemptRecord], called: list[str], changes: list[Incompatibility]) -> None:
    tokens, cost, seconds = _savings(restored)
    _print_nodes(restored)
    out.line(f"saves   {format_duration(seconds)}, {format_usage(tokens, cost)} that are not spent again")
    what = ", ".join(clean(node_id, 60) for node_id in called[:50])
    out.line(f"calls   {what or 'nothing: every node has its output'}")
    for line in _change_lines(changes):
        out.line(("changed ", "bold red"), line)


def _print_nodes(restored: list[AttemptRecord]) -> None:
    inside = sum(bool(one.branch) for one in restored)
    groups = f", {pluralize(inside, 'call')} inside groups and flows" if inside else ""
    out.line(f"kept    {pluralize(len(restored) - inside, 'node')}{groups}")
    for one in restored:
        if not one.branch:
            used = f"  {format_usage(one.tokens, one.cost_usd)}" if one.tokens or one.cost_usd else ""
            out.line(
                f"          {place_of(one):<6} {clean(one.node_id, 60)}  "
                f"{format_duration(one.duration_ms / 1000)}{used}"
            )


def _restored(attempts: list[AttemptRecord], before: int | None) -> list[AttemptRecord]:
    places: dict[tuple[int, str], AttemptRecord] = {}
    for one in attempts:
        if one.output_bytes is not None and (before is None or one.position < before):
            places[one.position, one.branch] = one
    return list(places.values())


def _data(one: AttemptRecord) -> dict[str, Any]:
    return {
        "position": one.position,
        "branch": one.branch,
        "node_id": one.node_id,
        "tokens": one.tokens,
        "cost_usd": one.cost_usd,
        "seconds": one.duration_ms / 1000,
    }


# ---------------------------------------------------------------------- changes of the pipeline


def _find_changes(
    database: Database,
    record: RunRecord,
    pipeline: Pipeline,
    target: str,
    unknown: list[tuple[tuple[int, str], Intent]],
) -> list[Incompatibility]:
    """Return the changes that prevent a resume. Reads the store only. Raises Problem."""
    nodes = [find_node(node) for node in pipeline.nodes]
    changes = []
    try:
        stored_input(database, record, pipeline, target)
    except Problem as problem:
        if problem.code is not Code.USAGE:
            raise
        changes.append(Incompatibility("input", "input", f"{problem.message}; {problem.more[0]}"))
    commits, damaged = _commits(database, record)
    stored_run = changes_since(record.run_id, commits, nodes, ContractRegistry(), pipeline.config, unknown)
    return [*changes, *damaged, *stored_run]


def _change_lines(changes: Sequence[Incompatibility]) -> list[str]:
    """Return a line for each node: the outputs of all items of a map have mostly changed alike."""
    by_node: dict[tuple[str, str], list[Incompatibility]] = {}
    for change in changes:
        by_node.setdefault((change.at.partition(".")[0], change.node_id), []).append(change)
    return [
        f"{shown_place(first.at)}  {clean(first.node_id, 60)}: {clean(first.message, 1000)}"
        + (f" (and {pluralize(len(others), 'other output')} of this node)" if others else "")
        for first, *others in by_node.values()
    ]


def _commits(
    database: Database, record: RunRecord
) -> tuple[dict[tuple[int, str], Committed], list[Incompatibility]]:
    """Return the committed outputs of a run, and those that cannot be read."""
    store = database.reader

    def query(rows: Any) -> dict[tuple[int, str], str]:
        stored_run = rows.find(record.run_id)
        steps = [] if stored_run is None else rows.steps(stored_run.run, stored_run.execution)
        # Not of steps of plain code, which no pipeline has.
        return {
            (row.position, row.branch): row.step.contract
            for row in steps
            if is_of_pipeline(row.step.input_key, row.step.number)
        }

    attempts = store.attempts(record.run_id)
    contracts = store.read(query, dict[tuple[int, str], str]())
    commits: dict[tuple[int, str], Committed] = {}
    damaged = []
    for attempt in attempts:
        place = attempt.position, attempt.branch
        at = place_of(attempt)
        if attempt.damaged:
            what = "its output is damaged; resume from there to run it again"
            damaged.append(Incompatibility(at, attempt.node_id, what))
        elif attempt.output is not None and place in contracts:
            commits[place] = Committed(attempt.node_id, attempt.output, contracts[place])
    return commits, damaged
