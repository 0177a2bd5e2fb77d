"""A Redis server as a store sees it: how it is reached, what is tried again, and what its errors mean."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable, Sequence
from typing import Any, Final, TypeVar

from stroma.checkpoint.durable.worker import permanent_error
from stroma.checkpoint.errors import StoreError
from stroma.checkpoint.redis.format import as_hash, as_text, info_lines
from stroma.checkpoint.redis.scripts import SCRIPT, SHA

__all__ = ["RedisEndpoint", "RedisLink", "script_command"]

T = TypeVar("T")

_log = logging.getLogger("stroma")

_CONNECT_SECONDS: Final = 5.0
_REPLY_SECONDS: Final = 5.0
_LONGEST_PAUSE: Final = 0.5

# Errors in a server's reply that pass by themselves: it starts, fails over, or is busy. The driver turns some of the
# words that they begin with into classes; inside of a script they stay words.
_PASSING: Final = (
    "READONLY", "ReadOnlyError", "LOADING", "MASTERDOWN", "MasterDownError", "TRYAGAIN", "TryAgainError", "BUSY Redis",
)  # fmt: skip
_warned: Final[set[str]] = set()
#: Bytes that one value may have, unless the server says otherwise.
_LARGEST: Final = 512 * 1024 * 1024


class RedisEndpoint:
    """One server, and the driver that talks to it. Shared by all threads of a store.

    Attributes:
        name: its address without the password.
        patience_seconds: how long to try again while it cannot be reached.
        largest: bytes that one value may have; it breaks the connection over a larger one.
    """

    def __init__(self, driver: Any, url: str, patience_seconds: float) -> None:
        where = driver.connection.parse_url(url)  # Raises ValueError for what is no such URL.
        database = where.get("db", 0)
        scheme = url.partition("://")[0].lower()
        if "path" in where:
            self.name = f"unix://{where['path']}?db={database}"
        else:
            self.name = f"{scheme}://{where.get('host', 'localhost')}:{where.get('port', 6379)}/{database}"
        self.patience_seconds = patience_seconds
        self.largest = _LARGEST
        self.no_script: type[Exception] = driver.exceptions.NoScriptError
        #: A reply that says that a command was not done.
        self.refusal: type[Exception] = driver.exceptions.ResponseError
        self._driver = driver
        self._url = url
        self._looked = False

    def link(self) -> RedisLink:
        """Connections of its own, made when they are first used."""
        return RedisLink(self, self.client())

    def client(self) -> Any:
        """The driver's client, with connections of its own."""
        redis = self._driver
        options: dict[str, Any] = {}
        if (maintenance := getattr(redis, "maint_notifications", None)) is not None:
            # With these notifications, the driver uses a connection on which a reply is left over.
            options["maint_notifications_config"] = maintenance.MaintNotificationsConfig(enabled=False)
        # Link decides what is retried, and for how long. Options in the URL take precedence.
        client = redis.Redis.from_url(
            self._url,
            socket_connect_timeout=_CONNECT_SECONDS,
            socket_timeout=_REPLY_SECONDS,
            retry=redis.retry.Retry(redis.backoff.NoBackoff(), 0),
            **options,
        )
        client.connection_pool.connection_kwargs["decode_responses"] = False
        return client

    # ------------------------------------------------------------------ errors

    def patiently(self, call: Callable[[], T], again: Callable[[], None]) -> T:
        """Call until the server is there. Raises the driver's error once the patience is at its end.

        What is called may have been done in spite of an error: it must be such that doing it twice is doing it once.
        """
        deadline, pause = 0.0, 0.01
        while True:
            try:
                return call()
            except Exception as error:
                if not self.passes(error):
                    raise
                now = time.monotonic()
                deadline = deadline or now + self.patience_seconds
                if now >= deadline:
                    raise
                again()
            time.sleep(random.uniform(0, pause))
            pause = min(pause * 2, _LONGEST_PAUSE)

    def passes(self, error: BaseException) -> bool:
        """Return True if the server could not be reached, which may pass in a moment."""
        redis = self._driver
        if isinstance(error, redis.AuthenticationError | redis.exceptions.AuthorizationError):
            return False
        if isinstance(error, redis.ConnectionError | redis.TimeoutError | OSError):
            return True
        return isinstance(error, redis.ResponseError) and _says(error, *_PASSING)

    def is_driver_error(self, error: BaseException) -> bool:
        """Return True if the error comes from the driver or the system."""
        return isinstance(error, self._driver.RedisError | OSError)

    def explain(self, error: Exception) -> StoreError:
        """An error of the driver or of an operation as a StoreError that says what to do."""
        name, said = self.name, str(error)
        if isinstance(error, StoreError):
            return error
        if not self.is_driver_error(error):
            told = permanent_error(f"{name} cannot keep this: {type(error).__name__}: {error}")
        elif _says(
            error, "AuthenticationError", "AuthorizationError", "NOAUTH", "NOPERM", "NoPermissionError"
        ):
            told = permanent_error(
                f"{name} refused the user of the URL ({said}); correct the user and the password, and allow it the "
                "keys stroma:*, EVALSHA and SCRIPT LOAD"
            )
        elif _says(error, "MOVED", "MovedError", "CROSSSLOT", "CrossSlotError", "ClusterDownError"):
            told = permanent_error(f"{name} is part of a Redis Cluster ({said}); use a server that is not")
        elif _says(error, "WRONGTYPE"):
            told = permanent_error(
                f"{name} holds keys stroma:* of another program ({said}); use another database number"
            )
        elif _says(error, "would overflow", "out of range"):
            told = permanent_error(
                f"{name} cannot add up what the run used ({said}); report less for one run"
            )
        elif _says(error, "OOM ", "OutOfMemoryError"):
            told = StoreError(
                f"{name} is out of memory; raise maxmemory, or delete runs, then resume: nothing was evicted for it"
            )
        elif _says(error, "MISCONF"):
            told = StoreError(f"{name} cannot write to its disk ({said}); mend that, then resume")
        elif _says(error, "READONLY", "ReadOnlyError"):
            told = StoreError(
                f"{name} is a replica and takes no writes; give the address of the master, then resume"
            )
        elif self.passes(error):
            told = StoreError(
                f"cannot reach {name} ({said or type(error).__name__}), tried for {self.patience_seconds:g} s; start the "
                "server, or correct the URL, then resume"
            )
        else:
            told = StoreError(f"{name} refused what it was asked ({said}); mend that, then resume")
        told.__cause__ = error
        return told

    # ------------------------------------------------------------------ durability

    def look(self, ask: Callable[..., Any]) -> None:
        """Warn, once for each server and process, about what the server may lose. ``ask``: gives the reply to a command."""
        if self._looked:
            return
        settings = _settings(ask)
        largest = settings.get("proto-max-bulk-len", "")
        self.largest = int(largest) if largest.isdecimal() else _LARGEST
        for problem in _problems(settings):
            as_text = f"{self.name}: {problem}"
            if as_text not in _warned:
                _warned.add(as_text)
                _log.warning("%s", as_text)
        self._looked = True


def _settings(ask: Callable[..., Any]) -> dict[str, str]:
    """Return those of the server's settings that it permits to read."""
    settings: dict[str, str] = {}
    for section in ("persistence", "memory"):
        reply = ask("INFO", section)
        if isinstance(reply, Exception):
            continue
        facts = dict(line.split(":", 1) for line in info_lines(reply) if ":" in line)
        if "aof_enabled" in facts:
            settings["appendonly"] = "no" if facts["aof_enabled"] == "0" else "yes"
        if "maxmemory_policy" in facts:
            settings["maxmemory-policy"] = facts["maxmemory_policy"]
    for setting in ("appendonly", "appendfsync", "maxmemory-policy", "save", "proto-max-bulk-len"):
        reply = ask("CONFIG", "GET", setting)
        if isinstance(reply, Exception):
            break
        settings.update((key, as_text(value)) for key, value in as_hash(reply).items())
    return settings


def _says(error: BaseException, *words: str) -> bool:
    as_text = f"{type(error).__name__}: {error}"
    return any(word in as_text for word in words)


def _problems(settings: dict[str, str]) -> list[str]:
    problems = []
    policy = settings.get("maxmemory-policy", "noeviction")
    if settings.get("appendonly") == "no":
        lost = "everything since its last snapshot" if settings.get("save", "?") else "everything"
        problems.append(
            f"appendonly is off: {lost} is lost when the server crashes; set appendonly yes and appendfsync always"
        )
    elif settings.get("appendfsync") == "everysec":
        problems.append(
            "appendfsync is everysec: what was committed in the last second or two is lost when its machine crashes; "
            "set appendfsync always"
        )
    elif settings.get("appendfsync") == "no":
        problems.append(
            "appendfsync is no: what was committed in the last half minute or so is lost when its machine crashes; "
            "set appendfsync always"
        )
    if policy.startswith("allkeys-"):
        problems.append(
            f"maxmemory-policy is {policy}: runs may be evicted when memory is short, those under way too; "
            "set maxmemory-policy noeviction"
        )
    elif policy.startswith("volatile-"):
        problems.append(
            f"maxmemory-policy is {policy}: finished runs and saved states may be evicted before their time when memory "
            "is short (runs under way are not); set maxmemory-policy noeviction"
        )
    return problems


class RedisLink:
    """Connections to a server, and how commands are sent on them."""

    def __init__(self, server: RedisEndpoint, client: Any) -> None:
        self.server = server
        self.client = client

    def send(self, commands: Sequence[tuple[Any, ...]], *, atomic: bool = False) -> list[Any]:
        """Send commands in one round trip, with ``atomic`` as one transaction, until they are answered.

        Replies that are errors stand among the others. Raises what the driver raises once patience is at its end.
        """
        return self.server.patiently(lambda: self._send(commands, atomic), self._renew)

    def refused(self, command: tuple[Any, ...]) -> StoreError | None:
        """Why a command cannot be sent, if that is so."""
        largest = self.server.largest
        for value in command:
            if type(value) is bytes and (size := len(value)) > largest:
                return permanent_error(
                    f"a payload of {size} bytes is larger than {self.server.name} takes (proto-max-bulk-len is "
                    f"{largest}); give the store blobs=, or raise that, then resume"
                )
        return None

    def _send(self, commands: Sequence[tuple[Any, ...]], atomic: bool) -> list[Any]:
        self.server.look(self._ask)
        for command in commands:
            if (problem := self.refused(command)) is not None:
                raise problem
        replies = self._once(commands, atomic)
        if any(isinstance(reply, self.server.no_script) for reply in replies):
            # A server that was started anew. What was done already is done by that.
            if isinstance(refused := self._ask("SCRIPT", "LOAD", SCRIPT), Exception):
                raise refused
            replies = self._once(commands, atomic)
        for reply in replies:
            if isinstance(reply, Exception) and self.server.passes(reply):
                raise reply
        return replies

    def _ask(self, *command: Any) -> Any:
        (reply,) = self._once([command], False)
        return reply

    def _once(self, commands: Sequence[tuple[Any, ...]], atomic: bool) -> list[Any]:
        pipeline = self.client.pipeline(transaction=atomic)
        for command in commands:
            pipeline.execute_command(*command)
        replies: list[Any] = pipeline.execute(raise_on_error=False)
        return replies

    def _renew(self) -> None:
        self.client.connection_pool.disconnect(inuse_connections=False)

    def close(self) -> None:
        """Close the connections; they are made again when they are used again."""
        self.client.connection_pool.disconnect()


def script_command(prefix: str, operation: str, *values: Any) -> tuple[Any, ...]:
    """The command for an operation of the script."""
    return ("EVALSHA", SHA, 1, prefix, operation, *values)
