"""A codec that encrypts every payload of a store with AES-GCM, and lets keys be rotated.

Needs `pip install cryptography`. A key is 32 random bytes; keep keys where your other secrets are::

    codec = AesGcm({"2026-11": key}, writes_with="2026-11")
    store = SQLiteStore("runs.db", codec=codec)

To rotate, add a key and write with that: what was written with the earlier ones can still be read, for as long as they
are in the dict.
"""

import os
from collections.abc import Mapping

from cryptography.hazmat.primitives.ciphers.aead import AESGCM

NONCE = 12  # bytes, as AES-GCM wants it; random: good for 2**32 payloads under one key


class AesGcm:
    def __init__(self, keys: Mapping[str, bytes], *, writes_with: str) -> None:
        self.ciphers = {name: AESGCM(key) for name, key in keys.items()}
        self.writes_with = writes_with
        if writes_with not in self.ciphers:
            raise ValueError(f"there is no key {writes_with!r}; the keys are: {', '.join(keys)}")
        for name in keys:
            # What stands before a payload must be readable again: NUL ends it there.
            if "\0" in name or name.encode("utf-8", "replace").decode() != name:
                raise ValueError(
                    f"key name {name!r} cannot be read back; use text without NUL and lone surrogates"
                )

    def encode(self, data: bytes) -> bytes:
        name, nonce = self.writes_with.encode(), os.urandom(NONCE)
        # The key's name is authenticated too, so a swapped name is detected.
        return name + b"\0" + nonce + self.ciphers[self.writes_with].encrypt(nonce, data, name)

    def decode(self, data: bytes) -> bytes:
        name, _, rest = data.partition(b"\0")
        cipher = self.ciphers.get(name.decode())
        if cipher is None:
            raise LookupError(f"it was written with key {name.decode()!r}, which is not given")
        return cipher.decrypt(rest[:NONCE], rest[NONCE:], name)
