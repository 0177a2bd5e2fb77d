"""`stroma doctor`."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
import time
from collections.abc import Iterator
from typing import Final, Literal, NamedTuple

import click

from stroma._utils.distributions import find_other_distribution, installed_version, reinstall_command
from stroma._utils.text import clean, format_duration
from stroma.checkpoint.durable.states import AsyncStates
from stroma.checkpoint.errors import StoreError
from stroma.checkpoint.sqlite.store import SQLiteStore
from stroma.cli.errors import Code, Problem
from stroma.cli.output import emit_fields, out
from stroma.cli.stores import Database, db_option

#: Extra: its purpose, and the modules that it installs.
_EXTRAS: Final = {
    "redis": ("runs in Redis", ("redis",)),
    "postgres": ("runs in PostgreSQL", ("psycopg",)),
    "blobs": ("large payloads in object stores", ("fsspec",)),
    "otel": ("OpenTelemetry", ("opentelemetry.sdk", "opentelemetry.exporter.otlp.proto.http")),
    "prometheus": ("Prometheus", ("prometheus_client",)),
    "datadog": ("Datadog", ("ddtrace", "datadog")),
    "sentry": ("Sentry", ("sentry_sdk",)),
    "ui": ("the web interface", ("starlette", "uvicorn", "jinja2")),
    "demo": ("the demo", ("openai",)),
}
_LEAST_FREE: Final = 200_000_000  # bytes
_CLOCK_SECONDS: Final = 5.0

_Verdict = Literal["ok", "note", "missing", "wrong"]
_STYLES: Final = {"ok": "green", "note": "yellow", "missing": "dim", "wrong": "bold red"}


class Diagnosis(NamedTuple):
    """Result of one check, with the fix if there is a problem."""

    check: str
    verdict: _Verdict
    message: str
    fix: str | None = None


@click.command()
@click.option("--json", "as_json", is_flag=True, help='Print one JSON object, schema "stroma.doctor/1".')
@db_option
def doctor(as_json: bool, db: str | None) -> int:
    """Check the store and its format, the disk, the clock and the packages.

    Each line is ok or names the fix; a package that is not installed is missing. Exit code 3 if a check
    fails. Nothing is changed.
    """
    findings = [*_programs()]
    try:
        database = Database.from_option(db)
    except Problem as error:
        findings.append(Diagnosis("store", "wrong", error.message, error.more[-1] if error.more else None))
    else:
        findings += [*_store(database), *_disk(database)]
    findings += _extras()
    wrong = sum(one.verdict == "wrong" for one in findings)
    if as_json:
        emit_fields("stroma.doctor/1", ok=not wrong, checks=[one._asdict() for one in findings])
    else:
        for one in findings:
            # Most packages are missing because nobody needs them: one line for each.
            message = f"{one.message}; {one.fix}" if one.verdict == "missing" else one.message
            out.line((f"{one.verdict:<8}", _STYLES[one.verdict]), f"{one.check:<12} {clean(message, 500)}")
            if one.fix is not None and one.verdict != "missing":
                out.line(f"{'':<21}fix: {clean(one.fix, 500)}")
    return Code.ENVIRONMENT if wrong else Code.OK


def _programs() -> Iterator[Diagnosis]:
    version, pydantic = installed_version("stroma-runner"), installed_version("pydantic")
    where = ".".join(map(str, sys.version_info[:3]))
    yield Diagnosis("stroma", "ok", f"{version or '(not installed)'}, Python {where}, pydantic {pydantic}")
    other = next(filter(None, map(find_other_distribution, sys.path)), None)
    if other is not None:
        message = (
            f"the distribution {other!r} is another project that installs files over those of stroma-runner"
        )
        yield Diagnosis("packages", "note", message, reinstall_command())


def _store(database: Database) -> Iterator[Diagnosis]:
    store = database.store
    if not isinstance(store, AsyncStates):
        yield Diagnosis("store", "ok", f"{database.name} is lost when its process ends")
        return
    if isinstance(store, SQLiteStore) and not store.exists():
        directory = os.path.dirname(store.path)
        if os.path.exists(f"{store.path}-wal"):
            message = (
                f"{database.name} was moved or deleted: its file {os.path.basename(store.path)}-wal is there"
            )
            yield Diagnosis(
                "store", "wrong", message, "bring the file back, or restore a copy of all its files"
            )
        elif database.is_default or os.access(directory, os.W_OK | os.X_OK):
            message = f"{database.name} does not exist yet: the first run creates it"
            yield Diagnosis("store", "ok", message, f"start one: {database.hint('run', 'FILE.py:NAME')}")
        else:
            fix = "change its permissions, or name another store: --db FILE"
            yield Diagnosis("store", "wrong", f"{directory} may not be written to", fix)
        return
    began = time.perf_counter()
    try:
        facts = store.facts()
        newest = store.list_runs(limit=1)
    except StoreError as error:
        yield Diagnosis("store", "wrong", str(error))
        return
    took = time.perf_counter() - began
    problem = database.find_write_risk()
    if problem is not None:
        yield Diagnosis("store", "note", *problem)
    if facts is None:
        yield Diagnosis("store", "ok", f"{database.name} answers; the first run creates its tables")
        return
    contents = "no runs" if not newest else "has runs"
    yield Diagnosis(
        "store", "ok", f"{database.name}: {facts.system}, {contents}, answers in {1000 * took:.0f} ms"
    )
    yield Diagnosis("format", "ok", f"{facts.format}, which this release writes")
    for warning in facts.warnings:
        what, _, fix = warning.rpartition("; ")
        yield Diagnosis("settings", "note", what, fix)
    yield _clock(facts.clock_ms)


def _clock(clock_ms: int | None) -> Diagnosis:
    now = time.time()
    if clock_ms is None:
        return Diagnosis("clock", "ok", "leases go by a clock of this machine that nobody can set")
    apart = abs(now - clock_ms / 1000)
    if apart > _CLOCK_SECONDS:
        message = (
            f"this machine's and the server's are {format_duration(apart)} apart: times of attempts "
            "and runs do not match"
        )
        return Diagnosis("clock", "note", message, "set both by NTP")
    return Diagnosis("clock", "ok", "this machine's and the server's agree; leases go by the server's")


def _disk(database: Database) -> Iterator[Diagnosis]:
    store = database.store
    if not isinstance(store, SQLiteStore):
        return
    place = store.path
    while not os.path.exists(place) and os.path.dirname(place) != place:
        place = os.path.dirname(place)
    free = shutil.disk_usage(place).free
    message = f"{free / 1e9:.1f} GB free at {place}"
    if free < _LEAST_FREE:
        yield Diagnosis(
            "disk",
            "wrong",
            message,
            "free some space, or delete old runs: " + database.hint("gc", options=("--older-than", "30d")),
        )
    else:
        yield Diagnosis("disk", "ok", message)


def _extras() -> Iterator[Diagnosis]:
    for extra, (purpose, modules) in _EXTRAS.items():
        if all(map(_is_installed, modules)):
            yield Diagnosis(f"[{extra}]", "ok", purpose)
        else:
            install = f"pip install 'stroma-runner[{extra}]'"
            yield Diagnosis(f"[{extra}]", "missing", f"{purpose}: not installed", install)


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # The package around it is not installed.
        return False
