"""One run as HTML: a box with the cause, a timeline, and every attempt with its states.

Rows of plain data come in, text goes out that stands by itself: no script, no font, no address, no style
attribute, every word escaped. A notebook, the file to attach to a bug report, ``stroma export --format html``
and the web interface share it.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, Final

from stroma._utils.svg import as_xml
from stroma._utils.text import (
    clean,
    format_duration,
    format_time,
    format_tokens,
    format_usage,
    format_usd,
    pluralize,
    visible,
)
from stroma.failures.classes import FailureClass
from stroma.trace.outline import bar_title, select_bars, shown_place, tone_of
from stroma.trace.rejected import Complaint, RejectedOutput
from stroma.trace.story import Bar, Story, fields_named
from stroma.trace.timeline import HATCHES, LEGEND, Timeline

_ITEMS: Final = 400  # of one payload
_TEXT: Final = 2000  # characters of one text in it
_DEEPEST: Final = 30
#: Of the page around the timeline.
_PAGE_STYLE: Final = """
& *{box-sizing:border-box}
&{color:var(--ink);background:var(--bg);
font:13px/20px system-ui,-apple-system,'Segoe UI',Roboto,sans-serif;text-align:left}
& a{color:var(--accent-ink)}
summary:focus-visible,& a:focus-visible{outline:2px solid var(--accent);outline-offset:1px}
h1{font-size:20px;line-height:28px;font-weight:600;margin:4px 0;overflow-wrap:anywhere}
h2{font-size:14px;line-height:20px;font-weight:600;margin:24px 0 8px}
.status{font-size:14px}
.facts{display:flex;flex-wrap:wrap;gap:2px var(--s4);margin:var(--s2) 0 var(--s4);color:var(--ink2)}
.facts b{font-weight:400;color:var(--ink3)}
.box{background:var(--card);border:1px solid var(--line);border-radius:10px}.legend{margin:0 0 var(--s2)}
.cause p{margin:0}
.attempt{border-top:1px solid var(--line);padding:6px var(--s4)}.attempt:first-child{border:0}
.attempt:target{background:var(--accent-soft)}
.attempt summary{min-height:24px}.two{display:grid;grid-template-columns:1fr 1fr;gap:var(--s4)}
.two>div{min-width:0}
.rejected{border-collapse:collapse}.rejected th{text-align:left;font-weight:500;color:var(--ink3)}
.pad{padding:var(--s4);margin:0}
.defs{position:absolute;width:0;height:0}body&{margin:0 auto;padding:var(--s4);max-width:1760px}
@media(max-width:760px){.two{grid-template-columns:1fr}}
"""


@cache
def _style() -> str:
    """Return the style of a page: the shared one and its own, for elements inside ``.stroma`` alone."""
    shared = (Path(__file__).parent / "static" / "design.css").read_text("utf-8")
    return f".stroma{{{shared.replace(':root', '&')}{_PAGE_STYLE}}}"


def tree(value: Any, broke: Iterable[str] = ()) -> str:
    """JSON data as a tree that folds, with the fields at these paths marked; the rest is counted."""
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


def rejected_output(rejected: RejectedOutput) -> str:
    """Return a rejected output beside the complaints of its contract, field by field."""
    rows = "".join(_complaint(rejected, one) for one in rejected.complaints)
    more = f'<p class="dim">… {pluralize(rejected.more, "complaint")} more</p>' if rejected.more else ""
    cut = '<p class="dim">The output was larger: this is the beginning of it.</p>' if rejected.is_cut else ""
    marks = [".".join(map(str, one.path)) for one in rejected.complaints]
    return (
        '<table class="rejected"><thead><tr><th scope="col">Field</th><th scope="col">Complaint</th>'
        f'<th scope="col">Value</th></tr></thead><tbody>{rows}</tbody></table>{more}'
        f"{tree(rejected.value, marks)}{cut}"
    )


def _complaint(rejected: RejectedOutput, one: Complaint) -> str:
    value = rejected.text_of(one)
    came = f"<code>{as_xml(value)}</code>" if value else ""
    return (
        f"<tr><td><code>{as_xml(clean(one.field, 200))}</code></td><td>{as_xml(clean(one.message, 400))}</td>"
        f"<td>{came}</td></tr>"
    )


def fragment(story: Story, *, states: bool = True) -> str:
    """Return the page as a ``div`` with its style, for a notebook."""
    return f'<div class="stroma"><style>{_style()}</style>{_body(story, states=states)}</div>'


def document(story: Story) -> str:
    """Return one self-contained HTML file: it loads nothing and runs nothing."""
    digest = base64.b64encode(hashlib.sha256(_style().encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width,initial-scale=1"><meta name="referrer" '
        'content="no-referrer">'
        f"<title>{as_xml(clean(story.pipeline, 80))}: {as_xml(story.status)}</title><style>"
        f"{_style()}</style></head>"
        f'<body class="stroma"><main>{_body(story, states=True)}</main></body></html>\n'
    )


def utc(ms: int) -> str:
    """Return a time in UTC; ``ms`` since the epoch."""
    return format_time(ms, "%Y-%m-%d %H:%M:%S UTC")


def head(story: Story) -> str:
    """Return the summary of a run and its outcome."""
    tokens, cost = story.wasted
    wasted = f" (wasted {format_usage(tokens, cost)})" if tokens or cost else ""
    began = ""
    if story.began_ms:
        when = utc(story.began_ms)
        began = f"<span><b>began</b> {as_xml(when)}</span>"
    more = "".join(
        f"<span><b>{as_xml(name)}</b> {as_xml(clean(text, _TEXT))}</span>" for name, text in story.remarks
    )
    return (
        f'<h1>{as_xml(clean(story.pipeline or "run", 200))} <span class="status {tone_of(story.status)}">'
        f"{as_xml(story.status)}</span></h1>"
        f'<div class="facts"><span><b>run</b> <code>{as_xml(clean(story.run_id, 400))}</code></span>{began}'
        f"<span><b>duration</b> {format_duration(story.seconds)}</span><span><b>spent</b> "
        f"{format_usage(story.tokens, story.cost_usd)}{wasted}</span>"
        f"<span><b>attempts</b> {len(story.bars) + story.left_out:,}</span>{more}</div>"
    )


def cause(story: Story, address: str = "") -> str:
    """Return the box with the cause that stopped a run, its cost, and how to resume; "" if nothing did.

    ``address``: of the page of the attempt that failed.
    """
    box = story.box
    if box is None:
        return ""
    tokens, cost = story.wasted
    fields = [(path, "") for path in box.fields[:20]]
    if box.rejected is not None:
        fields = [(one.field, box.rejected.text_of(one)) for one in box.rejected.complaints[:20]]
    codes = [
        f"<code>{as_xml(clean(path, 200))}</code>" + (f" got <code>{as_xml(value)}</code>" if value else "")
        for path, value in fields
    ]
    named = f"<p><b>Field</b> {' '.join(codes)}</p>" if codes else ""
    node = as_xml(clean(box.node_id, 200))
    node = f'<a href="{as_xml(address)}">{node}</a>' if address else node
    verb = "After a fix, resume with" if box.failure_class == FailureClass.TERMINAL else "Resume with"
    resume = f"<p><b>{verb}</b> <code>{as_xml(box.resume_command)}</code></p>" if box.resume_command else ""
    return (
        f'<section class="cause" aria-label="cause"><p><b class="bad">{as_xml(box.why)}</b> at node <b>'
        f"{node}</b> "
        f"(at {as_xml(shown_place(box.at))}, attempt {box.attempt})</p><pre>"
        f"{as_xml(visible(box.message[:_TEXT]))}</pre>{named}"
        f"<p><b>Spent</b> {format_usage(story.tokens, story.cost_usd)}, including "
        f"{format_usage(tokens, cost)} on attempts without output</p>{resume}</section>"
    )


def _body(story: Story, *, states: bool) -> str:
    shown = select_bars(story.bars)
    failed = next((bar for bar in reversed(shown) if bar.outcome == "failure"), None)
    details = "".join(_attempt(bar) for bar in shown) if states else ""
    link = (lambda bar: f"#{bar.key}") if states else None
    selected = None if story.box is None else failed
    timeline = Timeline(replace(story, bars=shown), link, selected=selected).draw()
    left_out = len(story.bars) - len(shown)
    more = f'<p class="dim">and {pluralize(left_out, "attempt")} more</p>' if left_out else ""
    attempts = f'<h2>Attempts</h2><div class="box">{details}</div>' if details else ""
    return (
        f"{head(story)}{cause(story)}{HATCHES}<h2>Timeline</h2>{LEGEND}"
        f'<div class="box">{timeline}</div>{more}{attempts}'
    )


def _attempt(bar: Bar) -> str:
    message = f'<pre class="bad">{as_xml(visible(bar.message[:_TEXT]))}</pre>' if bar.message else ""
    model = f" · {as_xml(clean(bar.model, 80))}" if bar.model else ""
    key = ""
    if bar.idempotency_key:
        key = f'<p class="dim">idempotency key <code>{as_xml(bar.idempotency_key)}</code></p>'
    rejected = ""
    if bar.rejected is not None:
        rejected = f'<div><span class="dim">rejected output</span>{rejected_output(bar.rejected)}</div>'
    states = "".join(
        f'<div><span class="dim">{name}</span>{tree(value, fields_named(bar.message or "", name))}</div>'
        for name, value in (("input", bar.input_state), ("output", bar.output_state))
        if value is not None
    )
    return (
        f'<details class="attempt" id="{bar.key}"><summary><span class="mono dim">'
        f"{as_xml(shown_place(bar.at))}</span> {as_xml(bar_title(bar))}"
        f" · {format_tokens(bar.tokens)} · {format_usd(bar.cost_usd)}{model}</summary>{key}{message}"
        f'{rejected}<div class="two">{states}</div></details>'
    )
