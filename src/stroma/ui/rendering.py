"""The store, the keys of forms and the templates, which all pages share."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape
from markupsafe import Markup
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response

from stroma._utils.text import clean, format_duration, format_tokens, format_usd, short_id
from stroma.checkpoint.cells import CellStore
from stroma.checkpoint.errors import StoreError
from stroma.checkpoint.history import History, Payload
from stroma.checkpoint.records import AttemptRecord, RunRecord
from stroma.limits.rate_limit import read_cooldowns
from stroma.trace.html import utc
from stroma.trace.timeline import HATCHES
from stroma.ui.components import chip, icon, meter, tone_of
from stroma.ui.formatting import ago, duration_text, mark_controls, to_address, to_json
from stroma.ui.shared_pages import SharedPages

if TYPE_CHECKING:
    from stroma.ui.security import Keys
    from stroma.ui.settings import Settings

__all__ = ["MAX_SHOWN_BYTES", "Renderer", "now_ms"]

#: Larger payloads are not shown, only downloadable.
MAX_SHOWN_BYTES: Final = 1_000_000


def now_ms() -> int:
    """Return the moment, in ms since 1970."""
    return time.time_ns() // 1_000_000


class Renderer:
    """Read runs of the store, and render the templates of pages."""

    def __init__(self, settings: Settings, history: History, keys: Keys) -> None:
        self.settings = settings
        self.history = history
        self.store = settings.store
        self.keys = keys
        self.shared = SharedPages()
        self._templates = Environment(
            loader=FileSystemLoader(Path(__file__).parent / "templates"),
            autoescape=select_autoescape(default=True, default_for_string=True),
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
            finalize=mark_controls,
        )
        self._templates.filters |= {
            "clean": clean,
            "money": format_usd,
            "count": format_tokens,
            "span": format_duration,
            "took": duration_text,
            "tone": tone_of,
            "json": to_json,
            "short": short_id,
            "when": utc,
            "ago": ago,
        }
        self._templates.globals |= {
            "to": to_address,
            "store_name": settings.name,
            "pipeline_name": settings.pipeline,
            "cooldowns": self._cooldowns,
            "can_submit": settings.submission is not None,
            "worker_command": lambda: settings.command("worker", "FILE.py:NAME"),
            "chip": chip,
            "icon": icon,
            "meter": meter,
            "now_ms": now_ms,
            "hatches": Markup(HATCHES),
            "here": "",
        }

    def page(self, template: str, code: int = 200, /, **values: Any) -> Response:
        text = self._templates.get_template(template).render(**values)
        # Stored text may contain lone surrogates, which UTF-8 cannot encode.
        return HTMLResponse(text.encode("utf-8", "replace"), code)

    def _cooldowns(self) -> dict[str, str]:
        """Return the limits in the store that are closed, and for how long."""
        if not isinstance(self.store, CellStore) or not self.store.exists():
            return {}
        try:
            closed = read_cooldowns(self.store)
        except StoreError:  # A damaged limit is reported where it is used.
            return {}
        return {
            name: f"for another {format_duration(ms / 1000)}" if ms else "until a call succeeds"
            for name, ms in closed.items()
        }

    def problem(self, status: int, what: str, more: str) -> Response:
        return self.page("problem.html", status, what=what, more=more)

    def find_record(self, request: Request, name: str = "id") -> RunRecord:
        run_id = request.query_params.get(name, "")
        try:
            record = self.history.run(run_id) if self.store.exists() else None
        except ValueError:
            record = None
        if record is None:
            raise HTTPException(404, "this store has no such run; it may have been deleted")
        return record

    def read_output(self, record: RunRecord, this: AttemptRecord) -> Payload:
        if this.output_bytes is None:
            return Payload(None, "no output")
        if this.output_bytes > MAX_SHOWN_BYTES:
            return Payload(None, f"{this.output_bytes:,} bytes, too large to show")
        return self.history.output_at(record.run_id, this.position, this.branch)
