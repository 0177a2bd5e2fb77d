"""Files of stores under power cuts, and files that are damaged as a whole."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.store_suite.journal import State, begin, commit, finish, restored

from stroma.checkpoint import SQLiteStore, StoreError
from stroma.checkpoint.payloads import DirectoryBlobs
from stroma.runner.items import LinesFile

NAME = "ab" + "0" * 62


def _synced(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The directories that are synced from now on, as they are called."""
    findings: list[str] = []
    fsync = os.fsync

    def note(descriptor: int) -> None:
        findings.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", note)
    return findings


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="the system does not say what is synced")
def test_a_new_directory_of_blobs_is_durable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever put() made, directories too, is synced into what names it before put() returns."""
    synced = _synced(monkeypatch)
    root = tmp_path / "state" / "blobs"
    DirectoryBlobs(root).put(NAME, b"x")
    for directory in (tmp_path, root.parent, root, root / NAME[:2]):
        assert str(directory) in synced


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="the system does not say what is synced")
def test_a_blob_of_another_writer_is_synced_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A blob, or its directory, that another writer made a moment ago may not be safe yet: put() syncs it."""
    root = tmp_path / "blobs"
    DirectoryBlobs(root).put(NAME, b"x")
    synced = _synced(monkeypatch)
    DirectoryBlobs(root).put(NAME, b"x")
    for directory in (tmp_path, root, root / NAME[:2]):
        assert str(directory) in synced


async def _write_unmerged(path: Path) -> None:
    """Write a commit that is only in the WAL, as a killed process leaves it."""
    live = path.with_name("live.db")
    async with SQLiteStore(live) as store:
        await commit(await begin(store), 0, State(n=1))
        for end in ("", "-wal"):
            shutil.copy(f"{live}{end}", f"{path}{end}")


def _missing(path: Path) -> None:
    path.unlink()


def _empty(path: Path) -> None:
    os.truncate(path, 0)


@pytest.mark.parametrize("damage", [_missing, _empty])
async def test_a_wal_without_its_file_is_damage(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    """A file that is missing or empty beside a WAL with commits is refused; the WAL stays for a restore."""
    path, wal = tmp_path / "runs.db", tmp_path / "runs.db-wal"
    await _write_unmerged(path)
    shutil.copy(path, tmp_path / "copy")
    entry = wal.read_bytes()
    assert entry
    damage(path)
    with SQLiteStore(path) as store:
        for call in (lambda: begin(store), store.list_runs):
            with pytest.raises(
                StoreError, match=r"is damaged: it is missing or empty, and .*-wal"
            ) as refused:
                await _settled(call())
            assert not refused.value.transient
    assert wal.read_bytes() == entry
    shutil.copy(tmp_path / "copy", path)
    with SQLiteStore(path) as store:
        again = await begin(store, if_exists="resume", if_running="take_over")
        assert restored(again) == {(0, ""): State(n=1)}


async def _settled(value: Any) -> Any:
    return await value if hasattr(value, "__await__") else value


async def test_an_empty_file_is_an_empty_store(tmp_path: Path) -> None:
    """A file that somebody made for the store, with no WAL or an empty one, is used."""
    path = tmp_path / "runs.db"
    path.touch()
    (tmp_path / "runs.db-wal").touch()
    async with SQLiteStore(path) as store:
        assert store.list_runs() == []
        session = await begin(store)
        await commit(session, 0, State())
        await finish(session)
    assert path.stat().st_size


def test_each_execution_writes_a_part_of_its_own(tmp_path: Path) -> None:
    """A fenced process spoils nothing of the next one's file, however late it is."""
    path = tmp_path / "out.jsonl"
    stale, owner = LinesFile(path, "run"), LinesFile(path, "run")
    stale.open()
    stale.write([{"old": 1}])
    owner.open()
    owner.write([{"new": 1}])
    stale.write([{"old": 2}] * 10_000)
    with pytest.raises(FileNotFoundError):
        stale.publish()
    stale.discard()
    owner.write([{"new": 2}])
    owner.publish()
    assert path.read_text() == '{"new":1}\n{"new":2}\n'
    assert list(tmp_path.iterdir()) == [path]


def test_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    """The part of a process that died goes with the next execution; that of another run stays."""
    path = tmp_path / "out.jsonl"
    dead, other = LinesFile(path, "run"), LinesFile(path, "other")
    dead.open()
    other.open()
    owner = LinesFile(path, "run")
    owner.open()
    owner.publish()
    assert len(list(tmp_path.iterdir())) == 2
    other.publish()
    assert list(tmp_path.iterdir()) == [path]
