"""One run as HTML: a box with the cause, a Gantt with a bar for every attempt, and every attempt with its states.

Rows of plain data come in, text goes out that stands by itself: no script, no font, no address, no style attribute, every
word escaped. A notebook, the file to attach to a bug report, ``stroma export --format html`` and the web interface share it.
"""

from __future__ import annotations

import base64
import bisect
import hashlib
import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Final

from stroma._utils.svg import as_xml
from stroma._utils.text import clean, format_duration, format_tokens, format_usd, pluralize, visible

__all__ = [
    "STYLE",
    "Bar",
    "StopCause",
    "Story",
    "cause",
    "document",
    "duration",
    "fields_named",
    "fragment",
    "gantt",
    "head",
    "idle",
    "idle_ms",
    "places",
    "tree",
    "utc",
    "waits",
    "without_values",
]


#: Rows and attempts that are drawn; of a run with more, the failed ones go first.
MOST: Final = 2000
_ITEMS: Final = 400  # of one payload
_TEXT: Final = 2000  # characters of one text in it
_DEEPEST: Final = 30


@dataclass(frozen=True, slots=True)
class Bar:
    """One attempt.

    Attributes:
        at: its place in the run: "2", "2.0" for a child of a group.
        began_ms, took_ms: since the first attempt began, and of the function alone; of a group, from the first function inside
            it to the last.
        outcome: "success", "failure", "cancelled", "suspended" or "forked".
        is_committed: True if its output was committed.
        input_state, output_state: plain JSON data; None if not known.
        function_ms: for how long functions ran, of a group in which there were waits as well; None for all others.
    """

    node_id: str
    at: str
    attempt: int
    began_ms: float
    took_ms: float
    outcome: str
    failure_class: str | None = None
    reason: str | None = None
    message: str | None = None
    tokens: int = 0
    output_tokens: int = 0
    cost_usd: float = 0.0
    model: str | None = None
    is_committed: bool = True
    input_state: Any = None
    output_state: Any = None
    function_ms: float | None = None

    @property
    def key(self) -> str:
        """Names it among the attempts of its run; safe in an address."""
        digest = hashlib.sha256(f"{self.at}\0{self.attempt}\0{self.began_ms}".encode())
        return f"a{digest.hexdigest()[:12]}"


@dataclass(frozen=True, slots=True)
class StopCause:
    """The cause that stopped a run. ``fields``: paths that broke a contract. ``resume_command``: "" if it cannot be resumed."""

    node_id: str
    at: str
    attempt: int
    failure_class: str
    message: str
    reason: str | None = None
    resume_command: str = ""

    @property
    def fields(self) -> list[str]:
        return fields_named(self.message)


@dataclass(frozen=True, slots=True)
class Story:
    """A run. ``left_out``: how many attempts there are beside ``bars``."""

    run_id: str
    pipeline: str
    status: str
    bars: Sequence[Bar]
    tokens: int
    cost_usd: float
    began_ms: int = 0
    seconds: float = 0.0
    box: StopCause | None = None
    facts: Sequence[tuple[str, str]] = field(default=())
    left_out: int = 0

    @property
    def wasted(self) -> tuple[int, float]:
        """Tokens and US dollars of the attempts without output."""
        lost = [bar for bar in self.bars if not bar.is_committed]
        return sum(bar.tokens for bar in lost), sum(bar.cost_usd for bar in lost)


_VIOLATION: Final = re.compile(r"(?:\w+: )?Contract violation for .*? \((?:input|output)\): (.*)", re.DOTALL)
_FIELD: Final = re.compile(r"([\w$-]+(?:\.[\w$-]+)*): ")


def fields_named(message: str) -> list[str]:
    """Return the paths that the message of a broken contract names: "lines.0.price"."""
    match = _VIOLATION.match(message)
    parts = match[1].split("; ") if match else []
    return [at[1] for part in parts if (at := _FIELD.match(part))]


def without_values(message: str) -> str:
    """Return the message of a broken contract with its paths alone: an error text may quote a value."""
    match = _VIOLATION.match(message)
    if match is None:
        return message
    return message[: match.start(1)] + "; ".join(f"{path}: hidden" for path in fields_named(message))


def waits(bars: Iterable[Bar]) -> Iterator[tuple[Bar, float, float]]:
    """Yield each attempt that follows another one, with the start of its wait and how long it was, in milliseconds."""
    last: dict[str, Bar] = {}
    for bar in sorted(bars, key=lambda bar: (bar.began_ms, bar.attempt)):
        before = last.get(bar.at)
        if before is not None and bar.attempt > 1:
            ended = before.began_ms + before.took_ms
            if bar.began_ms > ended:
                yield bar, ended, bar.began_ms - ended
        last[bar.at] = bar


# ---------------------------------------------------------------------- the Gantt

#: Colours that keep a contrast of 4.5 with what they stand on, light and dark.
STYLE: Final = """
.stroma{--ink:#0f172a;--dim:#475569;--paper:#fff;--soft:#f1f5f9;--rule:#cbd5e1;--good:#15803d;--bad:#b91c1c;--warn:#a16207;
--note:#1d4ed8;--sel:#fef3c7;--badbg:#fef2f2;color:var(--ink);background:var(--paper);
font:14px/1.5 system-ui,-apple-system,'Segoe UI',Roboto,sans-serif;text-align:left;color-scheme:light dark}
@media(prefers-color-scheme:dark){.stroma{--ink:#f1f5f9;--dim:#cbd5e1;--paper:#0f172a;--soft:#1e293b;--rule:#475569;
--good:#4ade80;--bad:#fca5a5;--warn:#fcd34d;--note:#93c5fd;--sel:#422006;--badbg:#450a0a}}
.stroma *{box-sizing:border-box}.stroma a{color:var(--note)}
.stroma code,.stroma pre,.stroma .mono{font-family:ui-monospace,SFMono-Regular,Menlo,Consolas,'DejaVu Sans Mono',monospace;font-size:12.5px}
.stroma pre{white-space:pre-wrap;overflow-wrap:anywhere;margin:.3em 0}
.stroma h1{font-size:20px;margin:.2em 0;overflow-wrap:anywhere}.stroma h2{font-size:16px;margin:1.2em 0 .4em}
.stroma .dim{color:var(--dim)}.stroma .good{color:var(--good)}.stroma .bad{color:var(--bad)}.stroma .warn{color:var(--warn)}
.stroma .status{font-weight:600}.stroma .facts{display:flex;flex-wrap:wrap;gap:.2em 1.6em;margin:.4em 0}
.stroma .facts b{font-weight:600}.stroma .cause{border:1px solid var(--bad);border-left-width:6px;border-radius:6px;
background:var(--badbg);padding:.6em .9em;margin:.8em 0;overflow-wrap:anywhere}.stroma .cause p{margin:.2em 0}
.stroma .row{display:grid;grid-template-columns:minmax(9em,24%) 1fr 23em;gap:.8em;align-items:center;
padding:2px 0;border-top:1px solid var(--rule)}
.stroma .row svg{width:100%;height:22px;display:block;background:var(--soft)}
.stroma .row .name{overflow:hidden;text-overflow:ellipsis;white-space:nowrap}.stroma .row .fig{text-align:right;color:var(--dim);
font-variant-numeric:tabular-nums;white-space:nowrap}
.stroma .kids{padding-left:1.2em;border-left:2px solid var(--rule)}
.stroma summary{cursor:pointer;min-height:24px}.stroma summary.row::before{content:none}.stroma details[open]>summary .fold::before{content:'\\25be '}
.stroma .fold::before{content:'\\25b8 '}.stroma summary:focus-visible,.stroma a:focus-visible{outline:2px solid var(--note);outline-offset:1px}
.stroma .b-success{fill:var(--good)}.stroma .b-failure{fill:var(--bad)}.stroma .b-cancelled,.stroma .b-suspended{fill:var(--warn)}
.stroma .b-forked{fill:var(--dim)}.stroma .b-wait{fill:url(#stroma-hatch)}.stroma .hatch{stroke:var(--dim)}
.stroma .b-on{stroke:var(--ink);stroke-width:1.5;vector-effect:non-scaling-stroke}
body.stroma{margin:0 auto;padding:1em;max-width:110em}.stroma .defs{position:absolute;width:0;height:0}
.stroma .attempt{border-top:1px solid var(--rule);padding:.4em 0}.stroma .attempt:target{background:var(--sel)}
.stroma .two{display:grid;grid-template-columns:1fr 1fr;gap:1em}.stroma .two>div{min-width:0}
.stroma ul.tree{list-style:none;margin:0;padding-left:1.1em}.stroma .tree>li{overflow-wrap:anywhere}
.stroma .key{color:var(--note)}.stroma .broke{background:var(--badbg);outline:1px solid var(--bad);border-radius:3px}
@media(max-width:760px){.stroma .row{grid-template-columns:1fr;gap:.1em}.stroma .row .fig{text-align:left;white-space:normal}.stroma .two{grid-template-columns:1fr}}
"""

_HATCH: Final = (
    '<svg class="defs" aria-hidden="true"><defs><pattern id="stroma-hatch" width="6" height="6" '
    'patternUnits="userSpaceOnUse" patternTransform="rotate(45)"><path class="hatch" d="M0 0V6" stroke-width="2"/>'
    "</pattern></defs></svg>"
)
_WIDE: Final = 1000


def gantt(
    bars: Sequence[Bar],
    *,
    link: Callable[[Bar], str] | None = None,
    selected: str | None = None,
    fold_idle: bool = False,
) -> str:
    """Return a row for every node, with a bar for every attempt and a hatched one for every wait; groups fold.

    ``link``: where a bar leads to. ``selected``: the key of an attempt that is marked; its group is open. ``fold_idle``:
    stretches in which nothing ran are drawn as short ones.
    """
    shown = _most_telling(bars)
    if not shown:
        return '<p class="dim">no attempt has ended yet</p>'
    at_ms = places((bar.began_ms, bar.took_ms) for bar in shown) if fold_idle else float
    end = max(at_ms(bar.began_ms + bar.took_ms) for bar in shown) or 1.0
    rows: dict[str, list[Bar]] = {}
    for bar in shown:
        rows.setdefault(bar.at, []).append(bar)
    pauses: dict[str, list[tuple[float, float, float]]] = {}
    for bar, began, took in waits(shown):
        drawn_at = at_ms(began)
        pauses.setdefault(bar.at, []).append((drawn_at, at_ms(began + took) - drawn_at, took))
    children: dict[str, list[str]] = {}
    for at in sorted(rows, key=_order):
        parent = at.rpartition(".")[0]
        while parent and parent not in rows:  # A group that has not ended has no row.
            parent = parent.rpartition(".")[0]
        children.setdefault(parent, []).append(at)

    def draw(at: str) -> str:
        line = _row(rows[at], pauses.get(at, []), at_ms, end, link, selected, folds=at in children)
        if at not in children:
            return f'<div class="row">{line}</div>'
        inside = "".join(draw(child) for child in children[at])
        is_open = " open" if _is_telling(at, rows, selected) else ""
        return f'<details{is_open}><summary class="row">{line}</summary><div class="kids">{inside}</div></details>'

    drawn = "".join(draw(at) for at in children.get("", []))
    left_out = len(bars) - len(shown)
    more = f'<p class="dim">and {pluralize(left_out, "attempt")} more</p>' if left_out else ""
    return f'{_HATCH}<div class="gantt">{drawn}</div>{more}'


def idle_ms(bars: Iterable[Bar]) -> float:
    """Return the length of the idle stretches long enough to fold, in milliseconds."""
    return idle((bar.began_ms, bar.took_ms) for bar in bars)


def _most_telling(bars: Sequence[Bar]) -> list[Bar]:
    if len(bars) <= MOST:
        return list(bars)
    # Those that did not succeed tell most; the rest in the order in which they came.
    ranked = sorted(range(len(bars)), key=lambda i: (bars[i].outcome == "success", i))[:MOST]
    return [bars[i] for i in sorted(ranked)]


def _order(at: str) -> tuple[int, ...]:
    return tuple(int(part) if part.isdecimal() else 0 for part in at.split("."))


def _is_telling(at: str, rows: dict[str, list[Bar]], selected: str | None) -> bool:
    inside = [bar for place, row in rows.items() if place.startswith(f"{at}.") for bar in row]
    return any(bar.key == selected for bar in inside)


def _row(
    bars: list[Bar],
    pauses: list[tuple[float, float, float]],
    at_ms: Callable[[float], float],
    end: float,
    link: Callable[[Bar], str] | None,
    selected: str | None,
    *,
    folds: bool,
) -> str:
    last = bars[-1]
    scale = _WIDE / end
    if folds:  # What folds is itself what one presses: its attempts are led to from elsewhere.
        link = None
    drawn = [
        f'<rect class="b-wait" x="{began * scale:.1f}" y="7" width="{max(width * scale, 2):.1f}" height="8">'
        f"<title>waited {format_duration(took / 1000)}</title></rect>"
        for began, width, took in pauses
    ]
    for bar in bars:
        on = " b-on" if bar.key == selected else ""
        began = at_ms(bar.began_ms)
        width = at_ms(bar.began_ms + bar.took_ms) - began
        x = min(began * scale, _WIDE - 7)
        rect = f'<rect class="b-{as_xml(bar.outcome)}{on}" x="{x:.1f}" y="2" width="{max(width * scale, 6):.1f}" height="18"'
        title = f"<title>{as_xml(_bar_title(bar))}</title>"
        drawn.append(
            f"{rect}>{title}</rect>" if link is None else f'<a href="{as_xml(link(bar))}">{title}{rect}/></a>'
        )
    used = sum(bar.tokens for bar in bars)
    cost = sum(bar.cost_usd for bar in bars)
    tries = f" · {pluralize(len(bars), 'attempt')}" if len(bars) > 1 else ""
    spent = f" · {format_tokens(used)} · {format_usd(cost)}" if used or cost else ""
    tone = {"success": "good", "failure": "bad", "forked": "dim"}.get(last.outcome, "warn")
    fold = "fold " if folds else ""
    # Without a link, nothing in the image can be pressed.
    role, label = (
        ("img", _bar_title(last)) if link is None else ("group", f"attempts of {clean(last.node_id, 100)}")
    )
    took = sum(bar.took_ms for bar in bars)
    ran = sum(bar.took_ms if bar.function_ms is None else bar.function_ms for bar in bars)
    return (
        f'<span class="name {fold}{tone}" title="{as_xml(last.node_id)}"><span class="dim mono">{as_xml(last.at)}</span> '
        f"{as_xml(clean(last.node_id, 60))}</span>"
        f'<svg viewBox="0 0 {_WIDE} 22" preserveAspectRatio="none" role="{role}" aria-label="{as_xml(label)}">{"".join(drawn)}</svg>'
        f'<span class="fig">{duration(took, ran)}{tries}{spent}</span>'
    )


def _bar_title(bar: Bar) -> str:
    why = f": {bar.failure_class}{f' ({bar.reason})' if bar.reason else ''}" if bar.failure_class else ""
    message = f": {clean(bar.message, 200)}" if bar.message else ""
    return f"{clean(bar.node_id, 100)}, attempt {bar.attempt}, {bar.outcome}{why}, {duration(bar.took_ms, bar.function_ms)}{message}"


def duration(took_ms: float, function_ms: float | None) -> str:
    """Return how long an attempt took, and for how long functions ran in it where that is less: of a group with waits."""
    took = format_duration(took_ms / 1000)
    ran = took if function_ms is None or took_ms - function_ms < 1 else format_duration(function_ms / 1000)
    return took if ran == took else f"{took} (functions {ran})"


# ---------------------------------------------------------------------- states


def tree(value: Any, broke: Iterable[str] = ()) -> str:
    """JSON data as a tree that folds, the fields at these paths marked; what is too much to show is counted."""
    marks = set(broke)
    room = [_ITEMS]
    return f'<ul class="tree mono">{_branch("", value, "", marks, room, 0)}</ul>'


def _branch(key: str, value: Any, path: str, marks: set[str], room: list[int], depth: int) -> str:
    room[0] -= 1
    name = f'<span class="key">{as_xml(clean(key, 200))}</span>: ' if key else ""
    broke = ' class="broke"' if path and path in marks else ""
    if isinstance(value, (dict, list)) and value and depth < _DEEPEST:
        items = value.items() if isinstance(value, dict) else enumerate(value)
        parts: list[str] = []
        for inner, held in items:
            if room[0] <= 0:
                parts.append(f'<li class="dim">… {pluralize(len(value) - len(parts), "item")} more</li>')
                break
            at = f"{path}.{inner}" if path else str(inner)
            parts.append(_branch(str(inner), held, at, marks, room, depth + 1))
        what = pluralize(len(value), "field" if isinstance(value, dict) else "item")
        holds = any(mark.startswith(f"{path}.") for mark in marks) if path else True
        is_open = " open" if depth < 2 or holds else ""
        return (
            f'<li{broke}><details{is_open}><summary>{name}<span class="dim">{what}</span></summary>'
            f'<ul class="tree">{"".join(parts)}</ul></details></li>'
        )
    left_out = 0
    if isinstance(value, str) and len(value) > _TEXT:
        value, left_out = value[:_TEXT], len(value) - _TEXT
    text = json.dumps(value, ensure_ascii=False, default=str) if depth < _DEEPEST else "…"
    cut = f'<span class="dim">… {left_out:,} more characters</span>' if left_out else ""
    return f"<li{broke}>{name}{as_xml(text)}{cut}</li>"


# ---------------------------------------------------------------------- the page


def fragment(story: Story, *, states: bool = True) -> str:
    """Return the page as a ``div`` with its style, for a notebook."""
    return f'<div class="stroma"><style>{STYLE}</style>{_body(story, states=states)}</div>'


def document(story: Story) -> str:
    """Return one self-contained HTML file: it loads nothing and runs nothing."""
    digest = base64.b64encode(hashlib.sha256(STYLE.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width,initial-scale=1"><meta name="referrer" content="no-referrer">'
        f"<title>{as_xml(clean(story.pipeline, 80))}: {as_xml(story.status)}</title><style>{STYLE}</style></head>"
        f'<body class="stroma"><main>{_body(story, states=True)}</main></body></html>\n'
    )


def utc(ms: int) -> str:
    """Return a time in UTC; ``ms`` since the epoch. "?" for an invalid time."""
    try:
        return datetime.fromtimestamp(ms / 1000, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    except (ValueError, OverflowError, OSError):
        return "?"


def head(story: Story) -> str:
    """Return the summary of a run and its outcome."""
    tokens, cost = story.wasted
    wasted = f" (wasted {format_tokens(tokens)}, {format_usd(cost)})" if tokens or cost else ""
    began = ""
    if story.began_ms:
        when = utc(story.began_ms)
        began = f"<span><b>began</b> {as_xml(when)}</span>"
    more = "".join(f"<span><b>{as_xml(name)}</b> {as_xml(clean(text))}</span>" for name, text in story.facts)
    tone = (
        "good"
        if story.status in ("COMPLETED", "RESUMED")
        else "bad"
        if story.status in ("FAILED", "PARTIAL")
        else "warn"
    )
    return (
        f'<h1>{as_xml(clean(story.pipeline or "run", 200))} <span class="status {tone}">{as_xml(story.status)}</span></h1>'
        f'<div class="facts"><span><b>run</b> <code>{as_xml(clean(story.run_id, 400))}</code></span>{began}'
        f"<span><b>duration</b> {format_duration(story.seconds)}</span><span><b>spent</b> {format_tokens(story.tokens)}, {format_usd(story.cost_usd)}{wasted}</span>"
        f"<span><b>attempts</b> {len(story.bars) + story.left_out:,}</span>{more}</div>"
    )


def cause(story: Story) -> str:
    """Return the box with the cause that stopped a run, its cost, and how to resume; "" if nothing did."""
    box = story.box
    if box is None:
        return ""
    tokens, cost = story.wasted
    why = f"{box.failure_class}{f' ({box.reason})' if box.reason else ''}"
    fields = "".join(f"<code>{as_xml(path)}</code> " for path in box.fields[:20])
    named = f"<p><b>field</b> {fields}</p>" if fields else ""
    resume = (
        f"<p><b>resume with</b> <code>{as_xml(box.resume_command)}</code></p>" if box.resume_command else ""
    )
    return (
        f'<section class="cause" aria-label="cause"><p><b class="bad">{as_xml(why)}</b> at node <b>{as_xml(clean(box.node_id, 200))}</b> '
        f"(at {as_xml(box.at)}, attempt {box.attempt})</p><pre>{as_xml(visible(box.message[:_TEXT]))}</pre>{named}"
        f"<p><b>spent</b> {format_tokens(story.tokens)}, {format_usd(story.cost_usd)}; of it on attempts without output {format_tokens(tokens)}, {format_usd(cost)}</p>{resume}</section>"
    )


def _body(story: Story, *, states: bool) -> str:
    shown = _most_telling(story.bars)
    failed = next((bar for bar in reversed(shown) if bar.outcome == "failure"), None)
    details = "".join(_attempt(bar) for bar in shown) if states else ""
    return (
        f"{head(story)}{cause(story)}{gantt(story.bars, link=(lambda bar: f'#{bar.key}') if states else None, selected=failed.key if failed else None)}"
        + (f"<h2>Attempts</h2>{details}" if details else "")
    )


def _attempt(bar: Bar) -> str:
    broke = fields_named(bar.message or "")
    side = "input" if "(input)" in (bar.message or "")[:4000] else "output"
    message = f'<pre class="bad">{as_xml(visible(bar.message[:_TEXT]))}</pre>' if bar.message else ""
    model = f" · {as_xml(clean(bar.model, 80))}" if bar.model else ""
    states = "".join(
        f'<div><span class="dim">{name}</span>{tree(value, broke if side == name else ())}</div>'
        for name, value in (("input", bar.input_state), ("output", bar.output_state))
        if value is not None
    )
    return (
        f'<details class="attempt" id="{bar.key}"><summary><span class="mono dim">{as_xml(bar.at)}</span> {as_xml(_bar_title(bar))}'
        f" · {format_tokens(bar.tokens)} · {format_usd(bar.cost_usd)}{model}</summary>{message}"
        f'<div class="two">{states}</div></details>'
    )


#: What is long for a stretch without work, and how it is drawn when folded: parts of the time with work.
_LONG: Final = 0.1
_SHORT: Final = 0.03


def _gaps(spans: Iterable[tuple[float, float]]) -> tuple[list[tuple[float, float]], float]:
    """(from, to) of each long stretch in which nothing ran, and how long something did. ``spans``: (start, duration)."""
    gaps: list[tuple[float, float]] = []
    busy = reached = 0.0
    for began, took in sorted(spans):
        if began > reached:
            gaps.append((reached, began))
        busy += max(0.0, began + took - max(reached, began))
        reached = max(reached, began + took)
    return [(a, b) for a, b in gaps if b - a > _LONG * busy], busy


def idle(spans: Iterable[tuple[float, float]]) -> float:
    """Return the length of the idle stretches long enough to fold. ``spans``: (start, duration)."""
    return sum(b - a for a, b in _gaps(spans)[0])


def places(spans: Iterable[tuple[float, float]]) -> Callable[[float], float]:
    """Return a monotonic function from a time to its position once the idle stretches are folded, in the same unit."""
    gaps, busy = _gaps(spans)
    short = _SHORT * busy
    ends = [b for _, b in gaps]
    saved = [0.0, *itertools.accumulate(b - a - short for a, b in gaps)]

    def place(time: float) -> float:
        past = bisect.bisect_right(ends, time)
        if past < len(gaps) and time > gaps[past][0]:  # In the midst of one.
            a, b = gaps[past]
            return a - saved[past] + (time - a) / (b - a) * short
        return time - saved[past]

    return place
