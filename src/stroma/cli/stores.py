"""--db: the store of a command; every failure to open it is one message."""

from __future__ import annotations

import asyncio
import os
import re
import shlex
import sys
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeVar
from urllib.parse import unquote

import click

from stroma._utils.text import clean
from stroma.checkpoint.durable.states import AsyncStates
from stroma.checkpoint.durable.store import DurableStore
from stroma.checkpoint.errors import (
    CheckpointNotFound,
    PipelineChanged,
    RequestRefused,
    RunExists,
    StoreError,
)
from stroma.checkpoint.memory.store import AsyncInMemoryStore
from stroma.checkpoint.records import RunRecord
from stroma.checkpoint.sqlite.store import SQLiteStore
from stroma.checkpoint.urls import open_store
from stroma.cli.errors import Code, Problem, command
from stroma.cli.formatting import format_age, id_word
from stroma.cli.output import err

#: Stands for the pipeline of a run in a hint, where the store does not know it.
TARGET: Final = "FILE.py:NAME"
_TARGET: Final = re.compile(r"[\w./][\w./-]*:\w+", re.ASCII)
F = TypeVar("F", bound=Callable[..., Any])
T = TypeVar("T")
#: Passwords: the part after the first colon of "user:password@host", and options with such names.
_USER: Final = re.compile(r"(?<=://)([^:@]*):.+@", re.DOTALL)
_SECRET: Final = re.compile("passw(or)?d|pwd|passphrase|token|secret|api_?key", re.IGNORECASE)
#: "name = value" in the syntax of libpq: values may be quoted, with backslashes before inner quotes.
_PAIR: Final = re.compile(r"([^\s=&?]*)(\s*=\s*)('(?:\\.|[^'\\])*(?:'|$)|[^\s&]*)", re.DOTALL)


def add_options(*options: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Return a decorator that adds options to a command, the last one as the first of its help."""

    def add(func: Any) -> Any:
        for option in options:
            func = option(func)
        return func

    return add


def db_option(func: F) -> F:
    """Add --db to a command."""
    return click.option(
        "--db",
        envvar="STROMA_DB",
        metavar="PATH_OR_URL",
        help="Store: a SQLite file or a URL (postgresql://, redis://).  [env: STROMA_DB; default: "
        "runs.db in your data directory]",
    )(func)


def mask_passwords(address: str) -> str:
    """Return a path or URL with each password replaced by ***."""
    if "://" not in address:
        return _PAIR.sub(lambda pair: f"{pair[1]}{pair[2]}***" if _is_secret(pair[1]) else pair[0], address)
    if not address.startswith(("sqlite:", "memory:")):
        address = _USER.sub(r"\1:***@", address)
    address, mark, query = address.partition("?")
    options = [option.partition("=") for option in query.split("&")]
    masked_address = "&".join(
        f"{name}=***" if _is_secret(name) else f"{name}{sep}{value}" for name, sep, value in options
    )
    return f"{address}{mark}{masked_address}"


def _is_secret(name: str) -> bool:
    return _SECRET.search(unquote(name)) is not None


def store_problem(error: StoreError, *more: str) -> Problem:
    """Return the Problem for a StoreError."""
    code = Code.ENVIRONMENT
    if isinstance(error, CheckpointNotFound):
        code = Code.NOT_FOUND
    elif isinstance(error, (PipelineChanged, RequestRefused, RunExists)):
        code = Code.USAGE
    return Problem(clean(str(error), 1000), *more, code=code)


def data_directory() -> Path:
    """Return the data directory of this user, by the conventions of the platform."""
    address = os.environ.get("XDG_DATA_HOME", "")
    if os.path.isabs(address):
        return Path(address, "stroma")
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local", "stroma")
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Application Support" / "stroma"
    return Path.home() / ".local" / "share" / "stroma"


class _DefaultStore(SQLiteStore):
    """The store in the data directory, which :meth:`Database.prepare` creates before the first write."""

    _needs_directory = False


@dataclass(frozen=True, slots=True)
class Database:
    """Store of a command.

    Attributes:
        name: name for messages, without a password.
        words: option that selects the same store in another command; empty if it holds a password.
        is_default: no store was named.
        is_secret: the option holds a password and is not printed.
    """

    name: str
    words: tuple[str, ...]
    is_default: bool
    store: AsyncStates | AsyncInMemoryStore
    is_secret: bool = False

    @classmethod
    def from_option(cls, address: str | None, *, quiet: bool = False) -> Database:
        """Return the store of --db, of STROMA_DB, or the default one, without opening it. Raises Problem.

        Warns about a file that others can write to, unless ``quiet``.
        """
        database = cls._open(address)
        problem = None if quiet else database.find_write_risk()
        if problem is not None:
            err.line(("warning: ", "yellow"), "; ".join(problem))
        return database

    def find_write_risk(self) -> tuple[str, str] | None:
        """Return the problem and its fix if other users can write to the file of the store, else None."""
        if not isinstance(self.store, SQLiteStore) or not hasattr(os, "geteuid"):
            return None
        try:
            run_ids = os.stat(self.store.path)
        except OSError:
            return None
        fix = f"chmod go-w {shlex.quote(self.store.path)}"
        if run_ids.st_mode & 0o022:
            return f"{self.name} can be written by other users, who could change stored states", fix
        if run_ids.st_uid not in (0, os.geteuid()):
            return (
                f"{self.name} belongs to another user, who could change stored states",
                "use a store of your own",
            )
        return None

    @classmethod
    def _open(cls, address: str | None) -> Database:
        if not address:
            try:
                path = data_directory() / "runs.db"
            except RuntimeError as error:
                raise Problem(
                    f"no directory for the store: {error}", "name a store: --db FILE", code=Code.ENVIRONMENT
                ) from None
            return cls(str(path), (), True, _DefaultStore(path))
        masked_address = mask_passwords(address)
        is_secret = masked_address != address
        try:
            store = open_store(address)
        except ValueError as error:
            why = str(error)
            if is_secret:  # The message may quote a part of the password.
                why = "not the address of a store; in a password, write @ as %40, / as %2F and : as %3A"
            raise Problem(f"--db {clean(masked_address)}: {why}") from (None if is_secret else error)
        except ImportError as error:
            raise Problem(f"--db {clean(masked_address)}: {error}", code=Code.ENVIRONMENT) from error
        except StoreError as error:
            what = str(error).partition("; ")[0]
            raise Problem(
                f"--db {clean(masked_address)}: {what}",
                "create it, or name another store: --db FILE",
                code=Code.ENVIRONMENT,
            ) from error
        if isinstance(store, SQLiteStore) and os.path.isdir(store.path):
            raise Problem(f"--db {masked_address} is a directory", "name a file in it", code=Code.ENVIRONMENT)
        context = click.get_current_context(silent=True)
        source = None if context is None else context.get_parameter_source("db")
        if source is click.core.ParameterSource.ENVIRONMENT:
            return cls(masked_address, (), False, store)
        return cls(masked_address, () if is_secret else ("--db", address), False, store, is_secret)

    def command(self, name: str, *arguments: str, options: Sequence[str] = ()) -> str:
        """Return a stroma command line for the same store; an option with a password is omitted."""
        return command(name, *arguments, options=(*options, *self.words))

    def hint(self, name: str, *arguments: str, options: Sequence[str] = ()) -> str:
        """Return the command line for a person, with a note about a missing --db."""
        line = self.command(name, *arguments, options=options)
        return f"{line}  (with the same --db)" if self.is_secret else line

    @property
    def is_durable(self) -> bool:
        """Return True if other processes can read what this one stores."""
        return isinstance(self.store, AsyncStates)

    def require_durable(self) -> AsyncStates:
        """Return the store, which other processes can read too. Raises Problem for a store in memory."""
        if not isinstance(self.store, AsyncStates):
            raise Problem(
                f"{self.name} is not durable: it is lost when its process ends",
                "name a durable store: --db PATH_OR_URL",
            )
        return self.store

    def describe_other(self, store: object) -> str | None:
        """Return the address of a durable store of a program if it is not this one; else None."""
        address = getattr(store, "address", None)
        if not isinstance(store, DurableStore) or address == getattr(self.store, "address", None):
            return None
        return clean(str(address), 200)

    async def close(self) -> None:
        """Flush queued writes and disconnect."""
        if isinstance(self.store, AsyncStates):
            await self.store.aclose()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Await something that uses the store, then disconnect."""

        async def work_and_close() -> T:
            try:
                return await work
            finally:
                await self.close()

        return asyncio.run(work_and_close())

    def prepare(self) -> None:
        """Create the directory of the default store, readable only by its owner."""
        if not self.is_default:
            return
        missing = [path for path in Path(self.name).parents if not path.exists()]
        try:
            for path in reversed(missing):
                path.mkdir(mode=0o700, exist_ok=True)
        except OSError as error:
            raise Problem(
                f"cannot create the directory of the store: {error.strerror}: {error.filename}",
                "create it, or name another store: --db FILE, or STROMA_DB=FILE",
                code=Code.ENVIRONMENT,
            ) from error

    # ------------------------------------------------------------------ reading

    @property
    def reader(self) -> AsyncStates:
        """The store for reading. Raises Problem if it does not exist."""
        store = self.require_durable()
        if self._is_missing and not self.is_default:
            raise Problem(
                f"store {self.name} does not exist",
                f"check --db, or create it: {self.hint('run', 'FILE.py:NAME')}",
                code=Code.NOT_FOUND,
            )
        return store

    @property
    def is_empty(self) -> bool:
        """Return True if the default store does not exist yet."""
        return self.is_default and self._is_missing

    @property
    def other_stores(self) -> tuple[str, ...]:
        """Lines that explain how to name another store, if none was named."""
        return ("for another store, pass --db PATH_OR_URL or set STROMA_DB",) if self.is_default else ()

    @property
    def _is_missing(self) -> bool:
        # Only a file can be missing.
        return isinstance(self.store, SQLiteStore) and not os.path.exists(self.store.path)

    def read_named(self, read: Callable[[Any, str], T | None], name: str, missing: str) -> T:
        """Return a limit or a budget by its name. Raises Problem, which says what is ``missing``."""
        store = self.reader
        try:
            state = None if self.is_empty else read(store, name)
        except ValueError as error:  # Not a valid name.
            raise Problem(str(error)) from None
        if state is None:
            fix = "check its name, and pass the store that it uses: --db"
            if not self.is_empty and self.get_run(name) is not None:
                fix = f"a run has this id; what it spent: {self.hint('show', id_word(name))}"
            raise Problem(f"{missing} {clean(name, 100)!r} in {self.name}", fix, code=Code.NOT_FOUND)
        return state

    def find(self, run: str, *, to_change: bool = False) -> RunRecord:
        """Return the run that an id, a prefix of one, or "last" names. Raises Problem.

        ``to_change``: a prefix does not name a run, except for the one that tables show of a generated id.
        """
        store = self.reader
        try:
            run_ids = [] if self.is_empty else store.find_run(run)
            records = [record for run_id in run_ids if (record := store.get_run(run_id)) is not None]
        except ValueError as error:  # Not a valid id.
            raise Problem(str(error)) from None
        is_named = not to_change or run == "last"
        is_named = is_named or any(run in (r.run_id, id_word(r.run_id)) for r in records)
        if len(records) == 1 and is_named:
            return records[0]
        if not records:
            what = "no runs" if run == "last" else f"no run whose id begins with {run!r}"
            raise Problem(
                f"{what} in {self.name}",
                f"list the runs: {self.hint('runs')}",
                *self.other_stores,
                code=Code.NOT_FOUND,
            )
        from stroma.checkpoint.history.facts import status_of

        lines = [
            f"{clean(r.run_id, 80)}  {clean(r.pipeline, 40)}  {status_of(r)}  {format_age(r.started_ms)}"
            for r in records
        ]
        if not is_named:
            raise Problem(f"no run {run!r} in {self.name}; pass the whole id", *lines, code=Code.NOT_FOUND)
        many = f"{len(records)}{' or more' if len(records) >= 20 else ''}"
        raise Problem(f"{run!r} is a prefix of {many} run ids; pass more characters", *lines)

    def target_of(self, record: RunRecord) -> str:
        """Return FILE:NAME of the command that ran a run last, if it can be pasted; else a placeholder.

        The text comes from the store: it is shown, and never imported by itself.
        """
        try:
            target = self.reader.attribution(record.run_id).get("target", "")
        except StoreError:
            target = ""
        return target if _TARGET.fullmatch(target) else TARGET

    def get_run(self, run_id: str) -> RunRecord | None:
        """Return the run with exactly this id; None if the store has none."""
        if not isinstance(self.store, AsyncStates) or self._is_missing:
            return None
        return self.store.get_run(run_id)
