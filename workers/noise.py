"""Counter-based Gumbel noise: a pure function of (seed, choice, position, token id).

Adding Gumbel noise to logits and taking the arg-max draws from their softmax (Gumbel 1954; Maddison et al. 2014). As the noise
has no state, any process can redraw any token: after a preemption, on another engine, or to verify a draft's proposal.

(seed, choice, position) are hashed to a 64-bit key (workers/keys.py). A round of xor-shift-multiply in 32 bits (the shape of
MurmurHash3's finalizer, Wellons' constants) then mixes each token's own hash, made alike, with the halves of that key: one before
the first multiplication, one after. All of it is integer arithmetic modulo 2**32, so it has the same bits on every device. The
logarithms that follow are those of the device; on one device they depend on the element only, never on its place in the tensor.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from workers.selection import argmax

_FIRST = 0x7FEB352D
_SECOND = 0x846CA68B - (1 << 32)
_LARGEST_BELOW_ONE = 1 - 2.0**-24
_BOUND_SLACK = 1e-3
"""More than what rounding can take from a bound and from the sum of it and a score."""
_CHUNK = 1 << 19
"""Elements worked on at a time: their few passes should find them in the cache."""


class GumbelNoise:
    """Noise over one vocabulary on one device."""

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        ids = torch.arange(vocab_size, dtype=torch.int32, device=device)
        self._hashes = _finish(_shift_xor_(ids.mul_(_FIRST).add_(_SECOND), 16).mul_(_FIRST))
        """[vocab] int32: each token's own hash."""

    def contenders(self, scores: Tensor, keys: Tensor) -> Tensor:
        """[rows, vocab] bool: tokens that can be the arg-max of scores [rows, vocab] fp32 plus the noise of keys; few of each row.

        Spares the logarithms of all others: the noise has a bound that takes none, and a token whose score plus bound is below
        the score plus noise of some other cannot win. For 64 rows of 32,000 on one thread of a 2-core Zen 3 (AVX2) this takes
        12 ms, and 17 to compute all the noise.
        """
        return torch.cat([self._contenders(*piece) for piece in self._pieces(scores, keys)])

    def whole(self, keys: Tensor) -> Tensor:
        """[rows, vocab] fp32: all noise of keys [rows, 2] int32. For GPUs, where picking tokens out first would cost a wait for
        their number and save nothing."""
        return _gumbel(self._hash_all(keys))

    def at(self, keys: Tensor, ids: Tensor) -> Tensor:
        """[n] fp32: the noise of single tokens, ids [n] int64, each under its own key of keys [n, 2] int32."""
        return _gumbel(_hash(self._hashes[ids] ^ keys[:, 0], keys[:, 1]))

    def _contenders(self, scores: Tensor, keys: Tensor) -> Tensor:
        bounds = _bound(self._hash_all(keys)).add_(scores)
        rival = argmax(bounds)
        reached = scores.gather(1, rival[:, None])[:, 0] + self.at(keys, rival)
        return bounds >= reached[:, None]

    def _hash_all(self, keys: Tensor) -> Tensor:
        return _hash(self._hashes ^ keys[:, :1], keys[:, 1:])

    @staticmethod
    def _pieces(scores: Tensor, keys: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        rows = max(1, _CHUNK // scores.shape[1])
        return zip(torch.split(scores, rows), torch.split(keys, rows), strict=True)


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
    u = _uniform(hashes).clamp_(max=_LARGEST_BELOW_ONE)
    return u.neg_().log1p_().neg_().log_().neg_()


def _uniform(hashes: Tensor) -> Tensor:
    return hashes.bitwise_and_(0x7FFFFFFF).float().add_(0.5).mul_(2.0**-31)


def _bound(hashes: Tensor) -> Tensor:
    """int32 -> at least `_gumbel` of it, by some 0.06 where that is large.

    -log(1 - u) >= u, so the noise is at most -log(u); and the bits of a float, read as an integer, are its exponent and mantissa,
    of which exponent + mantissa - 1 is at most the logarithm to base 2.
    """
    bits = _uniform(hashes).view(torch.int32).float()
    return bits.mul_(-math.log(2) / 2**23).add_(127 * math.log(2) + _BOUND_SLACK)
