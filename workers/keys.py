"""Keys of the sampling noise: (seed, choice, position) hashed to 64 bits by splitmix64 (Steele et al. 2014). No torch here."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

_GOLDEN = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1
DRAFT, ACCEPT = 0xD1B54A32D192ED03, 0x8CB92BA72F3D8DD7
"""Streams that are independent of the plain one: what a draft draws with and what accepts its tokens, under rejection sampling."""


def sequence_key(seed: int, choice: int) -> int:
    """64-bit key of a sequence, hashed once in its life."""
    return _splitmix((_splitmix(seed & _MASK) + choice * _GOLDEN) & _MASK)


def stream_key(sequence_key: int, stream: int) -> int:
    """64-bit key of another stream of a sequence."""
    return _splitmix(sequence_key ^ stream)


def position_keys(sequence_keys: Sequence[int], positions: Sequence[int]) -> NDArray[np.int32]:
    """[n, 2] int32: the two halves of the key of each (sequence, position)."""
    x = _hashes(sequence_keys, positions)
    return np.stack((x & np.uint64(0xFFFFFFFF), x >> np.uint64(32)), axis=1).astype(np.uint32).view(np.int32)


def uniforms(sequence_keys: Sequence[int], positions: Sequence[int]) -> NDArray[np.float64]:
    """[n] in [0, 1): one number for each (sequence, position), from the upper 53 bits of its key."""
    return (_hashes(sequence_keys, positions) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _hashes(sequence_keys: Sequence[int], positions: Sequence[int]) -> NDArray[np.uint64]:
    x = np.array(sequence_keys, dtype=np.uint64) + np.array(positions, dtype=np.uint64) * np.uint64(_GOLDEN)
    x ^= x >> np.uint64(30)
    x *= np.uint64(0xBF58476D1CE4E5B9)
    x ^= x >> np.uint64(27)
    x *= np.uint64(0x94D049BB133111EB)
    x ^= x >> np.uint64(31)
    return x


def _splitmix(x: int) -> int:
    x = (x + _GOLDEN) & _MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)
