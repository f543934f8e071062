"""Counter-based Gumbel noise: a pure function of (seed, choice, position, token id).

Adding Gumbel noise to logits and taking the arg-max draws from their softmax (Gumbel 1954; Maddison et al. 2014). As the noise
has no state, any process can redraw any token: after a preemption, on another engine, or to verify a draft's proposal.

(seed, choice, position) are hashed to a 64-bit key by splitmix64 (Steele et al. 2014). Per token, two rounds of
xor-shift-multiply in 32 bits (the shape of MurmurHash3's finalizer, Wellons' constants) mix the token's own hash with one half
of the key each. All of it is integer arithmetic modulo 2**32, so it has the same bits on every device. The logarithms that
follow are those of the device; on one device they depend on the element only, never on its place in the tensor.
"""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1
_FIRST = 0x7FEB352D
_SECOND = 0x846CA68B - (1 << 32)
_LARGEST_BELOW_ONE = 1 - 2.0**-24
_CHUNK = 1 << 19
"""Elements worked on at a time: their few passes should find them in the cache."""


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


class GumbelNoise:
    """Noise over one vocabulary on one device."""

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        ids = torch.arange(vocab_size, dtype=torch.int32, device=device)
        self._hashes = _finish(_shift_xor_(ids.mul_(_FIRST).add_(_SECOND), 16).mul_(_FIRST))
        """[vocab] int32: each token's own hash."""

    def add_to(self, scores: Tensor, keys: Tensor) -> None:
        """scores [rows, vocab] fp32 += the noise of keys [rows, 2] int32, in place."""
        rows = max(1, _CHUNK // scores.shape[1])
        for some_scores, some_keys in zip(torch.split(scores, rows), torch.split(keys, rows), strict=True):
            some_scores += _gumbel(_hash(self._hashes ^ some_keys[:, :1], some_keys[:, 1:]))

    def at(self, keys: Tensor, ids: Tensor) -> Tensor:
        """[n] fp32: the noise of single tokens, ids [n] int64, each under its own key of keys [n, 2] int32."""
        return _gumbel(_hash(self._hashes[ids] ^ keys[:, 0], keys[:, 1]))


def _splitmix(x: int) -> int:
    x = (x + _GOLDEN) & _MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)


def _hash(x: Tensor, key: Tensor) -> Tensor:
    """x int32, changed in place; key is added half way."""
    return _finish(_shift_xor_(x, 16).mul_(_FIRST).add_(key))


def _finish(x: Tensor) -> Tensor:
    return _shift_xor_(_shift_xor_(x, 15).mul_(_SECOND), 16)


def _shift_xor_(x: Tensor, bits: int) -> Tensor:
    """x ^= x >> bits as if x were unsigned."""
    return x.bitwise_xor_((x >> bits).bitwise_and_((1 << (32 - bits)) - 1))


def _gumbel(hashes: Tensor) -> Tensor:
    """int32 -> Gumbel(0, 1) in fp32.

    -log(-log(1 - u)) with u from 31 bits. Small u are the large values, which decide: they keep the full resolution of 2**-32
    there, up to a Gumbel value of 22.2; with u as the argument of the inner logarithm they would meet fp32's 2**-24.
    """
    u = hashes.bitwise_and_(0x7FFFFFFF).float().add_(0.5).mul_(2.0**-31).clamp_(max=_LARGEST_BELOW_ONE)
    return u.neg_().log1p_().neg_().log_().neg_()
