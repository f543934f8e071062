"""Keys of the sampling noise: (seed, choice, position) hashed to 64 bits by splitmix64 (Steele et al. 2014). No torch here."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

_GOLDEN = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1


def sequence_key(seed: int, choice: int) -> int:
    """64-bit key of a sequence, hashed once in its life."""
    return _splitmix((_splitmix(seed & _MASK) + choice * _GOLDEN) & _MASK)


def position_keys(sequence_keys: Sequence[int], positions: Sequence[int]) -> NDArray[np.int32]:
    """[n, 2] int32: the two halves of the key of each (sequence, position)."""
    x = np.array(sequence_keys, dtype=np.uint64) + np.array(positions, dtype=np.uint64) * np.uint64(_GOLDEN)
    x ^= x >> np.uint64(30)
    x *= np.uint64(0xBF58476D1CE4E5B9)
    x ^= x >> np.uint64(27)
    x *= np.uint64(0x94D049BB133111EB)
    x ^= x >> np.uint64(31)
    return np.stack((x & np.uint64(0xFFFFFFFF), x >> np.uint64(32)), axis=1).astype(np.uint32).view(np.int32)


def _splitmix(x: int) -> int:
    x = (x + _GOLDEN) & _MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)
