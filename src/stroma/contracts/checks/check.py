"""Check before a run that each node's output can satisfy the next node's input."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterator, Sequence
from typing import Literal

from pydantic import BaseModel

from stroma.contracts.checks.compatibility import Fitter, fit_classes
from stroma.contracts.checks.effects import find_effects
from stroma.contracts.checks.finding import CheckFailed, Finding
from stroma.contracts.checks.flow import (
    Collision,
    Crossing,
    FlowState,
    Giver,
    Unreadable,
    flow_of,
    holds_no_fields,
    items_of,
    record_of_class,
)
from stroma.contracts.checks.pairs import Fit, Reason, undecided
from stroma.contracts.checks.scalars import Kind, Verdict, in_words
from stroma.contracts.contract import ContractRegistry
from stroma.contracts.node import Group, Node

__all__ = ["check_nodes", "raise_errors"]

#: The verdicts on pairs of classes, which pipelines repeat.
Known = dict[tuple[type[BaseModel], type[BaseModel], bool], Fit]


def check_nodes(
    nodes: Sequence[Node | Group],
    registry: ContractRegistry,
    initial: type[BaseModel] | None = None,
    *,
    retried: Collection[str] = (),
) -> list[Finding]:
    """Return every finding, in the order of the nodes. Nothing is claimed of a node without a contract.

    ``initial``: the class of the initial state; without it, that is not checked. ``retried``: ids that the
    config grants retries of their own. Raises TypeError for anything else.
    """
    if initial is not None and not (isinstance(initial, type) and issubclass(initial, BaseModel)):
        raise TypeError(
            f"input_schema must be a pydantic model class, got {in_words(initial)}; pass the class of the initial state"
        )
    findings: list[Finding] = []
    known: Known = {}
    for one in flow_of(nodes, registry, initial):
        if isinstance(one, Crossing):
            findings += _of_crossing(one, known)
        else:
            findings.append(_of_collision(one) if isinstance(one, Collision) else _of_unreadable(one))
    findings += find_effects(nodes, registry, retried)
    return list(dict.fromkeys(findings))


def raise_errors(nodes: Sequence[Node | Group], registry: ContractRegistry) -> None:
    """Raise CheckFailed with the findings that are errors, if there are any."""
    errors = [finding for finding in check_nodes(nodes, registry) if finding.severity == "error"]
    if errors:
        raise CheckFailed(errors)


# ---------------------------------------------------------------------- crossings


def _of_crossing(crossing: Crossing, known: Known) -> Iterator[Finding]:
    state, node = crossing.state, crossing.node
    if isinstance(node, Group):
        if node.is_map and not node.has_external_items and state.model is not None:
            yield from _of_list(crossing, node, state.model)
        elif node.is_map and state.item is not None and holds_no_fields(state.item):
            by, to, item = state.giver, crossing.to, str(state.item)
            yield Finding(
                "error",
                "items",
                by.node_id,
                to.node_id,
                by.at,
                to.at,
                f"{state.list_at}[].{node.items_field}",
                item,
                "list",
                f"{to.node_id!r} goes over {node.items_field} of each item of {state.list_at}, and those are {item}",
                f"let the items be models with a list {node.items_field!r}",
            )
        return
    if crossing.contract is None or (state.model is None and state.item is None):
        return
    wanted = crossing.contract.input_schema
    try:
        fit = _fit(state, wanted, known)
    except Exception as error:  # Classes of the user's take part, in comparisons and the like.
        item = "" if state.model is None else state.model.__name__
        fit = undecided((), item, wanted.__name__, f"comparing them raised {type(error).__name__}")
    reasons = [r for r in fit.reasons if not (state.loose and _is_guess(r))]
    for reason in reasons:
        if reason.kind != "undecidable":
            yield _of_reason(crossing, wanted, reason)
    yield from _undecided(crossing, [reason for reason in reasons if reason.kind == "undecidable"])


def _fit(state: FlowState, wanted: type[BaseModel], known: Known) -> Fit:
    if state.item is not None:
        return Fitter(None, wanted, apart=True).fit_item(state.item, bare=state.bare)
    assert state.model is not None
    pair = state.model, wanted, state.apart
    if pair not in known:
        known[pair] = fit_classes(state.model, wanted, apart=state.apart)
    return known[pair]


def _is_guess(reason: Reason) -> bool:
    """Return True if a finding holds only because a node without a contract may return anything."""
    return reason.verdict is Verdict.MAYBE and reason.kind in ("unknown", "missing", "extra")


def _giver_of(state: FlowState, path: tuple[str, ...]) -> Giver:
    return state.origins.get(path[0], state.giver) if path else state.giver


def _of_reason(crossing: Crossing, wanted: type[BaseModel], reason: Reason) -> Finding:
    state, to = crossing.state, crossing.to
    # What nobody gives is missing in what was made last.
    absent = reason.kind == "missing" and not reason.source and len(reason.path) == 1
    by = state.giver if absent else _giver_of(state, reason.path)
    path = _shown(reason.path, state)
    message, fix = _message_and_fix(crossing, wanted, reason, by, path)
    severity: Literal["error", "warning"] = "error" if reason.verdict is Verdict.NEVER else "warning"
    return Finding(
        severity,
        reason.kind,
        by.node_id,
        to.node_id,
        by.at,
        to.at,
        path,
        reason.source,
        reason.target,
        message,
        fix,
    )


def _shown(path: tuple[str, ...], state: FlowState) -> str:
    parts = (state.list_at, "[]", *path) if state.list_at else path
    text = ""
    for part in parts:
        text += part if part.startswith("[") or not text else f".{part}"
    return text


def _message_and_fix(
    crossing: Crossing, wanted: type[BaseModel], reason: Reason, by: Giver, path: str
) -> tuple[str, str]:
    """Return the message of a mismatch and its fix."""
    source, target = repr(by.node_id), repr(crossing.to.node_id)
    what = path or "its output"
    pair = f"{source} gives {what} as {reason.source}, {target} takes {reason.target}: {reason.what}"
    if reason.kind == "missing":
        return _missing(crossing, wanted, reason, by, path)
    if reason.kind == "extra":
        return (
            f"{source} gives {what or 'more'} ({reason.source}): {reason.what}",
            f"take it out of the output of {source}, add it to {wanted.__name__}, or let that ignore what it does not know",
        )
    return pair, {
        "type": f"give both the same type, or convert it in {source}",
        "conversion": f"declare it as {reason.source} in the input of {target}, or convert it in {source}",
        "constraint": f"promise the same in the output of {source}, or take more in the input of {target}",
        "choices": f"promise fewer values in the output of {source}, or take all of them in the input of {target}",
        "optional": f"take None in the input of {target}, or promise a value in the output of {source}",
        "union": f"take all of its types in the input of {target}, or promise fewer in the output of {source}",
        "unknown": f"declare what it holds in the output of {source}",
        "items": f"let the input of {target} have one required field, or let it be a RootModel",
    }[reason.kind]


def _missing(
    crossing: Crossing, wanted: type[BaseModel], reason: Reason, by: Giver, path: str
) -> tuple[str, str]:
    state, target = crossing.state, repr(crossing.to.node_id)
    giver, name = repr(by.node_id), reason.path[-1]
    holder = state.model.__name__ if state.model is not None else "its output"
    message = f"{target} needs {path} ({reason.target}), and {reason.what}"
    fix = f"add it to the output of {giver}, or give it a default in {wanted.__name__}"
    if len(reason.path) > 1 or reason.source:
        return message, fix
    for earlier, model in state.earlier:
        if name in record_of_class(model).fields:
            message += f"; {earlier.node_id!r} gave it, and {giver} does not hand it on"
            return (
                message,
                f"add {name!r} to {holder}, the output of {giver}, or give it a default in {wanted.__name__}",
            )
    if state.model is not None and not state.apart:
        near = difflib.get_close_matches(name, record_of_class(state.model).fields, 1, 0.7)
        if near:
            fix = f"did you mean its {near[0]!r}? Call both the same, or give the one the other's name as an alias"
    return message, fix


def _undecided(crossing: Crossing, reasons: list[Reason]) -> Iterator[Finding]:
    """Yield one finding for all that cannot be decided: it names what to review, and hides no other finding."""
    if not reasons:
        return
    state, to = crossing.state, crossing.to
    by = _giver_of(state, reasons[0].path) if len(reasons) == 1 else state.giver
    paths = list(dict.fromkeys(_shown(reason.path, state) for reason in reasons))
    whys = dict.fromkeys(f"{_shown(r.path, state)}: {r.what}" if r.path else r.what for r in reasons)
    yield Finding(
        "warning",
        "undecidable",
        by.node_id,
        to.node_id,
        by.at,
        to.at,
        ", ".join(filter(None, paths)),
        ", ".join(dict.fromkeys(r.source for r in reasons)),
        ", ".join(dict.fromkeys(r.target for r in reasons)),
        f"it is not known before the run whether {to.node_id!r} accepts the output of {by.node_id!r}: {'; '.join(whys)}",
        "see to it with a test that hands on real outputs",
    )


# ---------------------------------------------------------------------- groups


def _of_list(crossing: Crossing, node: Group, model: type[BaseModel]) -> Iterator[Finding]:
    """Yield the finding for a field of ``map_over`` that is no list."""
    state, to = crossing.state, crossing.to
    by = state.origins.get(node.items_field, state.giver)
    record = record_of_class(model)
    side = record.fields.get(node.items_field)
    target = repr(to.node_id)

    def finding(
        severity: Literal["error", "warning"], kind: Kind, type_name: str, what: str, fix: str
    ) -> Finding:
        return Finding(
            severity,
            kind,
            by.node_id,
            to.node_id,
            by.at,
            to.at,
            node.items_field,
            type_name,
            "list",
            f"{target} goes over {node.items_field}, and {what}",
            fix,
        )

    if side is None and not record.is_open:
        fix = f"add a list {node.items_field!r} to the output of {by.node_id!r}, or name another field"
        yield finding("error", "missing", "", f"{model.__name__} has no such field", fix)
        return
    if side is None:
        if not state.loose:
            fix = f"declare a list {node.items_field!r} in the output of {by.node_id!r}"
            what = f"it may be among what {model.__name__} holds beside its fields, or may not"
            yield finding("warning", "missing", "", what, fix)
        if record.others is None:
            return
        side = record.others
    kind, type_name = side.resolved(), str(side)
    while kind.kind == "default":
        kind = kind.to(kind.node["schema"]).resolved()
    if kind.kind == "nullable":
        fix = f"promise a list in the output of {by.node_id!r}"
        yield finding("warning", "optional", type_name, "it may be None", fix)
        kind = kind.to(kind.node["schema"]).resolved()
    if kind.kind == "any":
        if not state.loose:
            fix = f"declare it as a list in the output of {by.node_id!r}"
            yield finding("warning", "unknown", type_name, "nothing is known of what it holds", fix)
    elif items_of(kind) is None:
        plain = (
            kind.kind not in ("union", "tagged-union", "chain", "lax-or-strict")
            and "function" not in kind.kind
        )
        fix = f"declare it as a list in the output of {by.node_id!r}"
        what = f"{by.node_id!r} gives it as {type_name}: only a list or a tuple will do"
        yield finding("error" if plain else "warning", "type" if plain else "union", type_name, what, fix)


def _of_unreadable(unreadable: Unreadable) -> Finding:
    is_output = unreadable.source == unreadable.to
    name = str(getattr(unreadable.model, "__name__", unreadable.model))
    return Finding(
        "warning",
        "broken",
        unreadable.source.node_id,
        unreadable.to.node_id,
        unreadable.source.at,
        unreadable.to.at,
        "",
        name if is_output else "",
        "" if is_output else name,
        f"the {'output' if is_output else 'input'} of {unreadable.to.node_id!r} cannot be read: {unreadable.error}",
        "correct its class; if that names classes which come later, call model_rebuild() once they are there",
    )


def _of_collision(collision: Collision) -> Finding:
    first, second = repr(collision.first.node_id), repr(collision.second.node_id)
    return Finding(
        "warning",
        "collision",
        collision.first.node_id,
        collision.second.node_id,
        collision.first.at,
        collision.second.at,
        collision.name,
        *collision.types,
        f"{first} and {second} both give {collision.name}; that of {second} wins, since it comes later",
        f"take it out of the output of one of them, or call the two differently; if {second} is to win, leave it so",
    )
