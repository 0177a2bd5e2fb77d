"""Deletion of runs that ended long ago, and of blobs that no run references."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from datetime import timedelta
from functools import partial
from typing import Any, Final, NamedTuple

from stroma.checkpoint.durable.operations import Transaction
from stroma.checkpoint.durable.rows import Rows
from stroma.checkpoint.errors import CorruptCheckpoint
from stroma.checkpoint.payloads import BLOB, BlobStore, collect

__all__ = ["Collected", "collect_expired"]

_GC_PAGE_SIZE: Final = 5000  # expired runs of one query
_GC_BATCH_SIZE: Final = 50  # deletions submitted together: other operations wait for them


class Collected(NamedTuple):
    """Numbers of runs and blobs that gc() deleted."""

    runs: int
    blobs: int


async def collect_expired(
    read: Callable[..., Any],
    submit: Callable[[Transaction], Awaitable[Any]],
    keep_for: timedelta,
    *,
    unfinished: bool,
    blobs: BlobStore | None,
) -> Collected:
    """Do what :meth:`DurableStore.gc` says, by the ways in which a store reads and writes."""
    now_ms = await asyncio.to_thread(read, lambda rows: rows.now_ms(), 0)
    before = now_ms - int(keep_for.total_seconds() * 1000)
    deleted = 0
    while run_ids := await asyncio.to_thread(
        read,
        lambda rows: rows.expired_run_ids(before, unfinished=unfinished, limit=_GC_PAGE_SIZE),
        list[str](),
    ):
        results: list[bool] = []
        for first in range(0, len(run_ids), _GC_BATCH_SIZE):
            # The transaction that deletes a run checks it again.
            results += await asyncio.gather(
                *(
                    submit(Transaction(run_id, partial(_delete_if_free, run_id, before)))
                    for run_id in run_ids[first : first + _GC_BATCH_SIZE]
                )
            )
        deleted += sum(results)
        if not any(results):
            break  # The remaining runs have owners.
    swept = 0
    if blobs is not None:
        in_use = await asyncio.to_thread(read, _referenced_blobs, set[str]())
        swept = await asyncio.to_thread(collect, blobs, in_use, now_ms / 1000)
    return Collected(deleted, swept)


def _referenced_blobs(rows: Rows) -> set[str]:
    return {reference[len(BLOB) :].hex() for reference in rows.blobs()}


def _delete_if_free(run_id: str, before_ms: int, rows: Rows) -> bool:
    try:
        run = rows.find(run_id, lock=True)
    except CorruptCheckpoint:
        return False  # A damaged run may have an owner: it must be deleted by delete().
    if run is None or run.holder is not None or run.updated_ms >= before_ms:
        return False
    rows.delete(run_id)
    return True
