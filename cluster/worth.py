"""Whether moving KV is quicker than computing it again, by what both took lately."""

import math

_FADE = 0.9
"""Weight of an observation after each later one."""
_AGAIN_S = 30.0
"""What did not pay is tried again after so long: neither machines nor networks stay as they are."""
_LEAST_PATIENCE_S = 0.1
_LEAST_TOKENS = 32
"""Iterations of fewer tokens say little about prompts: the fixed part is most of them."""


class _Rate:
    """A fading mean of seconds per unit."""

    def __init__(self) -> None:
        self._units = self._seconds = 0.0

    def observe(self, units: float, seconds: float) -> None:
        self._units = self._units * _FADE + units
        self._seconds = self._seconds * _FADE + seconds

    @property
    def known(self) -> bool:
        return self._units > 0

    @property
    def mean(self) -> float:
        return self._seconds / self._units if self._units else 0.0


class Worth:
    """An engine's experience with both."""

    def __init__(self) -> None:
        self._computing, self._moving, self._waiting = _Rate(), _Rate(), _Rate()
        self._tried_at = -math.inf

    def computed(self, tokens: int, seconds: float) -> None:
        """An iteration of so many tokens took a stage so long."""
        if tokens >= _LEAST_TOKENS:
            self._computing.observe(tokens, seconds)

    def tried(self, now: float) -> None:
        """KV is being moved."""
        self._tried_at = now

    def moved(self, tokens: int, seconds: float, waited_s: float) -> None:
        """KV of so many tokens was on its way for `seconds`; it took `waited_s` in all, from asking to having it."""
        self._moving.observe(tokens, seconds)
        self._waiting.observe(1, max(0.0, waited_s - seconds))

    def pays(self, tokens: int, now: float) -> bool:
        """Whether to move the KV of so many tokens: also to find out what it takes."""
        known = self._computing.known and self._moving.known
        if not known or now - self._tried_at >= _AGAIN_S:
            return True
        return self._waiting.mean + tokens * self._moving.mean < tokens * self._computing.mean

    def patience_s(self, tokens: int) -> float:
        """How long a request should wait for the KV of so many tokens: computed, it would be here about that soon."""
        return _LEAST_PATIENCE_S + 2.0 * tokens * self._computing.mean if self._computing.known else math.inf
