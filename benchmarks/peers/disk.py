"""SQLite on a disk that takes longer to keep a transaction than the one at hand: the time is added to each COMMIT."""

from __future__ import annotations

import os
import sqlite3
import time
from typing import Any

#: Seconds.
SLOWER = float(os.environ.get("STROMA_BENCH_DISK_MS", "0")) / 1000


class Connection(sqlite3.Connection):
    def execute(self, sql: str, *parameters: Any) -> sqlite3.Cursor:
        done = super().execute(sql, *parameters)
        if SLOWER and sql == "COMMIT":
            time.sleep(SLOWER)  # Like an fsync it holds up this thread alone.
        return done
