"""Owners of runs: the identity of a process, and a check that the process has ended."""

from __future__ import annotations

import functools
import os
import pathlib
import socket
from typing import Any, Final, NamedTuple
from weakref import WeakValueDictionary

#: Prefix of the token of a session that does not record its end.
_ENDLESS: Final = "-"

#: The sessions of this process, by the token of their owner. In a forked child, those of the parent as well.
LIVE_SESSIONS: Final[WeakValueDictionary[str, Any]] = WeakValueDictionary()


class Owner(NamedTuple):
    """One session in one process.

    Attributes:
        boot: id of the start of its machine; "" if unknown.
        space: namespace of its process id (each container has one); 0 if unknown.
        born: start of the process in ticks since the start of the machine, since process ids are reused; 0 if
            unknown.
        token: distinguishes the sessions of a process.
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
        """Name for messages: "process 123 on host"."""
        return f"process {self.pid} on {self.host}"

    @property
    def records_end(self) -> bool:
        """Return True if the session records its end. Otherwise no requests are read for it."""
        return not self.token.startswith(_ENDLESS)

    @property
    def may_die(self) -> bool:
        """Return True if a run without an end means that its process died, which is not this one."""
        here = _process(os.getpid())
        return self.records_end and self[:5] != here[:5]

    def fenced_off(self) -> Owner:
        """Return the same process with a token that none of its sessions has."""
        return self._replace(token=os.urandom(8).hex())

    @classmethod
    def read(cls, text: str | None) -> Owner | None:
        """Parse the text that ``str()`` wrote; return None for any other text."""
        parts = (text or "").split("|")
        try:
            host, boot, space, pid, born, token = parts
            return cls(host, boot, int(space), int(pid), int(born), token)
        except ValueError:
            return None


def new_owner(session: object | None) -> Owner:
    """Return a new owner for a session of this process, alive until the session is garbage-collected.

    ``session``: None if it does not record its end. Then it is never considered alive in its own process.
    """
    token = os.urandom(8).hex()
    owner = _process(os.getpid())._replace(token=f"{_ENDLESS}{token}" if session is None else token)
    if session is not None:
        LIVE_SESSIONS[owner.token] = session
    return owner


@functools.cache
def memory_owner(pid: int, ends: bool) -> str:
    """Return the owner of all runs in the memory of a process; their sessions say if they are alive."""
    return str(_process(pid)._replace(token="memory" if ends else f"{_ENDLESS}memory"))


def is_gone(owner: Owner) -> bool:
    """Return True if the process of a session is known to have ended. False if it is alive or unknown."""
    here = _process(os.getpid())
    if not here.boot or (owner.boot, owner.space) != (here.boot, here.space):
        return False
    if (owner.pid, owner.born) == (here.pid, here.born):
        return owner.token not in LIVE_SESSIONS
    return _has_ended(owner.pid, owner.born)


def machine_prefix() -> str:
    """Return the beginning of the text of all owners on this machine, of which :func:`is_gone` can tell."""
    here = _process(os.getpid())
    return f"{here.host}|{here.boot}|{here.space}|"


@functools.cache
def boot_id() -> str:
    """Return the id of the start of this machine; "" if unknown."""
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
    """Return True if a process has ended: its id is free, belongs to another process, or to a zombie."""
    if pid <= 0:
        return False
    try:
        fields = _stat(pid)
    except OSError:  # It has ended, or is hidden from this user (hidepid=2, ProtectProc=invisible).
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        except (OSError, OverflowError):
            pass
        return False
    return fields[0] in "ZX" or (born > 0 and int(fields[19]) != born)


def _stat(pid: int) -> list[str]:
    """Return the fields of a process in /proc, from its state on. Raises OSError."""
    # The name of the program is in parentheses and may contain any character.
    return pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
