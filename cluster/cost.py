"""What an iteration costs in a stage, learnt from the iterations that were: fixed seconds plus seconds for each token.

Of a prompt of n tokens cut into chunks of c the last of p stages is done after (n / c + p - 1) (fixed + c * per_token) seconds.
That is least for c = sqrt(n / (p - 1) * fixed / per_token): only the ratio of the two counts, the number of tokens that take as
long as an iteration's fixed part. It is a few on CPUs and some hundreds on GPUs, so it is measured and not guessed.
"""

import math

_FADE = 0.99
"""Weight of an observation after each later one: what counts are the last hundred."""
_GUESS = 32.0
_OUTLIER = 4.0
_LEAST, _MOST = 2.0, 1024.0
_LEAST_BESIDE = 64
_FIXED_PARTS = 16


class StepCost:
    """A straight line through (tokens, seconds) of the last iterations, by least squares with fading weights."""

    def __init__(self) -> None:
        self._weight = self._x = self._y = self._xx = self._xy = 0.0
        self.fixed_tokens = _GUESS
        """How many tokens take as long as an iteration's fixed part. A guess until sizes were seen that tell, and what those told
        as long as later ones are too much alike."""

    def observe(self, tokens: int, seconds: float) -> None:
        """An iteration of so many tokens took so long in a stage. If that is far too long, the process stood still: it is cut."""
        seconds = min(seconds, _OUTLIER * self.seconds(tokens))
        self._weight = self._weight * _FADE + 1.0
        self._x = self._x * _FADE + tokens
        self._y = self._y * _FADE + seconds
        self._xx = self._xx * _FADE + tokens * tokens
        self._xy = self._xy * _FADE + tokens * seconds
        self._learn()

    def seconds(self, tokens: float) -> float:
        """How long an iteration of so many tokens takes in a stage; infinite as long as too few were seen."""
        if self._weight < 10.0 or self._y <= 0.0:
            return math.inf
        fixed = self.fixed_tokens
        return self._y / (self._x + self._weight * fixed) * (tokens + fixed)

    def _learn(self) -> None:
        mean_x, mean_y = self._x / self._weight, self._y / self._weight
        variance = self._xx / self._weight - mean_x**2
        slope = (self._xy / self._weight - mean_x * mean_y) / variance if variance > (mean_x / 4) ** 2 else 0.0
        if slope > 0.0:
            self.fixed_tokens = min(_MOST, max(_LEAST, mean_y / slope - mean_x))

    @property
    def beside_decodes(self) -> int:
        """How many tokens of prompts an iteration may have at which sequences decode: all that wait for it, for a sixteenth of
        throughput at most."""
        return max(_LEAST_BESIDE, math.ceil(_FIXED_PARTS * self.fixed_tokens))

    def chunk(self, backlog: int, num_stages: int) -> int:
        """The chunk, in tokens, that brings `backlog` tokens of prompts through `num_stages` (at least 2) stages soonest."""
        return max(1, math.ceil(math.sqrt(self.fixed_tokens * backlog / (num_stages - 1))))
