"""Payloads of durable stores: sealed by a codec, and stored as blobs if they are large."""

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
from typing import Any, Final, NamedTuple, Protocol, runtime_checkable

from stroma.checkpoint.errors import CorruptCheckpoint, StoreError

__all__ = [
    "BlobStore",
    "Codec",
    "DirectoryBlobs",
    "FsspecBlobs",
    "PayloadPlace",
    "Payloads",
    "blob_store",
    "collect",
]

# What begins a stored payload that is not the JSON itself; JSON begins with neither.
CODED: Final = b"stroma:c1\0"
BLOB: Final = b"stroma:b1\0"
#: The same for a text, in base64: columns of texts take no bytes.
_CODED_TEXT: Final = "stroma:c1:"
_NAME: Final = re.compile(r"[0-9a-f]{64}")
_LARGE: Final = 256 * 1024  # bytes from which work on a payload is done in a thread
#: A blob that young may belong to a commit that is on its way.
_YOUNG_SECONDS: Final = 3600.0


@runtime_checkable
class Codec(Protocol):
    """Goes around every payload of a store: outputs, inputs, questions, answers, messages of failures. Ids and numbers
    stay plain.

    ``decode`` must read whatever an earlier ``encode`` wrote, also under an earlier key: put the key's name into it.
    It must raise for anything that was changed since. What is encoded begins with a hash of its place, so that
    a payload which an authenticating codec wrote cannot be moved to another place.
    """

    def encode(self, data: bytes) -> bytes: ...
    def decode(self, data: bytes) -> bytes: ...


@runtime_checkable
class BlobStore(Protocol):
    """Keeps large payloads by the SHA-256 of their content, as hexadecimal digits."""

    def put(self, name: str, data: bytes) -> None:
        """Keep a blob for good before returning; one that is there already counts as new."""

    def get(self, name: str) -> bytes | None: ...
    def delete(self, name: str) -> None: ...

    def names(self) -> Iterable[tuple[str, float]]:
        """Each blob with the time it was last put, in seconds since the epoch."""
        ...


class DirectoryBlobs:
    """Blobs as files in a directory, which is made if need be; readable by their owner only."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = pathlib.Path(path).absolute()
        #: Whether the directory itself survives a power cut.
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
        # The names, too, must survive a power cut; another writer may have made them a moment ago.
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
    """Write a file so that it is there as a whole or not at all."""
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
    """Make a directory and its parents, if need be, and sync what names each of them. Only the last one gets the mode."""
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
    """Blobs at any URL that fsspec knows (``s3://bucket/folder`` ...). Raises ImportError without fsspec."""

    def __init__(self, url: str, **options: Any) -> None:
        try:
            import fsspec
        except ImportError as error:
            raise ImportError(
                "fsspec is required for FsspecBlobs; install it with: pip install 'stroma[blobs]'"
            ) from error
        self._fs, self._root = fsspec.core.url_to_fs(url, **options)

    def _path(self, name: str) -> str:
        return f"{self._root.rstrip('/')}/{name[:2]}/{name}"

    def put(self, name: str, data: bytes) -> None:
        # Written anew each time: object stores know no other way to say that it was put just now.
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
            found = self._fs.find(self._root, detail=True)
        except FileNotFoundError:
            return
        for path in found:
            yield path.rpartition("/")[2], self._fs.modified(path).timestamp()


class PayloadPlace(NamedTuple):
    """The place of a payload in a store: what is sealed for one cannot be opened at another.

    Attributes:
        kind: "input", "output", "given", "message" and the like.
    """

    run_id: str
    execution: int
    kind: str
    position: int = 0
    branch: str = ""

    def digest(self) -> bytes:
        """Return 64 characters that no other place has."""
        return hashlib.sha256(json.dumps(self).encode()).hexdigest().encode()


_DIGEST_BYTES: Final = 64


class Payloads:
    """The way of a payload into a store and back."""

    def __init__(
        self, codec: Codec | None = None, blobs: BlobStore | str | os.PathLike[str] | None = None,
        blob_bytes: int = 1_000_000, plain_until_migrated: bool = False,
    ) -> None:  # fmt: skip
        """``plain_until_migrated``: read payloads that were stored before the store had its codec."""
        if codec is not None and not isinstance(codec, Codec):
            raise TypeError(f"{codec!r} is no codec; give an object with encode(bytes) and decode(bytes)")
        if blob_bytes < 1:
            raise ValueError(f"blob_bytes is {blob_bytes!r}; give a number of bytes from 1 up")
        if plain_until_migrated and codec is None:
            raise ValueError(
                "plain_until_migrated needs a codec to migrate to; pass codec= too, or leave it out"
            )
        self.codec = codec
        self._must_be_sealed = codec is not None and not plain_until_migrated
        self.blobs = blob_store(blobs)
        self.blob_bytes = blob_bytes
        #: Whether payloads are stored as they are.
        self.plain = codec is None and blobs is None

    def is_plain(self, stored: bytes) -> bool:
        """Return True if a stored payload is the payload itself, as this store would write it."""
        return self.plain and not stored.startswith((CODED, BLOB))

    async def seal(self, data: bytes, place: PayloadPlace) -> bytes:
        """Return what is written to the rows for a payload. Raises StoreError."""
        if len(data) >= _LARGE:
            return await asyncio.to_thread(self.seal_now, data, place)
        return self.seal_now(data, place)

    def seal_now(self, data: bytes, place: PayloadPlace) -> bytes:
        """Do the same in this thread, which may take as long as a blob store does."""
        if self.codec is not None:
            data = CODED + self._encoded(self.codec, place.digest() + data)
        if self.blobs is None or len(data) < self.blob_bytes:
            return data
        digest = hashlib.sha256(data).digest()
        try:
            self.blobs.put(digest.hex(), data)
        except Exception as error:
            raise StoreError(
                f"a payload of {len(data)} bytes could not be kept in {self.blobs!r}: {error}; mend that, then resume"
            ) from error
        return BLOB + digest

    def seal_text(self, said: str | None, place: PayloadPlace) -> str | None:
        """Return what is written for a text, such as a failure's message. Raises StoreError."""
        if said is None or self.codec is None:
            return said
        sealed = self._encoded(self.codec, place.digest() + said.encode("utf-8", "backslashreplace"))
        return _CODED_TEXT + base64.b64encode(sealed).decode()

    def open_text(self, stored: str | None, place: PayloadPlace) -> str | None:
        """Return the text of what was written; in place of one that cannot be opened, a text that says so.

        Never raises: a message that is damaged hides nothing else of its run.
        """
        if stored is None or not isinstance(stored, str):
            return stored
        if not stored.startswith(_CODED_TEXT):
            return "[not written by the codec of this store]" if self._must_be_sealed else stored
        if self.codec is None:
            return "[sealed; open the store with codec=]"
        try:
            return self._decoded(self.codec, base64.b64decode(stored[len(_CODED_TEXT) :]), place, "").decode()
        except (StoreError, TypeError, ValueError):
            return "[sealed, and cannot be opened]"

    def move(self, stored: bytes, source: PayloadPlace, target: PayloadPlace, what: str) -> bytes:
        """Seal a stored payload for another place. Raises StoreError."""
        return stored if self.codec is None else self.seal_now(self.open(stored, source, what), target)

    @staticmethod
    def _encoded(codec: Codec, data: bytes) -> bytes:
        try:
            encoded = codec.encode(data)
        except Exception as error:
            raise StoreError(
                f"the codec {codec!r} could not encode a payload of {len(data)} bytes ({type(error).__name__}: {error}); "
                "mend that, then resume"
            ) from error
        if not isinstance(encoded, bytes):
            raise _no_bytes(codec, "encode", encoded)
        return encoded

    def open(self, stored: bytes, place: PayloadPlace, what: str) -> bytes:
        """Return the payload of what was written at a place. Raises CorruptCheckpoint, which calls it ``what``;
        StoreError if a blob cannot be reached."""
        if stored.startswith(BLOB):
            stored = self._fetch(stored[len(BLOB) :], what)
        if not stored.startswith(CODED):
            if self._must_be_sealed:
                raise CorruptCheckpoint(
                    f"{what} was not written by the codec of this store: it is older than the codec, or was replaced; "
                    "if it is older, open the store with plain_until_migrated=True"
                )
            return stored
        if self.codec is None:
            raise CorruptCheckpoint(f"{what} was written through a codec; open the store with codec=")
        return self._decoded(self.codec, stored[len(CODED) :], place, what)

    @staticmethod
    def _decoded(codec: Codec, data: bytes, place: PayloadPlace, what: str) -> bytes:
        try:
            data = codec.decode(data)
        except Exception as error:
            raise CorruptCheckpoint(
                f"{what} cannot be decoded ({type(error).__name__}: {error}); open the store with the codec, and the "
                "keys, that it was written with"
            ) from error
        if not isinstance(data, bytes):
            raise _no_bytes(codec, "decode", data)
        if not hmac.compare_digest(data[:_DIGEST_BYTES], place.digest()):
            raise CorruptCheckpoint(
                f"{what} was written for another place, and moved to this one; restore the store from a backup, or "
                "begin a new run"
            )
        return data[_DIGEST_BYTES:]

    def _fetch(self, digest: bytes, what: str) -> bytes:
        if self.blobs is None:
            raise CorruptCheckpoint(f"{what} stands in a blob; open the store with blobs=")
        try:
            data = self.blobs.get(digest.hex())
        except Exception as error:  # Nobody knows whether it is there.
            raise StoreError(
                f"{what} stands in blob {digest.hex()}, and {self.blobs!r} cannot be read ({type(error).__name__}: "
                f"{error}); mend that, then try again"
            ) from error
        way_out = "restore it, or make it anew: resume from that node (resume_from=), or begin a new run"
        if data is None:
            raise CorruptCheckpoint(
                f"{what} stands in blob {digest.hex()}, which is not in {self.blobs!r}; {way_out}"
            )
        if hashlib.sha256(data).digest() != digest:
            raise CorruptCheckpoint(f"{what} stands in blob {digest.hex()}, which is damaged; {way_out}")
        return data


def collect(blobs: BlobStore, in_use: set[str], now_seconds: float) -> int:
    """Delete the blobs that no row names; how many. Young ones stay: their commit may be on its way.

    ``now_seconds``: since the epoch, by the clock of the store. Raises StoreError.
    """
    oldest = now_seconds - _YOUNG_SECONDS
    gone = 0
    try:
        for name, put in blobs.names():
            # At once: a commit may put it again, and so make it young, while others are deleted. And nothing but
            # blobs: the directory may have been given by mistake.
            if name not in in_use and put < oldest and _NAME.fullmatch(name):
                blobs.delete(name)
                gone += 1
    except Exception as error:
        raise StoreError(
            f"the blobs in {blobs!r} could not be collected ({type(error).__name__}: {error}); mend that, then try again"
        ) from error
    return gone


def _no_bytes(codec: Codec, method: str, given: object) -> StoreError:
    error = StoreError(f"{method}() of {codec!r} returned {type(given).__name__}; let it return bytes")
    error.transient = False
    return error


def blob_store(given: BlobStore | str | os.PathLike[str] | None) -> BlobStore | None:
    """Return the blob store for ``blobs=``: a blob store, a directory, or a URL that fsspec supports."""
    if given is None or isinstance(given, BlobStore):
        return given
    text = os.fsdecode(given)
    return FsspecBlobs(text) if "://" in text else DirectoryBlobs(text)
