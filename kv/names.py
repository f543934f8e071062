"""Names of blocks: keyed hashes of the whole prefix that a block ends, so that it can be spoken of without its tokens.

Router, engines and scheduler share the key, which is made of the application's secret: nobody outside can aim for a collision. An
accidental one (64 bits: one in 10^5 for ten million blocks) costs speed, not correctness: engines compare tokens.
"""

import hashlib
from array import array
from collections.abc import Iterable

TOKEN_BYTES = 4
NAME_BYTES = 8


def pack(tokens: Iterable[int]) -> bytes:
    """Token ids as bytes, four each."""
    return array("I", tokens).tobytes()


class BlockNames:
    """Names under one key for one size of blocks."""

    def __init__(self, secret: str, block_size: int) -> None:
        self._key = hashlib.blake2b(secret.encode(), digest_size=32, person=b"rayline blocks").digest()
        self._stride = block_size * TOKEN_BYTES

    def of_prompt(self, tokens: Iterable[int], salt: str = "") -> bytes:
        """The names, joined, of a prompt's whole blocks."""
        return self.of(pack(tokens), salt)

    def of(self, key: bytes | bytearray, salt: str = "", before: bytes = b"") -> bytes:
        """The names, joined, of all whole blocks of the packed tokens `key`, which follow the block named `before` (b"": they are
        the beginning, for requests of this `salt`)."""
        name = before or hashlib.blake2b(salt.encode(), digest_size=NAME_BYTES, key=self._key, person=b"salt").digest()
        names = bytearray()
        for at in range(0, len(key) - self._stride + 1, self._stride):
            name = hashlib.blake2b(name + key[at : at + self._stride], digest_size=NAME_BYTES, key=self._key).digest()
            names += name
        return bytes(names)
