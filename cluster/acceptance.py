"""How often proposed tokens stand."""

from dataclasses import dataclass

_PRIOR = 2.0
"""Tokens that what is usual counts for."""
_GUESS = 0.7


@dataclass
class Acceptance:
    """An estimate of the probability that a token stands if those before it do, from verifications with fading weights."""

    fade: float = 0.9
    """Weight of a verification after each later one."""
    tried: float = 0.0
    stood: float = 0.0

    def observe(self, proposed: int, stood: int) -> None:
        """Of so many proposed tokens the first `stood` did. What came after the first that did not tells nothing."""
        self.tried = self.tried * self.fade + min(proposed, stood + 1)
        self.stood = self.stood * self.fade + stood

    def rate(self, usual: "Acceptance | None" = None) -> float:
        """`usual`: that of all sequences, which counts where little is known of this one."""
        prior = usual.rate() if usual is not None else _GUESS
        return (self.stood + _PRIOR * prior) / (self.tried + _PRIOR)


@dataclass
class Speculated(Acceptance):
    """A sequence's."""

    trying: bool = False
    """The tokens asked for last do not pay: what did not stand long ago may do so now ..."""
    on_trial: bool = False
    """... and neither do those that are verified."""
    tries_from: int = 0
    """It has nothing tried before it has so many tokens: the last time there was nothing to propose."""
    read: int = 0
    """Tokens of it that the draft model had read when it last proposed."""
