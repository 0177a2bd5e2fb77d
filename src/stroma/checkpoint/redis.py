"""The simple checkpoint protocol on Redis. Keys expire ``ttl_seconds`` after they were written."""

from __future__ import annotations

import asyncio
import json
from typing import Any
from weakref import WeakKeyDictionary

from pydantic import BaseModel

from stroma.checkpoint.journal import CorruptCheckpoint
from stroma.checkpoint.manager import resolve_schema, schema_ref
from stroma.checkpoint.memory import coerce
from stroma.contracts import check_id
from stroma.schemas import schema_of

__all__ = ["RedisStore", "SyncRedisStore"]


def _driver(store: str, module: str) -> Any:
    try:
        import redis
        import redis.asyncio
    except Exception as error:  # Any failure to import it: a broken install is no better than none.
        raise ImportError(
            f"redis is required for {store}; install it with: pip install 'stroma[redis]'"
        ) from error
    return redis.asyncio if module == "asyncio" else redis


def _key(run_id: str) -> str:
    # One hash per run, so that deleting a run is one command and no id can reach into another run's keys.
    return f"stroma:{{{check_id(run_id, 'run id')}}}:states"


def _dump(state: BaseModel) -> bytes:
    schema = schema_of(type(state))
    return json.dumps({"schema": schema_ref(type(state)), "state": schema.encode(state).decode()}).encode()


def _load(raw: bytes | None, run_id: str, node_id: str, schema: type[BaseModel] | None) -> BaseModel | None:
    if raw is None:
        return None
    try:
        record = json.loads(raw)
        target = schema if schema is not None else resolve_schema(record["schema"])
        return schema_of(target).decode(record["state"].encode())
    except Exception as error:
        raise CorruptCheckpoint(
            f"the checkpoint of node {node_id!r} in run {run_id!r} cannot be read back: {error}; "
            "restore the schema, or run the node again"
        ) from error


class RedisStore:
    """Async; usable from several event loops. Raises ImportError, with the install line, without the driver."""

    def __init__(self, redis_url: str, ttl_seconds: int = 3600) -> None:
        self._module = _driver("RedisStore", "asyncio")
        self._url = redis_url
        self._ttl = ttl_seconds
        # A connection belongs to the event loop that it was opened in.
        self._clients: WeakKeyDictionary[asyncio.AbstractEventLoop, Any] = WeakKeyDictionary()

    def _client(self) -> Any:
        loop = asyncio.get_running_loop()
        client = self._clients.get(loop)
        if client is None:
            client = self._clients[loop] = self._module.from_url(self._url)
        return client

    async def save(self, run_id: str, node_id: str, state: BaseModel) -> None:
        key = _key(run_id)
        async with self._client().pipeline(transaction=True) as pipe:
            pipe.hset(key, check_id(node_id, "node id"), _dump(state))
            pipe.expire(key, self._ttl)
            await pipe.execute()

    async def load(self, run_id: str, node_id: str) -> BaseModel | None:
        return _load(await self._client().hget(_key(run_id), node_id), run_id, node_id, None)

    async def save_typed(self, run_id: str, node_id: str, state: BaseModel, schema: type[BaseModel]) -> None:
        """Save as an instance of ``schema``; raises TypeError("schema must be a BaseModel type")."""
        await self.save(run_id, node_id, coerce(state, schema))

    async def load_typed(self, run_id: str, node_id: str, schema: type[BaseModel]) -> BaseModel | None:
        """Load as an instance of ``schema``; raises CorruptCheckpoint if the state is not one."""
        return _load(await self._client().hget(_key(run_id), node_id), run_id, node_id, schema)

    async def delete(self, run_id: str) -> None:
        await self._client().delete(_key(run_id))

    async def aclose(self) -> None:
        """Close the connections of the running event loop."""
        client = self._clients.pop(asyncio.get_running_loop(), None)
        if client is not None:
            await client.aclose()


class SyncRedisStore:
    """The same, sync."""

    def __init__(self, redis_url: str, ttl_seconds: int = 3600) -> None:
        self._client: Any = _driver("SyncRedisStore", "sync").from_url(redis_url)
        self._ttl = ttl_seconds

    def save(self, run_id: str, node_id: str, state: BaseModel) -> None:
        key = _key(run_id)
        with self._client.pipeline(transaction=True) as pipe:
            pipe.hset(key, check_id(node_id, "node id"), _dump(state))
            pipe.expire(key, self._ttl)
            pipe.execute()

    def load(self, run_id: str, node_id: str) -> BaseModel | None:
        return _load(self._client.hget(_key(run_id), node_id), run_id, node_id, None)

    def save_typed(self, run_id: str, node_id: str, state: BaseModel, schema: type[BaseModel]) -> None:
        """Save as an instance of ``schema``; raises TypeError("schema must be a BaseModel type")."""
        self.save(run_id, node_id, coerce(state, schema))

    def load_typed(self, run_id: str, node_id: str, schema: type[BaseModel]) -> BaseModel | None:
        """Load as an instance of ``schema``; raises CorruptCheckpoint if the state is not one."""
        return _load(self._client.hget(_key(run_id), node_id), run_id, node_id, schema)

    def delete(self, run_id: str) -> None:
        self._client.delete(_key(run_id))

    def close(self) -> None:
        """Close the connections."""
        self._client.close()
