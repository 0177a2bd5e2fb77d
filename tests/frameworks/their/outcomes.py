"""A plugin of pytest that writes the outcome of each test to the file that STROMA_OUTCOMES names."""

import json
import os
from pathlib import Path
from typing import Any

_OUTCOMES: dict[str, str] = {}


def pytest_runtest_logreport(report: Any) -> None:
    """Note the outcome: a test whose setup or teardown fails has failed."""
    if report.when == "call" or report.outcome == "failed":
        known = _OUTCOMES.get(report.nodeid)
        _OUTCOMES[report.nodeid] = "failed" if "failed" in (known, report.outcome) else report.outcome


def pytest_sessionfinish(session: Any) -> None:
    """Write them, in the process that has all of them."""
    if not hasattr(session.config, "workerinput"):
        Path(os.environ["STROMA_OUTCOMES"]).write_text(json.dumps(_OUTCOMES), "utf-8")
