"""Sources of the items of a map, and destinations of their outputs outside the state."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pathlib
import stat
from asyncio import to_thread
from collections.abc import (
    AsyncGenerator,
    AsyncIterable,
    Callable,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
    Sized,
)
from dataclasses import dataclass
from typing import IO, Any, Final

from pydantic import BaseModel
from pydantic_core import from_json, to_json

from stroma.trace.plain import jsonable

_PAGE_ITEMS: Final = 200  # that are read, or looked up in the journal, at once
_PAGE_BYTES: Final = 4 * 1024 * 1024
_MAX_LINE_BYTES: Final = 64 * 1024 * 1024
_WHITESPACE: Final = b" \t\r\n"
_BOM: Final = b"\xef\xbb\xbf"


class JsonLines:
    """A file with one JSON value per line: the items of a map, or where their outputs go.

    ``JsonLines("documents.jsonl")`` is that file; ``JsonLines(field="source")`` the one whose path is the
    value of that field of the state. Relative paths begin at the process's working directory. Raises
    ValueError unless exactly one of the two is passed.

    As ``into=`` the file has one line for each output, in the order of the items. It is written from the
    journal once all items are done, and appears as a whole or not at all.
    """

    __slots__ = ("field", "path")

    def __init__(self, path: str | os.PathLike[str] | None = None, *, field: str | None = None) -> None:
        if (path is None) == (field is None):
            raise ValueError(
                "JsonLines needs either a path, or field= with the name of the field that holds it"
            )
        if field is not None and not field.isidentifier():
            raise ValueError(f"{field!r} is not the name of a field")
        self.path = None if path is None else pathlib.Path(path)
        self.field = field

    def __repr__(self) -> str:
        return f"JsonLines({str(self.path)!r})" if self.field is None else f"JsonLines(field={self.field!r})"

    @property
    def name(self) -> str:
        """The name of the items in the id of the map."""
        return self.field or (self.path.name if self.path is not None else "")

    def find(self, state: Mapping[str, Any]) -> pathlib.Path:
        """Return the path for the fields of a state. Raises TypeError if the field holds none."""
        if self.path is not None:
            return self.path
        path = state.get(self.field or "")
        if not isinstance(path, (str, os.PathLike)) or not os.fspath(path):
            what = f"it holds {type(path).__name__}" if self.field in state else "there is no such field"
            raise TypeError(
                f"{self!r} needs the path of a file in field {self.field!r} of the state, and {what}"
            )
        return pathlib.Path(path)


class Journal:
    """The store of the run as ``into=`` of a map: outputs stay there and are not collected into the state.

    :meth:`stroma.StromaRunner.map_outputs` reads them.
    """

    __slots__ = ()

    def __repr__(self) -> str:
        return "Journal()"


@dataclass(frozen=True, slots=True)
class Item:
    """One item of a map."""

    index: int
    value: Any
    checksum: bytes | None = None  # By which a resume sees that it is the same.
    error: str | None = None  # Why there is no value.


class Source:
    """The items of one run of a map."""

    total: int | None = None  # How many there are, if that is known.
    page = _PAGE_ITEMS  # How many are read at once, at most; the reader may change it.

    async def prepare(self) -> None:
        """Inspect the items before the first of them is read. Raises OSError, TypeError."""

    def pages(self) -> AsyncGenerator[Sequence[Item], None]:
        """Yield the items in order, a few at a time."""
        raise NotImplementedError

    def describe_change(self, index: int) -> str:
        """Return the problem if an item differs from the recorded one."""
        return f"item {index} differs from the recorded one"


class ListSource(Source):
    """Items of a list in the state."""

    def __init__(self, items: Sequence[Any]) -> None:
        self._items = items
        self.total = len(items)

    async def pages(self) -> AsyncGenerator[Sequence[Item], None]:
        first = 0
        while first < len(self._items):
            values = self._items[first : first + self.page]
            yield [Item(first + i, value) for i, value in enumerate(values)]
            first += len(values)


class IterableSource(Source):
    """Items that a function of the state returns; every process that resumes the run calls it again."""

    def __init__(self, items: Iterable[Any] | AsyncIterable[Any], name: str) -> None:
        if not isinstance(items, (Iterable, AsyncIterable)) or isinstance(items, (str, bytes, Mapping)):
            raise TypeError(
                f"{name} must return an iterable or an async iterable of items, got {type(items).__name__}"
            )
        self._items = items
        self._name = name
        self.total = len(items) if isinstance(items, Sized) else None
        self.page = 1

    async def pages(self) -> AsyncGenerator[Sequence[Item], None]:
        page: list[Item] = []
        index = 0
        async with contextlib.aclosing(self._values()) as values:
            async for value in values:
                page.append(Item(index, value, _checksum_of(value)))
                index += 1
                if len(page) >= self.page:
                    yield page
                    page = []
        if page:
            yield page

    async def _values(self) -> AsyncGenerator[Any, None]:
        if isinstance(self._items, AsyncIterable):
            iterator = aiter(self._items)
            try:
                async for value in iterator:
                    yield value
            finally:
                close = getattr(iterator, "aclose", None)
                if close is not None:
                    await close()
        else:
            for value in self._items:
                yield value

    def describe_change(self, index: int) -> str:
        return f"item {index} that {self._name} returns differs from the recorded one"


def _checksum_of(value: Any) -> bytes:
    text = json.dumps(jsonable(value), sort_keys=True)
    return b"item " + hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest().encode()


class FileSource(Source):
    """Items of a file of JSON lines. Blank lines are skipped."""

    def __init__(self, path: pathlib.Path) -> None:
        self._path = path

    async def prepare(self) -> None:
        """Count the items."""
        self.total = await to_thread(self._count)

    def _count(self) -> int:
        with self._open() as file:
            return sum(bool(line.strip(_WHITESPACE)) for line in self._lines(file))

    def _open(self) -> IO[bytes]:
        try:
            if not stat.S_ISREG(os.stat(self._path).st_mode):
                raise ValueError(
                    f"cannot read the items of a map from {self._path}: it is not a regular file, so that a "
                    "process that resumes the run could not read it again; save it to a file"
                )
            return open(self._path, "rb")
        except OSError as error:
            raise type(error)(
                error.errno,
                f"cannot read the items of a map ({error.strerror}); check the path",
                str(self._path),
            ) from error

    async def pages(self) -> AsyncGenerator[Sequence[Item], None]:
        file = await to_thread(self._open)
        try:
            lines = enumerate(self._lines(file), 1)
            index = 0
            while page := await to_thread(self._page, lines, index):
                index += len(page)
                yield page
        finally:
            file.close()

    def _page(self, lines: Iterator[tuple[int, bytes]], index: int) -> list[Item]:
        page: list[Item] = []
        size = 0
        for number, line in lines:
            text = line.removeprefix(_BOM) if number == 1 else line
            if not text.strip(_WHITESPACE):
                continue
            page.append(self._item(index + len(page), number, text))
            size += len(line)
            if len(page) >= self.page or size >= _PAGE_BYTES:
                break
        return page

    def _item(self, index: int, number: int, line: bytes) -> Item:
        checksum = b"item " + hashlib.sha256(line).hexdigest().encode()
        try:
            return Item(index, from_json(line), checksum)
        except ValueError as error:
            return Item(index, None, checksum, f"line {number} of {self._path} is not JSON: {error}")

    def _lines(self, file: IO[bytes]) -> Iterator[bytes]:
        number = 0
        while line := file.readline(_MAX_LINE_BYTES + 1):
            number += 1
            if len(line) > _MAX_LINE_BYTES:
                raise ValueError(f"line {number} of {self._path} exceeds {_MAX_LINE_BYTES} bytes; split it")
            yield line

    def describe_change(self, index: int) -> str:
        return f"{self._path} has changed since item {index} was recorded"


def _line_of(value: Any) -> bytes:
    """Return an output as a line of JSON, with NaN and infinities as strings: a model would write null."""
    try:
        plain = value.model_dump(mode="json") if isinstance(value, BaseModel) else value
        line = to_json(plain, inf_nan_mode="strings")
    except ValueError:  # Bytes that are not UTF-8, say. The escapes of lone surrogates are those of JSON.
        line = json.dumps(jsonable(value), ensure_ascii=False).encode("utf-8", "backslashreplace")
    return line + b"\n"


class LinesFile:
    """A file of JSON lines that is written under a temporary name and then moved to its path."""

    def __init__(self, path: pathlib.Path, run_id: str) -> None:
        self._path = pathlib.Path(os.path.realpath(path))  # So that a symbolic link stays one.
        # One prefix for each run and file, and a temporary file for each process that resumes the run.
        key = f"{run_id}\0{path.name}".encode("utf-8", "surrogatepass")
        self._prefix = hashlib.sha256(key).hexdigest()[:16]
        self._temporary = self._path.with_name(f".{self._prefix}.{os.urandom(4).hex()}.part")
        self._file: IO[bytes] | None = None

    def check(self, source: pathlib.Path | None) -> None:
        """Raise OSError or ValueError, before anything is paid for, if the file cannot be written."""
        folder = self._path.parent
        if source is not None and os.path.realpath(source) == str(self._path):
            raise ValueError(f"{self._path} holds the items of the map; pass another path for its outputs")
        if not folder.is_dir():
            raise FileNotFoundError(
                f"directory {folder} for the outputs of a map does not exist; create it, or pass another path"
            )
        if self._path.exists() and not self._path.is_file():
            raise ValueError(
                f"{self._path} is not a regular file; pass another path for the outputs of a map"
            )

    def open(self) -> None:
        """Open the temporary file, and delete those of processes that were killed or lost the run."""
        for old in self._path.parent.glob(f".{self._prefix}.*.part"):
            old.unlink(missing_ok=True)
        self._file = self._temporary.open("xb")

    def write(self, values: Sequence[Any]) -> None:
        """Append one line for each value."""
        assert self._file is not None
        self._file.write(b"".join(map(_line_of, values)))

    def publish(self) -> None:
        """Move the file to its path, durably."""
        assert self._file is not None
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        os.replace(self._temporary, self._path)
        descriptor = os.open(self._path.parent, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        except OSError:
            pass  # Some file systems cannot sync a directory.
        finally:
            os.close(descriptor)

    def discard(self) -> None:
        """Close and delete the temporary file."""
        if self._file is not None:
            self._file.close()
            with contextlib.suppress(OSError):
                os.unlink(self._temporary)


#: A function that returns the items of a map for a state.
ItemsFunction = Callable[[Any], Iterable[Any] | AsyncIterable[Any]]
