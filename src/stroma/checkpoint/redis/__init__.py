"""Store in Redis."""

from typing import TYPE_CHECKING

from stroma._utils.lazy import lazy

if TYPE_CHECKING:
    from stroma.checkpoint.redis.store import RedisStore, SyncRedisStore

__all__ = ["RedisStore", "SyncRedisStore"]

_HOMES = {
    "RedisStore": "checkpoint.redis.store",
    "SyncRedisStore": "checkpoint.redis.store",
}

__getattr__, __dir__ = lazy(__name__, _HOMES, "stroma")
