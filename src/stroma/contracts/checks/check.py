"""Check before a run that each node's output can satisfy the next node's input."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterator, Sequence
from typing import Final

from pydantic import BaseModel

from stroma.contracts.checks.compatibility import Fitter, fit_classes, undecided
from stroma.contracts.checks.flow import Crossing, FlowState, flow_of, items_of
from stroma.contracts.checks.records import record_of_class
from stroma.contracts.checks.types import (
    FITS,
    LEAVES,
    LISTS,
    CheckFailed,
    Finding,
    Fit,
    Giver,
    Reason,
    Verdict,
    in_words,
    maybe,
    never,
    under,
)
from stroma.contracts.contract import ContractRegistry
from stroma.contracts.node import Group, Node, contract_of_node

#: The fits of pairs of classes, which pipelines repeat.
Known = dict[tuple[type[BaseModel], type[BaseModel], bool], Fit]

_FIXES: Final = {
    "type": "give both the same type, or convert it in {source}",
    "conversion": "declare it as {type} in the input of {target}, or convert it in {source}",
    "constraint": "promise the same in the output of {source}, or take more in the input of {target}",
    "choices": "promise fewer values in the output of {source}, or take all of them in the input of {target}",
    "optional": "take None in the input of {target}, or promise a value in the output of {source}",
    "union": "take all of its types in the input of {target}, or promise fewer in the output of {source}",
    "unknown": "declare what it holds in the output of {source}",
    "items": "let the input of {target} have one required field, or let it be a RootModel",
}


def check_nodes(
    nodes: Sequence[Node | Group],
    registry: ContractRegistry,
    initial: type[BaseModel] | None = None,
    *,
    retried: Collection[str] = (),
    steps: Sequence[Node | Group] = (),
) -> list[Finding]:
    """Return every finding, in the order of the nodes. Nothing is claimed of a node without a contract.

    ``initial``: the class of the initial state; without it, that is not checked. ``retried``: ids that the
    config grants retries of their own. ``steps``: nodes that flows call, of which the effects are checked.
    Raises TypeError for anything else.
    """
    if initial is not None and not (isinstance(initial, type) and issubclass(initial, BaseModel)):
        raise TypeError(
            f"input_schema must be a pydantic model class, got {in_words(initial)}; "
            "pass the class of the initial state"
        )
    findings: list[Finding] = []
    known: Known = {}
    for step in flow_of(nodes, registry, initial):
        findings += [step] if isinstance(step, Finding) else _of_crossing(step, known)
    findings += _of_effects(nodes, registry, retried)
    findings += _of_effects(steps, registry, retried, prefix="step ")
    return list(dict.fromkeys(findings))


def raise_errors(nodes: Sequence[Node | Group], registry: ContractRegistry) -> None:
    """Raise CheckFailed with the findings that are errors, if there are any."""
    errors = [finding for finding in check_nodes(nodes, registry) if finding.severity == "error"]
    if errors:
        raise CheckFailed(errors)


# ---------------------------------------------------------------------- crossings


def _of_crossing(crossing: Crossing, known: Known) -> Iterator[Finding]:
    state, node = crossing.state, crossing.node
    wanted = None if crossing.contract is None else crossing.contract.input_schema
    if isinstance(node, Group):
        fit = _fit_items(state, node) if node.is_map and not node.has_external_items else FITS
    elif wanted is None or (state.model is None and state.item is None):
        return
    else:
        try:
            fit = _fit(state, wanted, known)
        except Exception as error:  # Classes of the user's take part, in comparisons and the like.
            item = "" if state.model is None else state.model.__name__
            fit = undecided(f"comparing them raised {type(error).__name__}", item, wanted.__name__)
    reasons = [reason for reason in fit if not (state.loose and _is_guess(reason))]
    for reason in reasons:
        if reason.kind != "undecidable":
            yield _of_reason(crossing, wanted, reason)
    open_reasons = [reason for reason in reasons if reason.kind == "undecidable"]
    if open_reasons:
        yield _of_undecided(crossing, open_reasons)


def _fit(state: FlowState, wanted: type[BaseModel], known: Known) -> Fit:
    if state.item is not None:
        return Fitter(None, wanted, apart=True).fit_item(state.item, bare=state.bare)
    assert state.model is not None
    pair = state.model, wanted, state.apart
    if pair not in known:
        known[pair] = fit_classes(state.model, wanted, apart=state.apart)
    return known[pair]


def _fit_items(state: FlowState, node: Group) -> Fit:
    """Return the fit of the field that ``map_over`` takes its items from: a list or a tuple."""
    name = node.items_field
    if state.model is None:
        if state.item is None or state.item.unwrapped().kind not in LEAVES | LISTS:
            return FITS
        return under(never("items", "an item without fields has no list", state.item, "list"), name)
    record = record_of_class(state.model)
    side = record.fields.get(name, record.others)
    kind = side.unwrapped()
    fit = FITS
    if name not in record.fields:
        if not record.is_open:
            return under(never("missing", f"{record.name} has no such field", "", "list"), name)
        what = f"{record.name} may have it among its further fields, or may not"
        fit = maybe("missing", what, "", "list")
    if side.without_default().kind == "nullable":
        fit += maybe("optional", "it may be None", side, "list")
    if kind.kind == "any":
        fit += maybe("unknown", "nothing is known of what it holds", side, "list") if not fit else FITS
    elif items_of(kind) is None:
        is_one = kind.kind in LEAVES | LISTS or kind.kind == "dict" or kind.is_record
        fit += (never if is_one else maybe)("type", "only a list or a tuple will do", side, "list")
    return under(fit, name)


def _is_guess(reason: Reason) -> bool:
    """Return True if a finding holds only because a node without a contract may return anything."""
    return reason.verdict is Verdict.MAYBE and reason.kind in ("unknown", "missing", "extra")


def _giver_of(state: FlowState, path: tuple[str, ...]) -> Giver:
    return state.origins.get(path[0], state.giver) if path else state.giver


def _shown(path: tuple[str, ...], state: FlowState) -> str:
    parts = (state.list_at, "[]", *path) if state.list_at else path
    return "".join(part if part.startswith("[") else f".{part}" for part in parts).removeprefix(".")


def _of_reason(crossing: Crossing, wanted: type[BaseModel] | None, reason: Reason) -> Finding:
    state, to = crossing.state, crossing.to
    default = "" if wanted is None else f", or give it a default in {wanted.__name__}"
    # A field that no node returns is missing in the latest output.
    is_absent = reason.kind == "missing" and not reason.source and len(reason.path) == 1
    by = state.giver if is_absent else _giver_of(state, reason.path)
    source, target, path = repr(by.node_id), repr(to.node_id), _shown(reason.path, state)
    if reason.kind == "missing":
        message = f"{target} needs {path} ({reason.target}), and {reason.what}"
        fix = f"add it to the output of {source}{default}"
        if is_absent:
            message, fix = _of_absent(state, default, reason.path[-1], message, fix)
    elif reason.kind == "extra":
        message = f"{source} gives {path or 'its output'} ({reason.source}): {reason.what}"
        fix = (
            f"remove it from the output of {source}, add it to {reason.target or to.node_id}, "
            "or let that ignore extra fields"
        )
    else:
        types = f"{reason.source}, {target} takes {reason.target}"
        message = f"{source} gives {path or 'its output'} as {types}: {reason.what}"
        fix = _FIXES[reason.kind].format(source=source, target=target, type=reason.source)
    return Finding.between(
        by,
        to,
        severity="error" if reason.verdict is Verdict.NEVER else "warning",
        kind=reason.kind,
        path=path,
        types=(reason.source, reason.target),
        message=message,
        fix=fix,
    )


def _of_absent(state: FlowState, default: str, name: str, message: str, fix: str) -> tuple[str, str]:
    """Return message and fix for a missing field: who dropped it, or which one is almost called so."""
    giver = repr(state.giver.node_id)
    for earlier, model in state.earlier:
        if name in record_of_class(model).fields:
            holder = state.model.__name__ if state.model is not None else "its output"
            return (
                f"{message}; {earlier.node_id!r} gave it, and {giver} does not hand it on",
                f"add {name!r} to {holder}, the output of {giver}{default}",
            )
    if state.model is not None and not state.apart:
        near = difflib.get_close_matches(name, record_of_class(state.model).fields, 1, 0.7)
        if near:
            fix = f"did you mean its {near[0]!r}? Use one name for both, or one as an alias of the other"
    return message, fix


def _of_undecided(crossing: Crossing, reasons: list[Reason]) -> Finding:
    """Return one finding for all that cannot be decided, with the fields and functions."""
    state, to = crossing.state, crossing.to
    by = _giver_of(state, reasons[0].path) if len(reasons) == 1 else state.giver
    paths = dict.fromkeys(_shown(reason.path, state) for reason in reasons)
    whys = dict.fromkeys(f"{_shown(r.path, state)}: {r.what}" if r.path else r.what for r in reasons)
    types = [
        ", ".join(dict.fromkeys(words))
        for words in zip(*((r.source, r.target) for r in reasons), strict=True)
    ]
    return Finding.between(
        by,
        to,
        kind="undecidable",
        path=", ".join(filter(None, paths)),
        types=(types[0], types[1]),
        message=f"it is not known before the run whether {to.node_id!r} accepts the output "
        f"of {by.node_id!r}: {'; '.join(whys)}",
        fix="add a test that passes real outputs on",
    )


# ---------------------------------------------------------------------- effects


def _of_effects(
    nodes: Sequence[Node | Group],
    registry: ContractRegistry,
    retried: Collection[str],
    prefix: str = "",
    group: str | None = None,
) -> Iterator[Finding]:
    """Yield the warnings about effects. ``group``: the id of a group around them that is retried."""
    for index, node in enumerate(nodes):
        at = f"{prefix}{index}"
        if isinstance(node, Group):
            inner = node.node_id if node.node_id in retried else group
            yield from _of_effects(node.children, registry, retried, f"{at}.", inner)
            continue
        contract = contract_of_node(node, registry)
        if contract is None or not contract.effect:
            continue
        here, name = Giver(node.node_id, at), repr(node.node_id)
        if contract.reconcile is None:
            message = (
                f"effect {name} has no reconcile: a person decides about each call that may have happened"
            )
            fix = "pass reconcile=, a function of (state, idempotency_key) that looks the call up"
            yield Finding.between(here, here, kind="effect", message=message, fix=fix)
        if group is not None:
            message = f"effect {name} is inside {group!r}, which is retried as a whole"
            fix = f"retry its children instead of {group!r}, or move the effect after it"
            yield Finding.between(here, here, kind="effect", message=message, fix=fix)
