"""Whether the process that owns a run is gone: only where the system says so."""

from __future__ import annotations

import os
import pathlib
import shutil
import subprocess
import sys
import textwrap

import pytest
from tests.kit import environment, read_line, start_python

from stroma.checkpoint.durable import owner as _owner
from stroma.checkpoint.durable.owner import Owner, is_gone, new_owner

pytestmark = pytest.mark.skipif(not _owner.boot_id(), reason="this system does not name its boots")

_OWNER = textwrap.dedent(
    """
    import sys
    from stroma.checkpoint.durable.owner import new_owner
    class Session: pass
    session = Session()
    print(new_owner(session), flush=True)
    sys.stdin.readline()
    """
)
_LOOK = (
    "import sys; from stroma.checkpoint.durable.owner import Owner, is_gone; "
    "print(is_gone(Owner.read(sys.argv[1])))"
)


def child() -> tuple[subprocess.Popen[str], Owner]:
    """A process, and the owner that it names itself."""
    started = start_python(code=_OWNER)
    owner = Owner.read(read_line(started))
    assert owner is not None
    return started, owner


@pytest.mark.slow
def test_a_process_that_is_hidden_is_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that /proc does not show is alive for as long as the kernel knows its id."""
    process, owner = child()
    with process:
        assert not is_gone(owner)

        def hidden(path: pathlib.Path) -> str:
            raise FileNotFoundError(path)

        monkeypatch.setattr(pathlib.Path, "read_text", hidden)
        assert not is_gone(owner)
        process.kill()
        process.wait()
        assert is_gone(owner)


@pytest.mark.slow
def test_a_process_that_has_ended_is_gone() -> None:
    """A process that has ended is gone, also while its parent has not fetched its exit code."""
    process, owner = child()
    with process:
        process.kill()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        assert is_gone(owner)
    assert is_gone(owner)


@pytest.mark.parametrize("pid", [0, -1, 1, 2**70])
def test_an_id_that_is_none_is_alive(pid: int) -> None:
    """An id that no process of ours can have is nobody's to be declared gone: its lease tells."""
    mine = new_owner(test_an_id_that_is_none_is_alive)
    assert not is_gone(mine._replace(pid=pid, born=0))


@pytest.mark.slow
@pytest.mark.skipif(
    not hasattr(os, "geteuid")
    or os.geteuid() != 0
    or not shutil.which("setpriv")
    or not shutil.which("unshare"),
    reason="needs root, setpriv and unshare",
)
def test_another_users_process_behind_hidepid() -> None:
    """No user takes a live owner for gone where /proc hides other users' processes (hidepid=2)."""
    process, owner = child()
    with process:
        # Root's process, seen by a user who may not see it.
        mount = (
            "mount -t proc -o hidepid=2 proc /proc && exec setpriv --reuid 65534 --regid 65534 "
            "--clear-groups "
        )
        command = ["unshare", "-m", "sh", "-c", mount + '"$@"', "sh", sys.executable, "-c", _LOOK, str(owner)]
        seen = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=30)
        if seen.returncode:
            pytest.skip(f"no such view of /proc here: {seen.stderr[-200:]}")
        assert seen.stdout == "False\n"
        process.kill()
