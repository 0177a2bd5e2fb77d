"""Act at the n-th await of a coroutine, or of all tasks of a loop: at each in turn."""

import asyncio
import types
from collections.abc import Awaitable, Callable, Coroutine, Generator
from typing import Any


class Awaits:
    """Counts awaits, and calls a function from the event loop while the n-th one waits.

    Attributes:
        count: the awaits so far.
    """

    def __init__(self, number: int, act: Callable[[], object]) -> None:
        self.number = number
        self.act = act
        self.count = 0

    @property
    def has_acted(self) -> bool:
        return self.count >= self.number

    @types.coroutine
    def of(self, work: Awaitable[Any]) -> Generator[Any, Any, Any]:
        """Await work, and count its awaits, without those of other tasks."""
        iterator: Any = work.__await__()
        resume, value = iterator.send, None
        while True:
            try:
                waiting_for = resume(value)
            except StopIteration as stop:
                return stop.value
            self.count += 1
            if self.count == self.number:
                asyncio.get_running_loop().call_soon(self.act)
            try:
                value = yield waiting_for
                resume = iterator.send
            except GeneratorExit:
                iterator.close()
                raise
            except BaseException as error:
                resume, value = iterator.throw, error

    def of_new_tasks(self) -> None:
        """Count the awaits of all tasks that begin from now on in the running loop."""

        def create(loop: asyncio.AbstractEventLoop, work: Coroutine[Any, Any, Any], **more: Any) -> Any:
            return asyncio.Task(self._counted(work), loop=loop, **more)

        asyncio.get_running_loop().set_task_factory(create)

    async def _counted(self, work: Coroutine[Any, Any, Any]) -> Any:
        return await self.of(work)
