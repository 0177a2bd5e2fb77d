"""A commit that is alone goes to a Redis server straight from the event loop: no other thread hands it on.

A store's thread costs two hops, and sleeps and wakes for each of them; that is more than all else a commit takes. So an
event loop that commits much gets a connection of its own, a lane. Only what is simple happens on it: one commit at a
time, while nothing waits for the thread, and the reply that it is kept. Everything else (no such reply in time, another
one, a connection that breaks) gives the lane up and the commit to the thread, which sends it again: that changes
nothing if it was done, see ``_redis_scripts``.
"""

from __future__ import annotations

import asyncio
import socket
import threading
import weakref
from typing import Any, Final

from stroma.checkpoint._redis_format import Run
from stroma.checkpoint._redis_line import packed
from stroma.checkpoint._redis_rows import commit_command
from stroma.checkpoint._redis_server import Server
from stroma.checkpoint._rows import Commit
from stroma.checkpoint._worker import Job, Worker, generation

__all__ = ["Lanes"]

_MANY: Final = 16  # commits of a loop after which it gets a lane: fewer are not worth a connection
_LARGE: Final = 16 * 1024  # bytes of a commit that the thread had better wait for
_SECONDS: Final = 1.0  # for a reply, if the URL says no less; after that the thread asks
_LONGEST: Final = 24  # bytes of a reply that says that a commit is kept


class Lanes:
    """The lanes of a store in one process. Its methods may be called from any thread, :meth:`take` in a running loop."""

    def __init__(self, server: Server, worker: Worker) -> None:
        self.server = server
        self.worker = worker
        #: Over TLS there are none: what the event loop reads of a socket is not what was sent.
        self.closed = not server.plain
        self._generation = generation()
        self._lanes: dict[int, Lane] = {}

    def take(self, commit: Commit) -> asyncio.Future[Any] | None:
        """Send a commit from the running loop. The future ends as one of :meth:`Worker.submit` does; None if it is
        the thread's to do."""
        if self.closed:
            return None
        loop = asyncio.get_running_loop()
        lane = self._lanes.get(id(loop))
        if lane is None or lane.loop() is not loop:
            for other in list(self._lanes.values()):
                other.leave_closed_loop()
            lane = self._lanes[id(loop)] = Lane(self, loop)
        return lane.take(commit, loop)

    def forget(self, lane: Lane) -> None:
        """That of a loop which is no more."""
        for key, known in list(self._lanes.items()):
            if known is lane:
                self._lanes.pop(key, None)

    def end(self) -> None:
        """Take nothing more, and give the thread what is under way: it does it before it ends."""
        self.closed = True
        for lane in self._all():
            job = lane.job
            if job is not None:
                self.worker.put(Job(job.operation, job.future))

    def close(self) -> None:
        """Disconnect. What is still under way goes to the thread."""
        self.closed = True
        for lane in self._all():
            lane.ask_to_leave()

    def _all(self) -> list[Lane]:
        """None in a forked child, where they are the parent's."""
        return list(self._lanes.values()) if self._generation == generation() else []


class Lane:
    """The connection of one event loop. Used in that loop, but for what says otherwise.

    Attributes:
        job: what is under way.
        loop: gives the loop while there is one; a lane does not keep it alive.
    """

    def __init__(self, lanes: Lanes, loop: asyncio.AbstractEventLoop) -> None:
        self.job: Job | None = None
        self.loop = weakref.ref(loop, self._orphaned)
        self._lanes = lanes
        self._generation = generation()
        self._run: Run | None = None
        self._count = 0
        self._wanted = _MANY
        self._connecting = False
        self._connection: Any = None
        self._socket: socket.socket | None = None
        self._read = b""
        self._seconds = _SECONDS
        self._deadline = 0.0
        self._timer: asyncio.TimerHandle | None = None

    def take(self, commit: Commit, loop: asyncio.AbstractEventLoop) -> asyncio.Future[Any] | None:
        """See :meth:`Lanes.take`."""
        sock, lanes = self._socket, self._lanes
        if sock is None:
            self._counted()
            return None
        # What waits together is sent together, and that is for the thread to do.
        if self.job is not None or not lanes.worker.idle():
            return None
        step = commit.step
        if step is not None and len(step.output) > _LARGE:
            return None
        try:
            (wire,) = packed([commit_command(commit.fence, commit.attempt, step)])
        except Exception:
            return None  # Too large, or nothing that can be kept: the thread says what is wrong.
        operation: Any = commit
        future = loop.create_future()
        self._deadline = loop.time() + self._seconds
        self.job, self._run = Job(operation, future), commit.fence.run
        try:
            sent = sock.send(wire)
        except OSError:
            sent = -1
        if sent != len(wire):
            self.leave()
        elif self._timer is None:
            self._timer = loop.call_at(self._deadline, self._look)
        return future

    # ------------------------------------------------------------------ replies

    def _readable(self) -> None:
        if self._socket is None or self._generation != generation():
            return  # In a forked child: the reply is the parent's.
        try:
            data = self._socket.recv(4096)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            data = b""
        self._read += data
        job, run, read = self.job, self._run, self._read
        if data and job is not None and run is not None and read[:1] == b":" and len(read) < _LONGEST:
            if read[-2:] != b"\r\n":
                return  # The rest is still to come.
            if read[1:-2].isdigit():
                self._read, self.job = b"", None
                run.saw(int(read[1:-2]))
                job.settle()
                return
        self.leave()

    def _look(self) -> None:
        """Whether the reply is overdue. One timer serves all commits of its time."""
        self._timer, loop = None, self.loop()
        if self.job is None or loop is None or self._generation != generation():
            return
        if loop.time() < self._deadline:
            self._timer = loop.call_at(self._deadline, self._look)
        else:
            self.leave()

    # ------------------------------------------------------------------ coming and going

    def _counted(self) -> None:
        self._count += 1
        if self._connecting or self._count < self._wanted:
            return
        self._wanted = 2 * self._count  # Where it fails, it is tried more and more rarely.
        thread = threading.Thread(target=self._connect, name="stroma-redis-lane", daemon=True)
        try:
            self._connecting = True
            thread.start()
        except RuntimeError:
            self._connecting = False  # No more threads, or the interpreter ends.

    def _connect(self) -> None:
        """In a thread of its own: connecting may take seconds. What is in the way shows where the commits are done."""
        connection = self._lanes.server.client().connection_pool.make_connection()
        try:
            connection.connect()
            # The driver has no name for it that is public; without it, or if it is no plain one, there is no lane.
            sock, loop = getattr(connection, "_sock", None), self.loop()
            if type(sock) is socket.socket and loop is not None and not connection.can_read():
                loop.call_soon_threadsafe(self._open, connection, sock)
                return
        except Exception as error:
            if not (self._lanes.server.is_driver_error(error) or isinstance(error, RuntimeError)):
                raise
        self._connecting = False
        connection.disconnect()

    def _open(self, connection: Any, sock: socket.socket) -> None:
        self._connecting, loop = False, self.loop()
        if self._lanes.closed or loop is None:
            connection.disconnect()
            return
        seconds = sock.gettimeout()
        self._seconds = _SECONDS if seconds is None else min(seconds, _SECONDS)
        sock.setblocking(False)
        try:
            loop.add_reader(sock, self._readable)
        except NotImplementedError:
            connection.disconnect()
            return
        self._connection, self._socket, self._read = connection, sock, b""

    def leave(self) -> None:
        """Give the lane up; what is under way goes to the thread. It is made anew once there was much to commit again."""
        sock, loop = self._socket, self.loop()
        self._socket = None
        if sock is not None and loop is not None and not loop.is_closed():
            loop.remove_reader(sock)
        self._disconnect()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._count, self._wanted = 0, _MANY
        job, self.job = self.job, None
        if job is not None:
            self._lanes.worker.put(job)

    def ask_to_leave(self) -> None:
        """The same from any thread."""
        loop = self.loop()
        try:
            if loop is not None and loop is not _running():
                loop.call_soon_threadsafe(self.leave)
                return
        except RuntimeError:
            pass  # It is closed: nobody uses the lane any more.
        self.leave()

    def leave_closed_loop(self) -> None:
        """The same from any thread, if the loop is closed: what was under way is done all the same."""
        loop = self.loop()
        if loop is not None and loop.is_closed():
            self.leave()

    def _orphaned(self, _: object) -> None:
        self._socket = None
        self._disconnect()
        self._lanes.forget(self)

    def _disconnect(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.disconnect()


def _running() -> asyncio.AbstractEventLoop | None:
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None
