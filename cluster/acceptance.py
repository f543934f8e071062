"""How often proposed tokens stand."""

from dataclasses import dataclass

_FADE = 0.9
"""Weight of a verification after each later one."""
_PRIOR = 2.0
"""Tokens that what is usual counts for."""
_GUESS = 0.7


@dataclass
class Acceptance:
    """An estimate of the probability that a token stands if those before it do, from verifications with fading weights."""

    tried: float = 0.0
    stood: float = 0.0

    def observe(self, proposed: int, stood: int) -> None:
        """Of so many proposed tokens the first `stood` did; what came after the first that did not tells nothing."""
        self.tried = self.tried * _FADE + min(proposed, stood + 1)
        self.stood = self.stood * _FADE + stood

    def rate(self, usual: "Acceptance | None" = None) -> float:
        """`usual`: that of all sequences, which counts where little is known of this one."""
        prior = usual.rate() if usual is not None else _GUESS
        return (self.stood + _PRIOR * prior) / (self.tried + _PRIOR)
