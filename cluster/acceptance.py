"""How often proposed tokens stand."""

from dataclasses import dataclass

_PRIOR = 2.0
"""Tokens that what is usual counts for."""
_GUESS = 0.7
_FIRST_GAP, _LAST_GAP = 32, 1024
"""Tokens of the output between one try and the next, where nothing pays: twice as many each time that it fails."""


@dataclass
class Acceptance:
    """An estimate of the probability that a token stands if those before it do, from verifications with fading weights."""

    fade: float = 0.9
    """Weight of a verification after each later one."""
    tried: float = 0.0
    stood: float = 0.0
    trying: bool = False
    """A token was asked for though it does not pay: what did not stand long ago may do so now."""
    try_at: int = 0
    """When the output has so many tokens."""
    _gap: int = _FIRST_GAP

    def observe(self, proposed: int, stood: int, emitted: int) -> None:
        """Of so many proposed tokens the first `stood` did, after so many tokens of the output. What came after the first that did
        not tells nothing."""
        self.tried = self.tried * self.fade + min(proposed, stood + 1)
        self.stood = self.stood * self.fade + stood
        self._gap = _FIRST_GAP if stood else min(_LAST_GAP, 2 * self._gap)
        self.try_at = emitted + self._gap
        self.trying = False

    def rate(self, usual: "Acceptance | None" = None) -> float:
        """`usual`: that of all sequences, which counts where little is known of this one."""
        prior = usual.rate() if usual is not None else _GUESS
        return (self.stood + _PRIOR * prior) / (self.tried + _PRIOR)
