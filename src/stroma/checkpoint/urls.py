"""Stores by URL."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING
from urllib.parse import parse_qsl, unquote, urlsplit

from stroma.checkpoint.memory.store import AsyncInMemoryStore
from stroma.checkpoint.sqlite.store import SQLiteStore

if TYPE_CHECKING:
    from stroma.checkpoint.postgres.store import PostgresStore
    from stroma.checkpoint.redis.store import RedisStore

_FORMS = (
    "sqlite:///relative.db, sqlite:////absolute.db, a path, postgresql://user@host/db, redis://host/0, "
    "or memory://"
)


def open_store(url: str | os.PathLike[str]) -> SQLiteStore | PostgresStore | RedisStore | AsyncInMemoryStore:
    """Return the store for a URL or a path. Its file or server is opened on first use.

    ``sqlite:///runs.db`` (relative), ``sqlite:////var/lib/runs.db`` (absolute), either with
    ``?synchronous=normal``; ``runs.db`` (a path); ``postgresql://user@host:5432/db``, see PostgresStore;
    ``redis://host:6379/0``, see RedisStore; ``memory://``. In a URL, special characters are percent-encoded.

    Args:
        url: the URL, or the path of a SQLite file.

    Raises ValueError for anything else, StoreError for a SQLite file in a directory that does not exist.
    """
    text = os.fsdecode(url)
    scheme, separator, rest = text.partition("://")
    if not separator:
        return SQLiteStore(text)
    scheme = scheme.lower()
    if scheme == "memory" and not rest:
        return AsyncInMemoryStore()
    if scheme in ("postgresql", "postgres"):
        from stroma.checkpoint.postgres.store import PostgresStore

        return PostgresStore(f"{scheme}://{rest}")
    if scheme in ("redis", "rediss", "unix"):
        from stroma.checkpoint.redis.store import RedisStore

        return RedisStore(f"{scheme}://{rest}")
    if scheme not in ("memory", "sqlite"):
        raise ValueError(f"{scheme}:// stores are not available in this release; use {_FORMS}")
    parts = urlsplit(text)
    path = unquote(parts.path[1:])
    if scheme == "memory" or parts.netloc or parts.fragment or not path or path == ":memory:":
        raise ValueError(f"{text!r} names no database file; use {_FORMS}")
    options = dict(parse_qsl(parts.query, keep_blank_values=True))
    synchronous = options.pop("synchronous", "full")
    if options or synchronous not in ("full", "normal"):
        raise ValueError(f"unknown option in {text!r}; use ?synchronous=full or ?synchronous=normal")
    return SQLiteStore(path, synchronous="normal" if synchronous == "normal" else "full")
