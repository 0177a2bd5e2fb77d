"""Payloads of durable stores: encoded by a codec, and stored as blobs if they are large."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import hmac
import json
import os
import pathlib
import re
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple, Protocol, runtime_checkable

from stroma._utils.access import error_text
from stroma._utils.distributions import missing
from stroma._utils.logs import get_logger
from stroma.checkpoint.errors import CorruptCheckpoint, StoreError
from stroma.contracts.copying import Snapshot
from stroma.contracts.schema import Schema

logger = get_logger()

# Prefixes of stored payloads that are not plain JSON, which never begins with either.
CODED: Final = b"stroma:c1\0"
BLOB: Final = b"stroma:b1\0"
#: Prefix of an encoded text, in base64: text columns hold no bytes.
_CODED_TEXT: Final = "stroma:c1:"
#: In place of a text that cannot be opened.
_NOT_SEALED: Final = "[not written by the codec of this store]"
_SEALED: Final = "[sealed; open the store with codec=]"
_NOT_OPENED: Final = "[sealed, and cannot be opened]"
UNREADABLE: Final = (_NOT_SEALED, _SEALED, _NOT_OPENED)
_NAME: Final = re.compile(r"[0-9a-f]{64}")
_THREAD_BYTES: Final = 256 * 1024  # Payloads of this size and above are encoded in a thread.
LARGE_BYTES: Final = 50_000_000  # states above this are logged as a warning
#: A blob younger than this may belong to a commit in progress.
_MIN_AGE_SECONDS: Final = 3600.0


@runtime_checkable
class Codec(Protocol):
    """Encodes every payload of a store, messages of failures too. Ids and numbers stay plain.

    Both methods are called in transactions and on the event loop: fetch keys before, not in them.
    ``decode`` must read everything that ``encode`` wrote earlier, also with an earlier key: include the name
    of the key. It must raise for data that was changed since. The data to encode begins with a hash of its
    place, so that a payload written by an authenticating codec cannot be moved to another place.
    """

    def encode(self, data: bytes) -> bytes: ...
    def decode(self, data: bytes) -> bytes: ...


@runtime_checkable
class BlobStore(Protocol):
    """Stores large payloads. The name of a blob is the SHA-256 of its content in hexadecimal digits.

    With a codec, an input is also read in a transaction of the store: set the timeouts of your client.
    """

    def put(self, name: str, data: bytes) -> None:
        """Store a blob durably before returning. An existing blob gets the current time."""

    def get(self, name: str) -> bytes | None: ...
    def delete(self, name: str) -> None: ...

    def names(self) -> Iterable[tuple[str, float]]:
        """Iterate over the blobs: (name, time of the last put() in seconds since the epoch)."""
        ...


class DirectoryBlobs:
    """Stores blobs as files in a directory, created if missing. Only their owner can read them."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = pathlib.Path(path).absolute()
        #: The directory itself survives a power failure.
        self._is_durable = False

    def __repr__(self) -> str:
        return f"DirectoryBlobs({str(self.path)!r})"

    def _file(self, name: str) -> pathlib.Path:
        return self.path / name[:2] / name

    def put(self, name: str, data: bytes) -> None:
        file = self._file(name)
        if not self._is_durable or not self.path.is_dir():
            _make_directory(self.path, 0o700)
            self._is_durable = True
        try:
            os.utime(file)
        except FileNotFoundError:
            file.parent.mkdir(mode=0o700, exist_ok=True)
            _write_file(file, data)
        # The names must survive a power failure as well, also those that another writer has just created.
        _sync_directory(file.parent)
        _sync_directory(self.path)

    def get(self, name: str) -> bytes | None:
        try:
            return self._file(name).read_bytes()
        except FileNotFoundError:
            return None

    def delete(self, name: str) -> None:
        self._file(name).unlink(missing_ok=True)

    def names(self) -> Iterator[tuple[str, float]]:
        for file in self.path.glob("??/*"):
            if not file.name.startswith("."):
                with contextlib.suppress(FileNotFoundError):
                    yield file.name, file.stat().st_mtime


def _write_file(file: pathlib.Path, data: bytes) -> None:
    """Write a file atomically: it exists completely or not at all."""
    handle, temporary = tempfile.mkstemp(dir=file.parent, prefix=".")
    try:
        with os.fdopen(handle, "wb") as out:
            out.write(data)
            out.flush()
            os.fsync(out.fileno())
        pathlib.Path(temporary).replace(file)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


def _make_directory(path: pathlib.Path, mode: int = 0o777) -> None:
    """Create a directory and its parents if missing, and sync each parent. Only the last gets the mode."""
    if not path.parent.exists():
        _make_directory(path.parent)
    path.mkdir(mode=mode, exist_ok=True)
    _sync_directory(path.parent)


def _sync_directory(path: pathlib.Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class FsspecBlobs:
    """Stores blobs at any URL that fsspec supports (``s3://...``). Raises ImportError without fsspec."""

    def __init__(self, url: str, **options: Any) -> None:
        try:
            import fsspec
        except ImportError as error:
            raise missing("fsspec", "FsspecBlobs", "blobs") from error
        self._fs, self._root = fsspec.core.url_to_fs(url, **options)

    def _path(self, name: str) -> str:
        return f"{self._root.rstrip('/')}/{name[:2]}/{name}"

    def put(self, name: str, data: bytes) -> None:
        # Always written again: object stores have no other way to update the time of a blob.
        path = self._path(name)
        self._fs.makedirs(path.rpartition("/")[0], exist_ok=True)
        self._fs.pipe_file(path, data)

    def get(self, name: str) -> bytes | None:
        try:
            data: bytes = self._fs.cat_file(self._path(name))
        except FileNotFoundError:
            return None
        return data

    def delete(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            self._fs.rm_file(self._path(name))

    def names(self) -> Iterator[tuple[str, float]]:
        try:
            paths = self._fs.find(self._root)
        except FileNotFoundError:
            return
        for path in paths:
            yield path.rpartition("/")[2], self._fs.modified(path).timestamp()


class PayloadPlace(NamedTuple):
    """The place of a payload in a store. A payload that is sealed for one place cannot be opened at another.

    Attributes:
        kind: such as "input", "output", "step input", "message".
    """

    run_id: str
    execution: int
    kind: str
    position: int = 0
    branch: str = ""

    def digest(self) -> bytes:
        """Return 64 characters that identify the place."""
        return hashlib.sha256(json.dumps(self).encode()).hexdigest().encode()


_DIGEST_BYTES: Final = 64


@dataclass(slots=True)
class UnencodedState:
    """A state in memory, in place of its stored form: not every state has one."""

    schema: Schema = field(compare=False)
    snapshot: Snapshot

    def encode(self) -> bytes:
        """Return its stored form. Raises NotSerialisable."""
        return self.schema.encode(self.schema.restore(self.snapshot), secrets=True)


#: A state as a store has it.
Stored = bytes | UnencodedState


class Payloads:
    """Seals payloads before they are stored, and opens stored payloads.

    Sealing encodes a payload with the codec, and replaces a large one by a reference to its blob.

    Args:
        blob_bytes: size from which payloads are stored as blobs.
        plain_until_migrated: also read payloads that were stored before the store had a codec.
    """

    def __init__(
        self,
        codec: Codec | None = None,
        blobs: BlobStore | str | os.PathLike[str] | None = None,
        blob_bytes: int = 1_000_000,
        plain_until_migrated: bool = False,
    ) -> None:
        if codec is not None and not isinstance(codec, Codec):
            raise TypeError(f"codec must be an object with encode(bytes) and decode(bytes), got {codec!r}")
        if blob_bytes < 1:
            raise ValueError(f"blob_bytes must be at least 1, got {blob_bytes!r}")
        if plain_until_migrated and codec is None:
            raise ValueError("plain_until_migrated needs a codec; pass codec= too, or neither")
        self.codec = codec
        self._must_be_sealed = codec is not None and not plain_until_migrated
        self.blobs = blob_store(blobs)
        self.blob_bytes = blob_bytes
        self._has_warned = False
        #: Payloads are stored unchanged.
        self.plain = codec is None and blobs is None

    def warn_of_size(self, size: int, what: str) -> None:
        """Warn of the first state above 50 MB, which ``what`` describes. ``size`` is in bytes."""
        if not self._has_warned:
            self._has_warned = True
            logger.warning(
                "%s has %s MB, which each node copies, validates and stores; store large data in a file or "
                "an object store, and pass its path on in the state",
                what,
                f"{size / 1e6:,.0f}",
            )

    async def seal(self, data: Any, place: PayloadPlace) -> Any:
        """Return the stored form of a payload. Raises StoreError."""
        if isinstance(data, UnencodedState):
            return data
        if len(data) >= _THREAD_BYTES:
            return await asyncio.to_thread(self.seal_now, data, place)
        return self.seal_now(data, place)

    def seal_now(self, data: bytes, place: PayloadPlace) -> bytes:
        """Return the stored form of a payload. Blocks while the blob store writes. Raises StoreError."""
        data = self.seal_inline(data, place)
        if self.blobs is None or len(data) < self.blob_bytes:
            return data
        digest = hashlib.sha256(data).digest()
        try:
            self.blobs.put(digest.hex(), data)
        except Exception as error:
            raise StoreError(
                f"a payload of {len(data)} bytes could not be stored in {self.blobs!r} "
                f"({error_text(error)}); fix the blob store, then resume"
            ) from error
        return BLOB + digest

    def seal_inline(self, data: bytes, place: PayloadPlace) -> bytes:
        """Return the stored form of a payload that is never stored as a blob. Raises StoreError."""
        return data if self.codec is None else CODED + self._encode(self.codec, place.digest() + data)

    def seal_text(self, text: str | None, place: PayloadPlace) -> str | None:
        """Return the stored form of a text, such as a failure message. Raises StoreError."""
        if text is None or self.codec is None:
            return text
        sealed = self._encode(self.codec, place.digest() + text.encode("utf-8", "backslashreplace"))
        return _CODED_TEXT + base64.b64encode(sealed).decode()

    def open_text(self, stored: str | None, place: PayloadPlace) -> str | None:
        """Return a stored text; a note in its place if it cannot be opened.

        Never raises, so that a damaged message does not prevent reading the rest of its run.
        """
        if stored is None or not isinstance(stored, str):
            return stored
        if not stored.startswith(_CODED_TEXT):
            return _NOT_SEALED if self._must_be_sealed else stored
        if self.codec is None:
            return _SEALED
        try:
            return self._decode(self.codec, base64.b64decode(stored[len(_CODED_TEXT) :]), place, "").decode()
        except (StoreError, TypeError, ValueError):
            return _NOT_OPENED

    def move(self, stored: bytes, source: PayloadPlace, target: PayloadPlace, what: str) -> bytes:
        """Seal a stored payload for another place. Raises StoreError."""
        return stored if self.codec is None else self.seal_now(self.open(stored, source, what), target)

    @staticmethod
    def _encode(codec: Codec, data: bytes) -> bytes:
        try:
            encoded = codec.encode(data)
        except Exception as error:
            raise StoreError(
                f"the codec {codec!r} could not encode a payload of {len(data)} bytes "
                f"({error_text(error)}); fix the codec, then resume"
            ) from error
        if not isinstance(encoded, bytes):
            raise _not_bytes(codec, "encode", encoded)
        return encoded

    def open(self, stored: Stored, place: PayloadPlace, what: str) -> bytes:
        """Return a stored payload of a place.

        Raises CorruptCheckpoint, in which ``what`` describes the payload; StoreError if a blob cannot be
        read; NotSerialisable in memory.
        """
        if isinstance(stored, UnencodedState):
            return stored.encode()
        if stored.startswith(BLOB):
            stored = self._fetch(stored[len(BLOB) :], what)
        if not stored.startswith(CODED):
            if self._must_be_sealed:
                raise CorruptCheckpoint(
                    f"{what} was not written by the codec of this store: it is older than the codec, or was "
                    "replaced; if it is older, open the store with plain_until_migrated=True"
                )
            return stored
        if self.codec is None:
            raise CorruptCheckpoint(f"{what} was written through a codec; open the store with codec=")
        return self._decode(self.codec, stored[len(CODED) :], place, what)

    @staticmethod
    def _decode(codec: Codec, data: bytes, place: PayloadPlace, what: str) -> bytes:
        try:
            data = codec.decode(data)
        except Exception as error:
            raise CorruptCheckpoint(
                f"{what} cannot be decoded ({error_text(error)}); open the store with the codec, "
                "and the keys, that it was written with"
            ) from error
        if not isinstance(data, bytes):
            raise _not_bytes(codec, "decode", data)
        if not hmac.compare_digest(data[:_DIGEST_BYTES], place.digest()):
            raise CorruptCheckpoint(
                f"{what} was written for another place, and moved to this one; restore the store from a "
                "backup, or start a new run"
            )
        return data[_DIGEST_BYTES:]

    def _fetch(self, digest: bytes, what: str) -> bytes:
        if self.blobs is None:
            raise CorruptCheckpoint(f"{what} is stored in a blob; open the store with blobs=")
        try:
            data = self.blobs.get(digest.hex())
        except Exception as error:  # It may still exist.
            raise StoreError(
                f"{what} is stored in blob {digest.hex()}, and {self.blobs!r} cannot be read "
                f"({error_text(error)}); fix the blob store, then try again"
            ) from error
        fix = "restore it, or recompute it: resume from that node (resume_from=), or start a new run"
        if data is None:
            raise CorruptCheckpoint(
                f"{what} is stored in blob {digest.hex()}, which is not in {self.blobs!r}; {fix}"
            )
        if hashlib.sha256(data).digest() != digest:
            raise CorruptCheckpoint(f"{what} is stored in blob {digest.hex()}, which is damaged; {fix}")
        return data


def collect(blobs: BlobStore, in_use: set[str], now_seconds: float) -> int:
    """Delete the blobs that no row references, and return their number.

    Blobs younger than an hour stay, since their commit may be in progress. ``now_seconds``: the clock of the
    store in seconds since the epoch. Raises StoreError.
    """
    oldest = now_seconds - _MIN_AGE_SECONDS
    deleted = 0
    try:
        for name, updated_seconds in blobs.names():
            # Delete each at once: meanwhile a commit may put it again, which makes it young. Delete files
            # with names of blobs only: the directory may hold other files.
            if name not in in_use and updated_seconds < oldest and _NAME.fullmatch(name):
                blobs.delete(name)
                deleted += 1
    except Exception as error:
        raise StoreError(
            f"the unused blobs in {blobs!r} could not be deleted ({error_text(error)}); "
            "fix the blob store, then try again"
        ) from error
    return deleted


def _not_bytes(codec: Codec, method: str, value: object) -> StoreError:
    error = StoreError(f"{method}() of {codec!r} must return bytes, got {type(value).__name__}")
    error.transient = False
    return error


def blob_store(blobs: BlobStore | str | os.PathLike[str] | None) -> BlobStore | None:
    """Return the blob store for ``blobs=``: a blob store, a directory, or a URL that fsspec supports."""
    if blobs is None or isinstance(blobs, BlobStore):
        return blobs
    text = os.fsdecode(blobs)
    return FsspecBlobs(text) if "://" in text else DirectoryBlobs(text)
