"""Owners of runs: the name of a process, and the test whether that process still exists."""

from __future__ import annotations

import functools
import os
import pathlib
import socket
from typing import Any, Final, NamedTuple
from weakref import WeakValueDictionary

__all__ = ["LIVE_SESSIONS", "Owner", "boot_id", "is_gone", "new_owner"]

#: Begins the token of a session that never says when it ends.
_ENDLESS: Final = "-"

#: The sessions of this process, by the token of their owner.
LIVE_SESSIONS: Final[WeakValueDictionary[str, Any]] = WeakValueDictionary()


class Owner(NamedTuple):
    """One session in one process.

    Attributes:
        boot: which start of its machine the process belongs to; "" where the system does not say.
        space: what its process id is valid in (a container has one of its own); 0 where the system does not say.
        born: when the process started, in ticks since the boot: ids are used again. 0 where the system does not say.
        token: tells the sessions of a process apart.
    """

    host: str
    boot: str
    space: int
    pid: int
    born: int
    token: str

    def __str__(self) -> str:
        return "|".join(map(str, self))

    @property
    def place(self) -> str:
        """ "process 123 on host", for messages."""
        return f"process {self.pid} on {self.host}"

    @property
    def may_die(self) -> bool:
        """Return True if a run without an end means that its process died: the process records ends, and is another one."""
        here = _process(os.getpid())
        return not self.token.startswith(_ENDLESS) and self[:5] != here[:5]

    @classmethod
    def read(cls, text: str | None) -> Owner | None:
        """Parse the text that ``str()`` wrote; return None for any other text, since it comes from a store."""
        parts = (text or "").split("|")
        try:
            host, boot, space, pid, born, token = parts
            return cls(host, boot, int(space), int(pid), int(born), token)
        except ValueError:
            return None


def new_owner(session: object, *, ends: bool = True) -> Owner:
    """A name for a session of this process, which counts as alive for as long as it is not collected.

    One that does not say when it ends never counts as alive in its own process.
    """
    token = os.urandom(8).hex()
    owner = _process(os.getpid())._replace(token=token if ends else f"{_ENDLESS}{token}")
    if ends:
        LIVE_SESSIONS[owner.token] = session
    return owner


def is_gone(owner: Owner) -> bool:
    """Return whether the system says that a session's process has ended. Only its lease can tell of all others."""
    here = _process(os.getpid())
    if not here.boot or (owner.boot, owner.space) != (here.boot, here.space):
        return False
    if (owner.pid, owner.born) == (here.pid, here.born):
        return owner.token not in LIVE_SESSIONS
    return _has_ended(owner.pid, owner.born)


@functools.cache
def boot_id() -> str:
    """Which start of the machine this is; "" where the system does not say."""
    try:
        return pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


@functools.cache
def _process(pid: int) -> Owner:
    boot = boot_id()
    try:
        space = os.stat("/proc/self/ns/pid").st_ino
    except OSError:
        boot, space = "", 0
    try:
        born = int(_stat(pid)[19])
    except OSError:
        born = 0
    return Owner(socket.gethostname().replace("|", "_"), boot, space, pid, born, "")


def _has_ended(pid: int, born: int) -> bool:
    """Return whether a process has ended: its id is free, is another process's, or only its exit code is left."""
    if pid <= 0:
        return False
    try:
        fields = _stat(pid)
    except OSError:  # Gone, or hidden from this user (hidepid=2, ProtectProc=invisible).
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        except (OSError, OverflowError):
            pass
        return False
    return fields[0] in "ZX" or (born > 0 and int(fields[19]) != born)


def _stat(pid: int) -> list[str]:
    """Return what the system says of a process, from its state on. Raises OSError."""
    # The name of the program stands in parentheses and may hold any character.
    return pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def _after_fork() -> None:
    LIVE_SESSIONS.clear()  # They are the parent's.


if hasattr(os, "register_at_fork"):  # pragma: no branch
    os.register_at_fork(after_in_child=_after_fork)
