"""Payloads on their way into a store and back: codecs, blobs, retention."""

import asyncio
import importlib.util
import os
import sys
import time
import zlib
from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel, SecretBytes, SecretStr
from tests.kit import NEVER, Note, context_of, failing_with, passing, stuck
from tests.shared_stores import opened
from tests.store_suite.journal import JournalStoreTests

from stroma import (
    CorruptCheckpoint,
    NotSerialisable,
    Pipeline,
    PipelineChanged,
    RunExists,
    RunStatus,
    SQLiteStore,
    StoreError,
    StromaRunner,
    Suspend,
    current_node,
    execute_step,
    stroma_node,
)
from stroma.checkpoint.payloads import DirectoryBlobs, FsspecBlobs

EXAMPLE = Path(__file__).parents[2] / "examples" / "encrypted_store.py"
ONE, TWO = bytes(range(32)), bytes(range(32, 64))


def _example() -> Any:
    spec = importlib.util.spec_from_file_location("encrypted_store", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    sys.modules["encrypted_store"] = module
    spec.loader.exec_module(module)
    return module


AesGcm = _example().AesGcm


class Zip:
    """A codec that compresses."""

    def encode(self, data: bytes) -> bytes:
        return zlib.compress(data)

    def decode(self, data: bytes) -> bytes:
        return zlib.decompress(data)


class Login(BaseModel):
    user: str = ""
    password: SecretStr = SecretStr("")
    token: SecretBytes = SecretBytes(b"")


def node(
    node_id: str, func: Any, input_model: type[BaseModel] = Note, output_model: type[BaseModel] = Note
) -> Any:
    return stroma_node(node_id, input=input_model, output=output_model)(func)


def runner(store: Any, **config: Any) -> StromaRunner:
    return StromaRunner.quick(store=store, run_id="r", policy_map=NEVER, **config)


def _nodes(calls: list[str], *, fails: bool = False) -> list[Any]:
    async def first(state: Note) -> Any:
        calls.append("first")
        return {"text": "canary " + state.text}

    async def second(state: Note) -> Any:
        calls.append("second")
        if fails:
            raise ValueError("not yet")
        here = current_node()
        if here.signal is None:
            raise Suspend("may I?")
        return {"text": f"{state.text} {here.signal}"}

    return [node("first", first), node("second", second)]


class TestEncryptedStore(JournalStoreTests):
    """An encrypted store does all that a journal store must."""

    @pytest.fixture
    async def store(self, tmp_path: Path) -> AsyncIterator[Any]:
        codec = AesGcm({"one": ONE}, writes_with="one")
        async with SQLiteStore(
            tmp_path / "runs.db", codec=codec, blobs=tmp_path / "blobs", blob_bytes=200
        ) as store:
            yield store


@pytest.mark.core
async def test_every_payload_goes_through_the_codec(tmp_path: Path) -> None:
    """Inputs, outputs, answers, saved states and inputs of steps: the disk has no plain text."""
    path = tmp_path / "runs.db"
    codec = AesGcm({"one": ONE}, writes_with="one")
    calls: list[str] = []
    async with SQLiteStore(path, codec=codec) as store:
        nodes = _nodes(calls)
        await runner(store).run(nodes, Note(text="canary in"))
        await runner(store).signal("r", "canary answer")
        result = await runner(store, resume=True).run(nodes, Note(text="canary in"))
        assert result.status is RunStatus.RESUMED
        assert result.final_state == Note(text="canary canary in canary answer")
        await store.save("r", "by hand", Note(text="canary by hand"))
        steps = StromaRunner.quick(store=store, run_id="steps", resume=True)
        for _ in range(2):
            ctx = context_of(steps)
            async with ctx:
                await execute_step("s", nodes[0], Note(text="canary given"), ctx)
        assert calls == ["first", "second", "second", "first"]
        assert await store.load_typed("r", "by hand", Note) == Note(text="canary by hand")
        assert b"canary in" in store.input_of("r")
    for file in path.parent.iterdir():
        assert b"canary" not in file.read_bytes()


async def test_keys_are_rotated(tmp_path: Path) -> None:
    """What was written with an earlier key is read while that key is given; then the error says so.

    A repeated submission says so too: it must not take the run for one with another input.
    """
    pipeline = Pipeline("notes", _nodes([]))
    path = tmp_path / "runs.db"
    async with SQLiteStore(path, codec=AesGcm({"one": ONE}, writes_with="one")) as store:
        await runner(store).run(_nodes([], fails=True), Note(text="x"))
        await runner(store).submit(pipeline, Note(text="x"), run_id="queued")
    both = AesGcm({"one": ONE, "two": TWO}, writes_with="two")
    async with SQLiteStore(path, codec=both) as store:
        assert (
            await runner(store, resume=True).run(_nodes([]), Note(text="x"))
        ).status is RunStatus.SUSPENDED
        await runner(store).signal("r", 1)
    async with SQLiteStore(path, codec=AesGcm({"two": TWO}, writes_with="two")) as store:
        with pytest.raises(
            CorruptCheckpoint, match=r"'one', which is not given.*with the codec, and the keys"
        ):
            await runner(store, resume=True).run(_nodes([]), Note(text="x"))
        with pytest.raises(CorruptCheckpoint, match="'one', which is not given"):
            await runner(store).submit(pipeline, Note(text="x"), run_id="queued")
    async with SQLiteStore(path) as store:
        with pytest.raises(CorruptCheckpoint, match="open the store with codec="):
            await runner(store, resume=True).run(_nodes([]), Note(text="x"))
    async with SQLiteStore(path, codec=AesGcm({"one": TWO}, writes_with="one")) as store:
        with pytest.raises(CorruptCheckpoint, match="cannot be decoded"):
            store.input_of("r")


async def test_a_plain_store_becomes_an_encrypted_one(tmp_path: Path) -> None:
    """A codec may be added to a store that has plain payloads: they are read if asked, new ones use it."""
    path = tmp_path / "runs.db"
    async with SQLiteStore(path) as store:
        await runner(store).run(_nodes([], fails=True), Note(text="x"))
    async with SQLiteStore(path, codec=Zip(), plain_until_migrated=True) as store:
        calls: list[str] = []
        assert (
            await runner(store, resume=True).run(_nodes(calls), Note(text="x"))
        ).status is RunStatus.SUSPENDED
        assert calls == ["second"]
        with pytest.raises(PipelineChanged):
            await runner(store, resume=True).run(_nodes(calls), Note(text="y"))


@pytest.mark.core
async def test_a_lost_key_does_not_hinder_a_new_beginning(tmp_path: Path) -> None:
    """A run whose input cannot be opened any more can be begun again; what would go on with it is refused."""
    path = tmp_path / "runs.db"
    async with SQLiteStore(path, codec=Zip()) as store:
        await runner(store).run(_nodes([], fails=True), Note(text="x"))
    async with SQLiteStore(path) as store:
        for way in ("resume", "return"):
            with pytest.raises(CorruptCheckpoint, match="open the store with codec="):
                await runner(store, if_exists=way).run(_nodes([]), Note(text="x"))
        with pytest.raises(RunExists):
            await runner(store, if_exists="error").run(_nodes([]), Note(text="x"))
        calls: list[str] = []
        await runner(store).run(_nodes(calls), Note(text="x"))
        assert calls == ["first", "second"]


async def test_secrets_are_kept_only_through_a_codec(tmp_path: Path) -> None:
    """SecretStr and SecretBytes are refused by name without a codec, and come back with one."""
    value = Login(user="ada", password=SecretStr("pässword"), token=SecretBytes(b"\x00\xff"))

    nodes = [node("a", passing(), Login, Login)]
    async with SQLiteStore(tmp_path / "plain.db") as store:
        result = await runner(store).run(nodes, value)
        assert isinstance(result.failure.exception, NotSerialisable)
        assert "Login.password" in result.failure.message
        assert "give the store a codec" in result.failure.message
    async with SQLiteStore(tmp_path / "coded.db", codec=Zip()) as store:
        assert (await runner(store).run(nodes, value)).final_state == value
        entry = await store.load_typed("r", "a", Login)
        assert entry == value
        assert "pässword" not in repr(entry)


@pytest.mark.parametrize("codec", [object(), 5, zlib])
def test_what_is_no_codec(tmp_path: Path, codec: Any) -> None:
    """Something without encode and decode is refused when the store is made."""
    with pytest.raises(TypeError, match="codec must be an object"):
        SQLiteStore(tmp_path / "runs.db", codec=codec)


@pytest.fixture(params=["directory", "fsspec"])
def blobs(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    if request.param == "directory":
        return DirectoryBlobs(tmp_path / "blobs")
    return FsspecBlobs(f"memory://{tmp_path}")


def _big(calls: list[str], size: int = 5000) -> list[Any]:
    async def first(state: Note) -> Any:
        calls.append("first")
        return {"text": "x" * size}

    async def second(state: Note) -> Any:
        calls.append("second")
        if len(calls) < 3:
            raise ValueError("not yet")
        return {"text": f"{len(state.text)}"}

    return [node("first", first), node("second", second)]


async def test_large_payloads_stand_in_blobs(tmp_path: Path, blobs: Any) -> None:
    """A payload over the threshold is a blob named by content, kept once; small ones stay in the rows."""
    calls: list[str] = []
    async with SQLiteStore(tmp_path / "runs.db", blobs=blobs, blob_bytes=1000) as store:
        for run_id in ("r", "s"):
            await runner(store).run(_big(calls), Note(text="y"), run_id=run_id)
        assert len(list(blobs.names())) == 1
        result = await runner(store, resume=True).run(_big(calls), Note(text="y"))
        assert (result.status, result.final_state) == (RunStatus.RESUMED, Note(text="5000"))
    assert (tmp_path / "runs.db").stat().st_size < 200_000


@pytest.mark.parametrize("harm", ["missing", "damaged", "not given"])
async def test_a_blob_that_is_gone_is_a_named_error(tmp_path: Path, harm: str) -> None:
    """A missing or damaged blob is CorruptCheckpoint, naming the node and the blob; resume_from= helps."""
    calls: list[str] = []
    folder = tmp_path / "blobs"
    async with SQLiteStore(tmp_path / "runs.db", blobs=folder, blob_bytes=1000) as store:
        await runner(store).run(_big(calls), Note(text="y"))
    (file,) = folder.glob("??/*")
    if harm == "missing":
        file.unlink()
    elif harm == "damaged":
        file.write_bytes(b"x" + file.read_bytes()[1:])
    value = None if harm == "not given" else folder
    async with SQLiteStore(tmp_path / "runs.db", blobs=value, blob_bytes=1000) as store:
        with pytest.raises(CorruptCheckpoint, match="'first' at position 0 of run 'r' is stored in"):
            await runner(store, resume=True).run(_big(calls), Note(text="y"))
        if harm == "missing":
            result = await runner(store).run(_big(calls), Note(text="y"), resume_from="first")
            assert result.status is RunStatus.RESUMED


async def test_a_blob_that_cannot_be_written_loses_nothing(tmp_path: Path) -> None:
    """A blob store that fails is a StoreError: the node is not called again, and the run can go on later."""

    class Broken(DirectoryBlobs):
        broken = True

        def put(self, name: str, data: bytes) -> None:
            if self.broken:
                raise OSError("no room")
            super().put(name, data)

    calls: list[str] = []
    blobs = Broken(tmp_path / "blobs")
    async with SQLiteStore(tmp_path / "runs.db", blobs=blobs, blob_bytes=1000) as store:
        result = await runner(store).run(_big(calls), Note(text="y"))
        assert result.status is RunStatus.PARTIAL
        assert "no room" in result.failure.message
        assert calls == ["first"]
        blobs.broken = False
        await runner(store, resume=True).run(_big(calls), Note(text="y"))
        assert [attempt.node_id for attempt in store.attempts("r")] == ["first", "first", "second"]


async def test_blobs_that_cannot_be_read_are_a_named_error(tmp_path: Path) -> None:
    """Where nobody can tell whether a blob is there, a resume is refused with the reason, and works later."""
    calls: list[str] = []
    folder = tmp_path / "blobs"
    async with SQLiteStore(tmp_path / "runs.db", blobs=folder, blob_bytes=1000) as store:
        await runner(store).run(_big(calls), Note(text="y"))
    folder.rename(tmp_path / "away")
    folder.write_text("no directory")
    async with SQLiteStore(tmp_path / "runs.db", blobs=folder, blob_bytes=1000) as store:
        with pytest.raises(StoreError, match=r"cannot be read .*fix the blob store") as raised:
            await runner(store, resume=True).run(_big(calls), Note(text="y"))
        assert not isinstance(raised.value, CorruptCheckpoint)
        with pytest.raises(StoreError, match="cannot be read"):
            store.attempts("r")
        folder.unlink()
        (tmp_path / "away").rename(folder)
        assert (await runner(store, resume=True).run(_big(calls), Note(text="y"))).status is RunStatus.RESUMED


class Mute(Exception):
    def __str__(self) -> str:
        raise LookupError


class Moody:
    """A codec that does what its turn says: "raises", "mute", "text", or well."""

    def __init__(self, *turns: str) -> None:
        self.turns = list(turns)

    def _take(self, data: bytes) -> Any:
        turn = self.turns.pop(0) if self.turns else "well"
        if turn == "raises":
            raise KeyError("the key server is down")
        if turn == "mute":
            raise Mute
        return data.decode() if turn == "text" else data

    encode = decode = _take


@pytest.mark.parametrize("turn", ["raises", "mute", "text"])
async def test_a_codec_that_fails_is_a_named_error(tmp_path: Path, turn: str) -> None:
    """What a codec raises, or returns that is no bytes, is a StoreError that says so, whenever it happens."""
    raised = {"raises": "the key server is down.*fix the codec", "mute": "Mute.*fix the codec"}
    message = raised.get(turn, "must return bytes, got str")
    calls: list[str] = []
    moody = Moody(turn)
    async with SQLiteStore(tmp_path / "runs.db", codec=moody) as store:
        with pytest.raises(StoreError, match=message):
            await runner(store).run(_big(calls), Note())
        assert calls == []
        moody.turns = ["well", turn]  # The input, and then the output: that is tried again if it may help.
        await runner(store).run(_big(calls), Note())
        assert calls == (["first", "second"] if turn in raised else ["first"])
        await runner(store).run(_big(calls), Note())
        moody.turns = [turn]
        with pytest.raises(StoreError, match="cannot be decoded" if turn in raised else message):
            store.input_of("r")


async def test_blobs_are_private(tmp_path: Path) -> None:
    """Only their owner can read the blobs of a directory."""
    blobs = DirectoryBlobs(tmp_path / "blobs")
    blobs.put("ab" * 32, b"secret")
    (file,) = blobs.path.glob("??/*")
    assert file.stat().st_mode & 0o077 == 0
    assert blobs.path.stat().st_mode & 0o077 == 0
    assert blobs.get("ab" * 32) == b"secret"
    assert blobs.get("cd" * 32) is None


async def _age(store: SQLiteStore, *run_ids: str) -> None:
    """Make runs look a day older."""
    for run_id in run_ids:
        await store._submit(
            lambda rows, run_id=run_id: (
                rows.db.execute(
                    "UPDATE runs SET updated_ms = updated_ms - 86400000 WHERE run_id = ?", (run_id,)
                ).rowcount
            )
        )


@pytest.mark.core
async def test_old_runs_are_collected(tmp_path: Path) -> None:
    """gc() deletes runs that ended long ago with all that was kept of them, and no other."""

    async with SQLiteStore(tmp_path / "runs.db") as store:
        for run_id in ("old", "young"):
            await runner(store).run([node("a", passing())], Note(), run_id=run_id)
        await runner(store).run([node("a", failing_with(ValueError))], Note(), run_id="partial")
        inside = asyncio.Event()

        live = asyncio.create_task(runner(store).run([node("a", stuck(inside))], Note(), run_id="live"))
        await inside.wait()
        await store.save("by hand", "a", Note())
        await _age(store, "old", "partial", "live", "by hand")
        assert await store.gc(keep_for=timedelta(hours=2)) == (1, 0)
        assert {run.run_id for run in store.list_runs()} == {"young", "partial", "live"}
        assert await store.gc(keep_for=timedelta(hours=2), unfinished=True) == (2, 0)
        assert {run.run_id for run in store.list_runs()} == {"young", "live"}
        assert await store.load_typed("by hand", "a", Note) is None
        live.cancel()
        await asyncio.gather(live, return_exceptions=True)


@pytest.mark.core
async def test_blobs_that_nobody_names_are_collected(journal: tuple[str, str], tmp_path: Path) -> None:
    """gc() deletes the blobs of deleted runs; those that a row names, and young ones, stay."""
    calls = ["", ""]
    blobs = DirectoryBlobs(tmp_path / "blobs")
    async with opened(*journal, blobs=blobs, blob_bytes=1000) as store:
        await runner(store).run(_big(calls, 5000), Note(), run_id="one")
        await runner(store).run(_big(calls, 6000), Note(text="z" * 2000), run_id="two")
        await store.save("three", "a", Note(text="s" * 2000))
        assert len(list(blobs.names())) == 4
        await store.delete("one")
        assert await store.gc(keep_for=timedelta(days=1)) == (0, 0)
        for file in blobs.path.glob("??/*"):
            os.utime(file, (time.time() - 7200, time.time() - 7200))
        assert await store.gc(keep_for=timedelta(days=1)) == (0, 1)
        assert len(list(blobs.names())) == 3
        again = await runner(store, if_exists="return").run(
            _big(calls, 6000), Note(text="z" * 2000), run_id="two"
        )
        assert again.final_state == Note(text="6000")
        assert await store.load_typed("three", "a", Note) == Note(text="s" * 2000)


async def test_a_blob_that_is_put_while_others_are_collected_stays(tmp_path: Path) -> None:
    """Each blob is looked at just before it is deleted: a commit may have put it again since gc() began."""

    class Busy(DirectoryBlobs):
        def delete(self, name: str) -> None:
            for other in ("ab" * 32, "cd" * 32):
                if other != name:
                    self.put(other, b"data")
            super().delete(name)

    blobs = Busy(tmp_path / "blobs")
    for name in ("ab" * 32, "cd" * 32):
        blobs.put(name, b"data")
    for file in blobs.path.glob("??/*"):
        os.utime(file, (0, 0))
    async with SQLiteStore(tmp_path / "runs.db", blobs=blobs) as store:
        await store.save("r", "a", Note())
        assert await store.gc(keep_for=timedelta(days=1)) == (0, 1)
    assert len(list(blobs.names())) == 1


async def test_a_blob_that_is_put_again_counts_as_new(tmp_path: Path) -> None:
    """A blob that a new commit is about to name is not collected for its age."""
    blobs = DirectoryBlobs(tmp_path / "blobs")
    blobs.put("ab" * 32, b"data")
    (file,) = blobs.path.glob("??/*")
    os.utime(file, (0, 0))
    blobs.put("ab" * 32, b"data")
    ((_, put),) = blobs.names()
    assert time.time() - put < 60


def test_without_fsspec(monkeypatch: pytest.MonkeyPatch) -> None:
    """A URL for blobs without fsspec is an ImportError with the line that installs it."""
    monkeypatch.setitem(sys.modules, "fsspec", None)
    with pytest.raises(ImportError, match=r"pip install 'stroma-runner\[blobs\]'"):
        FsspecBlobs("s3://bucket")


def test_blob_bytes_must_be_positive(tmp_path: Path) -> None:
    """A threshold that makes no sense is refused when the store is made."""
    with pytest.raises(ValueError, match="blob_bytes"):
        SQLiteStore(tmp_path / "runs.db", blobs=tmp_path, blob_bytes=0)
    assert issubclass(CorruptCheckpoint, StoreError)
