"""One life of a process that runs a random program: kind of store, its place, side file, seed, life."""

import asyncio
import random
import sys
from pathlib import Path

from tests.flows.program_world import Kills, ProgramWorld
from tests.flows.programs import program_of
from tests.shared_stores import opened

from stroma.engine.context import INTERCEPTORS


async def main(kind: str, where: str, side: str, seed: str, life: str) -> None:
    chance = random.Random(f"{kind} {seed} {life}")
    world = ProgramWorld(chance, has_faults=True, side=Path(side))
    kills = Kills(chance, kill=True) if int(life) < 12 else None
    if kills is not None:
        INTERCEPTORS.insert(0, kills)
    with opened(kind, where) as store:
        await world.live_on(store, program_of(int(seed)))
    assert set(world.life.paid) <= {at for at, _ in world.ledger.values()}
    print(world.outcome())


asyncio.run(main(*sys.argv[1:6]))
