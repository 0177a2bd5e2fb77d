"""A plugin of pytest for the SDK's own tests: each run of an agent or realtime session has a guard's run."""

import functools
from typing import Any

from agents import Agent, Runner
from agents.realtime import RealtimeSession
from guards import new_guard

from stroma.adapters._guarded_run import active_run
from stroma.adapters.openai_agents import GuardedRunner, attach

GUARD = new_guard()


def _install() -> None:
    run, run_sync, run_streamed = Runner.run, Runner.run_sync, Runner.run_streamed

    @functools.wraps(run)
    async def arun(_: Any, starting_agent: Any, input: Any, *more: Any, **options: Any) -> Any:
        if more or active_run() is not None or not isinstance(starting_agent, Agent):
            return await run(starting_agent, input, *more, **options)
        return await GuardedRunner(GUARD).run(attach(starting_agent, GUARD), input, **options)

    @functools.wraps(run_sync)
    def sync(_: Any, starting_agent: Any, input: Any, *more: Any, **options: Any) -> Any:
        if more or active_run() is not None or not isinstance(starting_agent, Agent):
            return run_sync(starting_agent, input, *more, **options)
        return GuardedRunner(GUARD).run_sync(attach(starting_agent, GUARD), input, **options)

    @functools.wraps(run_streamed)
    def streamed(_: Any, starting_agent: Any, input: Any, *more: Any, **options: Any) -> Any:
        if more or active_run() is not None or not isinstance(starting_agent, Agent):
            return run_streamed(starting_agent, input, *more, **options)
        with GUARD.current.here():  # The task that it begins has this context.
            return run_streamed(attach(starting_agent, GUARD), input, **options)

    def within(bare: Any) -> Any:
        @functools.wraps(bare)
        async def call(self: Any, *args: Any) -> Any:
            with GUARD.current.here():  # The tasks that it begins have this context.
                return await bare(self, *args)

        return call

    RealtimeSession.__aenter__ = within(RealtimeSession.__aenter__)
    RealtimeSession.on_event = within(RealtimeSession.on_event)
    for name, func in (("run", arun), ("run_sync", sync), ("run_streamed", streamed)):
        setattr(Runner, name, classmethod(func))


_install()
