"""How one sequence's tokens are to be drawn, worked out once when it enters."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from cluster.protocol import NewSequence, SamplingParams
from workers.keys import ACCEPT, DRAFT, sequence_key, stream_key

_COLDEST = 1e-5
"""Below it, temperature is taken for 0: the quotient's differences dwarf the noise anyway."""


@dataclass(frozen=True)
class DrawSetup:
    """What the sampler needs of a sequence that doesn't change from token to token."""

    params: SamplingParams
    noise_key: int
    prompt_ids: NDArray[np.int64]
    """Distinct tokens of the prompt; empty where no penalty counts them."""
    bias_ids: NDArray[np.int64]
    bias: NDArray[np.float32]
    stop_ids: NDArray[np.int64]
    """Tokens that can't be drawn before min_tokens; empty where that is 0."""

    @classmethod
    def of(cls, new: NewSequence) -> "DrawSetup":
        """Work it out."""
        params = new.params
        counted = new.prompt if params.repetition_penalty != 1.0 else []
        return cls(
            params,
            sequence_key(params.seed, new.choice),
            np.unique(np.array(counted, dtype=np.int64)),
            np.array(list(params.logit_bias.keys()), dtype=np.int64),
            np.array(list(params.logit_bias.values()), dtype=np.float32),
            np.array(params.stop_token_ids if params.min_tokens > 0 else (), dtype=np.int64),
        )

    @cached_property
    def candidates(self) -> int:
        """So many likeliest tokens are told of a beam: all stop tokens may be among them, and still enough are left to go on with.
        0 where a token is drawn."""
        params = self.params
        if not params.beam_width:
            return 0
        return max(params.beam_width + len(params.stop_token_ids), params.logprobs or 0)

    @cached_property
    def draft_key(self) -> int:
        """Of the noise that a draft draws with under rejection sampling."""
        return stream_key(self.noise_key, DRAFT)

    @cached_property
    def accept_key(self) -> int:
        """Of the numbers that accept or reject what it drew."""
        return stream_key(self.noise_key, ACCEPT)

    @cached_property
    def greedy(self) -> bool:
        """Arg-max after penalties and bias."""
        return self.params.temperature < _COLDEST

    @cached_property
    def penalized(self) -> bool:
        """Some penalty changes logits of tokens that were seen."""
        p = self.params
        return p.repetition_penalty != 1.0 or p.presence_penalty != 0.0 or p.frequency_penalty != 0.0

    @cached_property
    def adjusted(self) -> bool:
        """Logits are changed before the draw."""
        return self.penalized or len(self.bias_ids) > 0 or len(self.stop_ids) > 0

    @cached_property
    def filtered(self) -> bool:
        """Some tokens can't be drawn."""
        return self.params.top_k > 0 or self.params.top_p < 1.0 or self.params.min_p > 0.0

    @cached_property
    def simple(self) -> bool:
        """The likeliest token, and nothing is told of it."""
        return self.greedy and not (self.adjusted or self.candidates or self.params.logprobs is not None)
