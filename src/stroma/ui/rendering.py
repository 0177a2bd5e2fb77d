"""The store, the keys of forms and the templates, which all pages share."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
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
from stroma.checkpoint.history.reader import History
from stroma.checkpoint.history.redaction import Payload
from stroma.checkpoint.records import AttemptRecord, RunRecord
from stroma.limits.rate_limit import read_cooldowns
from stroma.trace.html import utc
from stroma.trace.outline import tone_of
from stroma.trace.timeline import HATCHES
from stroma.ui.components import chip, icon, meter
from stroma.ui.formatting import ago, duration_text, local_times, mark_controls, quoted, to_address, to_json

if TYPE_CHECKING:
    from stroma.ui.security import Keys
    from stroma.ui.settings import Settings

#: Larger payloads are not shown, only downloadable.
MAX_SHOWN_BYTES: Final = 1_000_000
#: The state that an event named, as an open page sends it back when it asks for itself again.
_STATE_HEADER: Final = "x-stroma-state"
_MAX_PAGES: Final = 50
_MAX_STATE_LENGTH: Final = 100  # characters
#: CPU seconds of a request for a page that is rendered already.
_REQUEST_SECONDS: Final = 0.002
#: Open pages are notified of changes so seldom that their requests take at most one part in so many of a
#: core.
_SHARE: Final = 25


def now_ms() -> int:
    """Return the moment, in ms since 1970."""
    return time.time_ns() // 1_000_000


class SharedPages:
    """Pages with many viewers: each is rendered once for a state of the store. Safe for threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._pages: dict[tuple[str, str], Response] = {}
        self._seconds: dict[str | None, float] = {}

    def get(self, request: Request, run_id: str | None, render: Callable[[], Response]) -> Response:
        """Return the page of a request; for the state of an event, as rendered for another viewer.

        ``run_id``: the run on the page; None for the list of runs.
        """
        state = request.headers.get(_STATE_HEADER, "")[:_MAX_STATE_LENGTH]
        if not state:
            return self._render(run_id, render)
        key = str(request.url), state
        with self._lock:
            page = self._pages.get(key)
            if page is None:
                if len(self._pages) >= _MAX_PAGES:
                    self._pages.clear()
                page = self._pages[key] = self._render(run_id, render)
            return page

    def _render(self, run_id: str | None, render: Callable[[], Response]) -> Response:
        began = time.thread_time()
        page = render()
        if len(self._seconds) >= _MAX_PAGES:
            self._seconds.clear()
        self._seconds[run_id] = time.thread_time() - began
        return page

    def interval(self, run_id: str | None, viewers: int) -> float:
        """Return the least seconds between two notifications of so many viewers of a run, or of the list."""
        return _SHARE * (self._seconds.get(run_id, 0.0) + viewers * _REQUEST_SECONDS)


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
            "local": local_times,
            "short": short_id,
            "when": utc,
            "ago": ago,
        }
        self._templates.globals |= {
            "quoted": quoted,
            "to": to_address,
            "store_name": settings.name,
            "pipeline_names": list(settings.pipelines),
            "cooldowns": self._cooldowns,
            "can_submit": any(one.submission is not None for one in settings.pipelines.values()),
            "worker_command": lambda run=None: settings.command("worker", run),
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

    def problem(self, status: int, what: str, more: str, run_id: str = "") -> Response:
        """Return a page with an error. ``run_id``: the run of a form that was refused."""
        return self.page("problem.html", status, what=what, more=more, run_id=run_id)

    def find_record(self, request: Request, name: str = "id") -> RunRecord:
        run_id = request.query_params.get(name, "")
        try:
            record = self.history.store.get_run(run_id) if self.store.exists() else None
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
