"""--db: which store, opened so that every way in which that fails is one message."""

from __future__ import annotations

import os
import re
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol, TypeVar
from urllib.parse import unquote

import click

from stroma._utils.text import clean
from stroma.checkpoint.durable.states import AsyncStates
from stroma.checkpoint.errors import CheckpointNotFound, PipelineChanged, RunExists, StoreError
from stroma.checkpoint.memory.store import AsyncInMemoryStore
from stroma.checkpoint.protocols import Waiting
from stroma.checkpoint.records import RunRecord
from stroma.checkpoint.sqlite.store import SQLiteStore
from stroma.checkpoint.urls import open_store
from stroma.cli.errors import Code, Problem, command
from stroma.cli.formatting import ago
from stroma.cli.output import err

__all__ = ["Database", "Keeper", "db_option"]

F = TypeVar("F", bound=Callable[..., Any])
#: What may be a password: from the first colon of "user:password@host" on, and whatever an option calls one.
_USER: Final = re.compile(r"(?<=://)([^:@]*):.+@", re.DOTALL)
_SECRET: Final = re.compile("passw(or)?d|pwd|passphrase|token|secret|api_?key", re.IGNORECASE)
#: "name = value" as libpq reads it: a value may be quoted, with backslashes before quotes in it.
_PAIR: Final = re.compile(r"([^\s=&?]*)(\s*=\s*)('(?:\\.|[^'\\])*(?:'|$)|[^\s&]*)", re.DOTALL)


def db_option(func: F) -> F:
    """The option that every command with a store has."""
    return click.option(
        "--db",
        envvar="STROMA_DB",
        metavar="PATH_OR_URL",
        help="The store: a SQLite file, or a URL (postgresql://, redis://).  [env: STROMA_DB; default: runs.db in your data directory]",
    )(func)


def masked(given: str) -> str:
    """A path or URL without its passwords, whatever form they have."""
    if "://" not in given:
        return _PAIR.sub(lambda pair: f"{pair[1]}{pair[2]}***" if _is_secret(pair[1]) else pair[0], given)
    if not given.startswith(("sqlite:", "memory:")):
        given = _USER.sub(r"\1:***@", given)
    address, mark, query = given.partition("?")
    options = [option.partition("=") for option in query.split("&")]
    shown = "&".join(
        f"{name}=***" if _is_secret(name) else f"{name}{sep}{value}" for name, sep, value in options
    )
    return f"{address}{mark}{shown}"


def _is_secret(name: str) -> bool:
    return _SECRET.search(unquote(name)) is not None


def data_directory() -> Path:
    """Where this user's programs keep data, by the conventions of the platform."""
    given = os.environ.get("XDG_DATA_HOME", "")
    if os.path.isabs(given):
        return Path(given, "stroma")
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local", "stroma")
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Application Support" / "stroma"
    return Path.home() / ".local" / "share" / "stroma"


class Keeper(Protocol):
    """Where runs are kept, in words, and the commands that find them there."""

    @property
    def name(self) -> str: ...
    @property
    def keeps(self) -> bool: ...
    def command(self, name: str, *arguments: str, options: Sequence[str] = ()) -> str: ...
    def hint(self, name: str, *arguments: str, options: Sequence[str] = ()) -> str: ...


@dataclass(frozen=True, slots=True)
class Database:
    """The store that a command was given.

    Attributes:
        name: as messages show it, without a password.
        words: the option to repeat in a command that shall find the same store; none if it holds a password.
        is_default: nothing was given.
        is_secret: the option holds a password, and so is not shown.
    """

    name: str
    words: tuple[str, ...]
    is_default: bool
    store: AsyncStates | AsyncInMemoryStore
    is_secret: bool = False

    @classmethod
    def choose(cls, given: str | None, *, quiet: bool = False) -> Database:
        """The store of --db, of STROMA_DB, or the default one. Nothing is opened yet. Raises Problem.

        Warns of a file that others can write to, unless ``quiet``.
        """
        database = cls._chosen(given)
        problem = None if quiet else database.written_by_others()
        if problem is not None:
            err.line(("warning: ", "yellow"), "; ".join(problem))
        return database

    def written_by_others(self) -> tuple[str, str] | None:
        """Return what is wrong with who may write to the file of the store, and the fix; None if nothing is."""
        if not isinstance(self.store, SQLiteStore) or not hasattr(os, "geteuid"):
            return None
        try:
            found = os.stat(self.store.path)
        except OSError:
            return None
        fix = f"chmod go-w {shlex.quote(self.store.path)}"
        if found.st_mode & 0o022:
            return f"{self.name} can be written by other users, who can change what runs go on with", fix
        if found.st_uid not in (0, os.geteuid()):
            return (
                f"{self.name} belongs to another user, who can change what runs go on with",
                "use one of your own",
            )
        return None

    @classmethod
    def _chosen(cls, given: str | None) -> Database:
        if not given:
            try:
                path = data_directory() / "runs.db"
            except RuntimeError as error:  # No home directory.
                raise Problem(
                    f"there is no place for the store: {error}", "name one: --db FILE", code=Code.ENVIRONMENT
                ) from None
            return cls(str(path), (), True, SQLiteStore(path))
        shown = masked(given)
        secret = shown != given
        try:
            store = open_store(given)
        except ValueError as error:
            why = str(error)
            if secret:  # The message may quote a part of the password.
                why = "this is no address of a store; in a password, write @ as %40, / as %2F and : as %3A"
            raise Problem(f"--db {clean(shown)}: {why}", code=Code.USAGE) from (None if secret else error)
        except ImportError as error:
            raise Problem(f"--db {clean(shown)}: {error}", code=Code.ENVIRONMENT) from error
        if isinstance(store, SQLiteStore) and os.path.isdir(store.path):
            raise Problem(f"--db {shown} is a directory", "name a file in it", code=Code.ENVIRONMENT)
        context = click.get_current_context(silent=True)
        source = None if context is None else context.get_parameter_source("db")
        if source is click.core.ParameterSource.ENVIRONMENT:
            return cls(shown, (), False, store)
        return cls(shown, () if secret else ("--db", given), False, store, secret)

    def command(self, name: str, *arguments: str, options: Sequence[str] = ()) -> str:
        """A command line of ours that finds the same store, but for an option with a password."""
        return command(name, *arguments, options=(*options, *self.words))

    def hint(self, name: str, *arguments: str, options: Sequence[str] = ()) -> str:
        """The same for a person, who is told what is missing."""
        line = self.command(name, *arguments, options=options)
        return f"{line}  (with the same --db)" if self.is_secret else line

    @property
    def keeps(self) -> bool:
        """Whether another process can find what this one stores."""
        return isinstance(self.store, AsyncStates)

    async def close(self) -> None:
        """Write what is queued, and disconnect."""
        if isinstance(self.store, AsyncStates):
            await self.store.aclose()

    def prepare(self) -> None:
        """Make the directory of the default store, readable by nobody else."""
        if not self.is_default:
            return
        missing = [path for path in Path(self.name).parents if not path.exists()]
        try:
            for path in reversed(missing):
                path.mkdir(mode=0o700, exist_ok=True)
        except OSError as error:
            raise Problem(
                f"the directory of the store cannot be made: {error.strerror}: {error.filename}",
                "make it, or name another store: --db FILE, or STROMA_DB=FILE",
                code=Code.ENVIRONMENT,
            ) from error

    @contextmanager
    def explained(self) -> Iterator[None]:
        """What the store raises ends the command with its own words, which say what to do."""
        try:
            yield
        except StoreError as error:
            raise self.problem(error) from error

    def problem(self, error: StoreError, *more: str) -> Problem:
        """A StoreError as the end of a command."""
        code = Code.ENVIRONMENT
        if isinstance(error, CheckpointNotFound):
            code = Code.NOT_FOUND
        elif isinstance(error, (PipelineChanged, RunExists)):
            code = Code.USAGE
        return Problem(clean(str(error), 1000), *more, code=code)

    # ------------------------------------------------------------------ reading

    @property
    def reader(self) -> AsyncStates:
        """The store, to read runs from. Raises Problem if there is none."""
        if not isinstance(self.store, AsyncStates):
            raise Problem(
                f"{self.name} keeps nothing once its process has ended",
                "name a store that lasts: --db FILE",
                code=Code.USAGE,
            )
        if self._is_missing and not self.is_default:
            raise Problem(
                f"there is no store {self.name}",
                f"check --db, or begin one: {self.hint('run', 'FILE.py:NAME')}",
                code=Code.NOT_FOUND,
            )
        return self.store

    @property
    def is_empty(self) -> bool:
        """Whether nothing was ever run with the default store."""
        return self.is_default and self._is_missing

    @property
    def _is_missing(self) -> bool:
        # A file may not be there; a server is, or cannot be reached.
        return isinstance(self.store, SQLiteStore) and not os.path.exists(self.store.path)

    def find(self, run: str) -> RunRecord:
        """The one run that an id, its beginning, or "last" names. Raises Problem."""
        store = self.reader
        with self.explained():
            try:
                found = [] if self.is_empty else store.find_run(run)
                records = [record for run_id in found if (record := store.get_run(run_id)) is not None]
            except ValueError as error:  # No text that an id can be.
                raise Problem(str(error), code=Code.USAGE) from None
        if len(records) == 1:
            return records[0]
        if not records:
            what = "there is no run yet" if run == "last" else f"there is no run whose id begins with {run!r}"
            raise Problem(
                f"{what} in {self.name}",
                f"see which there are: {self.hint('runs')}",
                code=Code.NOT_FOUND,
            )
        lines = [
            f"{clean(r.run_id, 80)}  {clean(r.pipeline, 40)}  {r.status}  {ago(r.started_ms)}"
            for r in records
        ]
        raise Problem(
            f"{run!r} begins the ids of {len(records)}{' or more' if len(records) >= 20 else ''} runs; give more of the one you mean", *lines, code=Code.USAGE
        )  # fmt: skip

    def known(self, run_id: str) -> RunRecord | None:
        """The run with exactly this id, if the store has it already."""
        if not isinstance(self.store, AsyncStates) or self._is_missing:
            return None
        with self.explained():
            return self.store.get_run(run_id)

    def waiting(self, run_id: str) -> list[Waiting]:
        """What nodes of a run wait for, or waited for. Raises Problem."""
        with self.explained():
            return self.store.waiting(run_id)
