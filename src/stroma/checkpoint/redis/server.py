"""The server of a Redis store: connections, retries, and error messages."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Final

from stroma._utils.logs import get_logger
from stroma.checkpoint.durable.worker import permanent_error, retry
from stroma.checkpoint.errors import StoreError
from stroma.checkpoint.redis.format import FORMAT, FORMAT_KEY, as_hash, as_text, info_lines
from stroma.checkpoint.redis.scripts import SCRIPT, SHA

_log = get_logger()

_CONNECT_SECONDS: Final = 5.0
_REPLY_SECONDS: Final = 5.0
_NEWS_SECONDS: Final = 3.0  # between looks whether anybody still listens; less than _REPLY_SECONDS
_PAUSES_SECONDS: Final = (0.01, 0.5)

# Temporary errors in a reply: the server starts, fails over, or is busy. The driver converts some of their
# prefixes to classes, but not those of errors inside a script.
_TEMPORARY: Final = (
    "READONLY",
    "ReadOnlyError",
    "LOADING",
    "MASTERDOWN",
    "MasterDownError",
    "TRYAGAIN",
    "TryAgainError",
    "BUSY Redis",
)
_warned: Final[set[str]] = set()


class RedisEndpoint:
    """A server and its driver. Shared by all threads of a store.

    Attributes:
        name: its address without the password.
        patience_seconds: how long to retry while it cannot be reached.
    """

    def __init__(self, driver: Any, url: str, patience_seconds: float) -> None:
        options = driver.connection.parse_url(url)  # Raises ValueError for an invalid URL.
        database = options.get("db", 0)
        scheme = url.partition("://")[0].lower()
        if "path" in options:
            self.name = f"unix://{options['path']}?db={database}"
        else:
            host, port = options.get("host", "localhost"), options.get("port", 6379)
            self.name = f"{scheme}://{host}:{port}/{database}"
        self.patience_seconds = patience_seconds
        self.no_script: type[Exception] = driver.exceptions.NoScriptError
        self._driver = driver
        self._url = url
        self.has_checked_settings = False

    def link(self) -> RedisLink:
        """Return a link with its own connections, which are opened on first use."""
        return RedisLink(self, self.client())

    def client(self) -> Any:
        """Return a client of the driver with its own connections."""
        redis = self._driver
        options: dict[str, Any] = {}
        if (maintenance := getattr(redis, "maint_notifications", None)) is not None:
            # With these notifications, the driver may reuse a connection with an unread reply.
            options["maint_notifications_config"] = maintenance.MaintNotificationsConfig(enabled=False)
        # RedisLink retries, not the driver. Options in the URL take precedence.
        client = redis.Redis.from_url(
            self._url,
            socket_connect_timeout=_CONNECT_SECONDS,
            socket_timeout=_REPLY_SECONDS,
            retry=redis.retry.Retry(redis.backoff.NoBackoff(), 0),
            **options,
        )
        client.connection_pool.connection_kwargs["decode_responses"] = False
        return client

    def receive_news(self) -> Iterator[bool]:
        """Yield True for each message that a run may be due, False every few seconds. Raises errors."""
        client = self.client()
        try:
            with client.pubsub(ignore_subscribe_messages=True) as channel:
                channel.subscribe("stroma:news")
                while True:
                    yield channel.get_message(timeout=_NEWS_SECONDS) is not None
        finally:
            client.close()

    # ------------------------------------------------------------------ errors

    def is_temporary(self, error: BaseException) -> bool:
        """Return True if the server could not be reached, so that a retry may succeed."""
        redis = self._driver
        if isinstance(error, redis.AuthenticationError | redis.exceptions.AuthorizationError):
            return False
        if isinstance(error, redis.ConnectionError | redis.TimeoutError | OSError):
            return True
        return isinstance(error, redis.ResponseError) and _mentions(error, *_TEMPORARY)

    def is_driver_error(self, error: BaseException) -> bool:
        """Return True if the error comes from the driver or the system."""
        return isinstance(error, self._driver.RedisError | OSError)

    def explain(self, error: Exception) -> StoreError:
        """Return an error of the driver or of an operation as a StoreError that says how to fix it."""
        name, text = self.name, str(error)
        if isinstance(error, StoreError):
            return error
        if not self.is_driver_error(error):
            explained = permanent_error(f"{name} cannot store the data: {type(error).__name__}: {error}")
        elif _mentions(
            error, "AuthenticationError", "AuthorizationError", "NOAUTH", "NOPERM", "NoPermissionError"
        ):
            explained = permanent_error(
                f"{name} refused the user of the URL ({text}); correct the user and the password, and "
                "allow it the keys stroma:*, EVALSHA and SCRIPT LOAD"
            )
        elif _mentions(error, "MOVED", "MovedError", "CROSSSLOT", "CrossSlotError", "ClusterDownError"):
            explained = permanent_error(
                f"{name} is part of a Redis Cluster ({text}); use a server that is not"
            )
        elif _mentions(error, "WRONGTYPE"):
            explained = permanent_error(
                f"{name} holds keys stroma:* of another program ({text}); use another database number"
            )
        elif _mentions(error, "OOM ", "OutOfMemoryError"):
            explained = StoreError(
                f"{name} is out of memory; raise maxmemory, or delete runs, then resume (no data was evicted)"
            )
        elif _mentions(error, "MISCONF"):
            explained = StoreError(f"{name} cannot write to its disk ({text}); fix the disk, then resume")
        elif _mentions(error, "READONLY", "ReadOnlyError"):
            explained = StoreError(
                f"{name} is a replica and refuses writes; use the address of the master, then resume"
            )
        elif self.is_temporary(error):
            explained = StoreError(
                f"cannot reach {name} ({text or type(error).__name__}), tried for "
                f"{self.patience_seconds:g} s; start the server, or correct the URL, then resume"
            )
        else:
            explained = StoreError(f"{name} refused a command ({text}); fix the cause, then resume")
        explained.__cause__ = error
        return explained

    # ------------------------------------------------------------------ durability

    def check_settings(self, settings: dict[str, str]) -> None:
        """Log a warning, once for each server and process, about settings that may lose data."""
        for problem in risks(settings):
            message = f"{self.name}: {problem}"
            if message not in _warned:
                _warned.add(message)
                _log.warning("%s", message)
        self.has_checked_settings = True


def _mentions(error: BaseException, *words: str) -> bool:
    text = f"{type(error).__name__}: {error}"
    return any(word in text for word in words)


def risks(settings: dict[str, str]) -> list[str]:
    """Return the settings of a server that may lose data, each with the fix."""
    problems = []
    policy = settings.get("maxmemory-policy", "noeviction")
    if settings.get("appendonly") == "no":
        lost = "everything since its last snapshot" if settings.get("save", "?") else "everything"
        problems.append(
            f"appendonly is off: {lost} is lost when the server crashes; set appendonly yes and "
            "appendfsync always"
        )
    elif settings.get("appendfsync") == "everysec":
        problems.append(
            "appendfsync is everysec: commits of the last second or two are lost when its machine crashes; "
            "set appendfsync always"
        )
    elif settings.get("appendfsync") == "no":
        problems.append(
            "appendfsync is no: commits of about the last half minute are lost when its machine crashes; "
            "set appendfsync always"
        )
    if policy.startswith("allkeys-"):
        problems.append(
            f"maxmemory-policy is {policy}: runs may be evicted when memory is short, also those in "
            "progress; set maxmemory-policy noeviction"
        )
    elif policy.startswith("volatile-"):
        problems.append(
            f"maxmemory-policy is {policy}: finished runs and saved states may be evicted early when memory "
            "is short (runs in progress are not); set maxmemory-policy noeviction"
        )
    return problems


class RedisLink:
    """Sends commands on its connections to a server."""

    def __init__(self, server: RedisEndpoint, client: Any) -> None:
        self.server = server
        self.client = client

    def send(self, commands: Sequence[tuple[Any, ...]], *, atomic: bool = False) -> list[Any]:
        """Send commands in one round trip, with ``atomic`` as one transaction, until the server replies.

        Returns the replies; a reply may be an exception. Raises the driver's error after
        ``patience_seconds``. Commands may have been executed in spite of an error, so they are idempotent.
        """
        return retry(
            lambda: self._send(commands, atomic),
            self._has_lost_connection,
            self.server.patience_seconds,
            _PAUSES_SECONDS,
        )

    def _send(self, commands: Sequence[tuple[Any, ...]], atomic: bool) -> list[Any]:
        if not self.server.has_checked_settings:
            self._check_format()
            self.server.check_settings(self.settings())
        replies = self._send_once(commands, atomic)
        if any(isinstance(reply, self.server.no_script) for reply in replies):
            # The server was restarted. Repeating commands that were executed is safe.
            if isinstance(error := self._execute("SCRIPT", "LOAD", SCRIPT), Exception):
                raise error
            replies = self._send_once(commands, atomic)
        for reply in replies:
            if isinstance(reply, Exception) and self.server.is_temporary(reply):
                raise reply
        return replies

    def _check_format(self) -> None:
        """Raise StoreError if another release has written the data. Raises the driver's error."""
        reply = self._execute("GET", FORMAT_KEY)
        if isinstance(reply, Exception):
            raise reply
        version = None if reply is None else as_text(reply)
        if version not in (None, str(FORMAT)):
            raise permanent_error(
                f"{self.server.name} has format {version}, and this release has format {FORMAT}; use the "
                "release that wrote it, or another database number"
            )

    def settings(self) -> dict[str, str]:
        """Return the settings of the server that this user may read, and its version."""
        settings: dict[str, str] = {}
        for section in ("server", "persistence", "memory"):
            reply = self._execute("INFO", section)
            if not isinstance(reply, Exception):
                settings |= dict(line.split(":", 1) for line in info_lines(reply) if ":" in line)
        settings["appendonly"] = "no" if settings.get("aof_enabled") == "0" else "?"
        settings["maxmemory-policy"] = settings.get("maxmemory_policy", "noeviction")
        for setting in ("appendonly", "appendfsync", "maxmemory-policy", "save"):
            reply = self._execute("CONFIG", "GET", setting)
            if isinstance(reply, Exception):
                break
            settings |= {key: as_text(value) for key, value in as_hash(reply).items()}
        return settings

    def _execute(self, *command: Any) -> Any:
        (reply,) = self._send_once([command], False)
        return reply

    def _send_once(self, commands: Sequence[tuple[Any, ...]], atomic: bool) -> list[Any]:
        pipeline = self.client.pipeline(transaction=atomic)
        for command in commands:
            pipeline.execute_command(*command)
        replies: list[Any] = pipeline.execute(raise_on_error=False)
        return replies

    def _has_lost_connection(self, error: Exception) -> bool:
        """Return True for a temporary error, after which idle connections are not used again."""
        if not self.server.is_temporary(error):
            return False
        self.client.connection_pool.disconnect(inuse_connections=False)
        return True

    def close(self) -> None:
        """Close the connections. They are opened again on the next use."""
        self.client.connection_pool.disconnect()


def script_command(prefix: str, operation: str, *values: Any) -> tuple[Any, ...]:
    """Return the command for an operation of the script."""
    return ("EVALSHA", SHA, 1, prefix, operation, *values)
