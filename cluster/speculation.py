"""How many tokens are proposed and verified for whom: what makes the most tokens a second, by what passes were measured to take."""

from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

from cluster.acceptance import Acceptance
from cluster.config import BatchConfig
from cluster.cost import StepCost
from cluster.launched import Launched
from cluster.pass_cost import PassCost
from cluster.protocol import StepResult
from cluster.request import Sequence

_LEVELS = 32
"""Rates are rounded to so many, so that sequences fall into few groups."""
_GAIN = 1.02
"""What does not gain that much is left: estimates are not better."""
_SHARE = 0.005
"""Of the time of all iterations, what tries may take: so that with all else it stays well below 3 %."""
_SAVED_TRIES = 4.0
_REFUND = 0.5
_EVIDENCE = 8.0
"""Tokens verified before anything is known of the drafter. Until then a single sequence has some proposed ..."""
_FREE_TRIES = 64
"""... but not more often than that for nothing: where choices end at once, nothing is ever verified."""
_PAUSE = 16
"""Tokens for which others try, where nothing could be proposed for a sequence."""
_NEWS = 32
"""As much as that a draft model has not read of a sequence that goes on; more is a beginning."""
_HORIZON = 128
"""Tokens of its output for which reading a sequence's beginning must pay: it may end any time."""
_IDLE = 16
"""Plans for which it is taken for granted that nothing pays."""


class _Choice(NamedTuple):
    """What is best for one iteration."""

    threshold: float = 2.0
    """The least probability to stand at which a token is worth its price; above 1 if none is."""
    saved_s: float = 0.0
    """Seconds it saves for each token that comes out."""


class Speculation:
    """Of one engine in one epoch. With `speculative_pace: fixed` always as many as may be.

    An iteration of d sequences brings d tokens in seconds(d). With T proposals that stand with probabilities p it brings d + sum(p)
    in seconds(d + T) and what proposing takes. Proposals are taken in the order of their probabilities, up to where the quotient of
    the two is best; a sequence's n-th stands if all before it do, so with rate ** n (Leviathan et al. 2023, section 3.1, but with
    measured costs). Where nothing pays, one sequence at a time has tokens proposed all the same, as often as that takes 0.5 % of
    the time: _SHARE of each iteration's is put aside for it, and what a try takes is paid from that.
    """

    def __init__(self, config: BatchConfig, line: StepCost) -> None:
        """`line`: what all iterations cost, for sizes that no iteration without prompts had."""
        self._config = config
        self._target = PassCost(line)
        self._draft_line = StepCost()
        self._draft = PassCost(self._draft_line)
        self._usual = Acceptance(fade=0.99)
        """Of all sequences."""
        self._for_next, self._for_this = _Choice(), _Choice()
        self._decodes = 1
        self._purse_s = self._price_s = 0.0
        """What tries may take now, and what one takes at least."""
        self._tried = False
        """Somebody tries in this plan."""
        self._free_tries = _FREE_TRIES
        self._idle = 0
        """How many of _IDLE are left; none when something has been verified, as rates change with that only."""

    def begin(self, running: Iterable[Sequence], decodes: int) -> None:
        """A plan is made in which about so many of those that run decode: what will be worth proposing after it, and what of that
        which was proposed is worth verifying in it."""
        if self._config.speculative_pace == "fixed":
            return
        self._tried = False
        self._idle -= 1
        if self._idle > 0 and abs(decodes - self._decodes) * _LEVELS <= self._decodes:
            return
        self._decodes = max(1, decodes)
        coming: Counter[tuple[float, int]] = Counter()
        there: Counter[tuple[float, int]] = Counter()
        for sequence in running:
            if sequence.schedulable > 1:
                continue
            level = self._level(sequence)
            coming[level, self._most(sequence)] += 1
            if sequence.proposed:
                there[level, len(sequence.proposed)] += 1
        self._for_next = self._best(coming, self._config.shares, drafting=True)
        # None of these is in flight: where there are more than one share's, others have them verified later.
        self._for_this = self._best(there, max(1.0, there.total() / self._decodes), drafting=False) if there else _Choice()
        most = self._config.speculative_tokens
        self._price_s = self._more_s(self._decodes, most) + most * self._draft_s(1)
        self._purse_s = min(self._purse_s, _SAVED_TRIES * self._price_s)
        if not there and self._for_next.threshold > 1.0 and not self._beginning:
            self._idle = _IDLE

    def ran(self, launched: Launched, result: StepResult) -> None:
        """A plan's result has come."""
        target_s = result.compute_s - result.draft_s
        for tokens, seconds in result.draft_passes:
            self._draft_line.observe(tokens, seconds)
            self._draft.observe(tokens, seconds)
        plain, asked, tries, verified = True, 0, 0, 0
        for chunk, sequence in zip(launched.plan.chunks, launched.sequences, strict=True):
            plain = plain and chunk.sample and chunk.num_tokens == 1 + chunk.verify
            if chunk.propose or chunk.verify:
                asked += chunk.propose
                tries += chunk.propose * sequence.speculated.trying
                verified += chunk.verify * sequence.speculated.on_trial
        if plain:
            self._target.observe(launched.num_tokens, target_s)
        self._purse_s += _SHARE * target_s
        if not self._beginning and (tries or verified):
            self._purse_s -= result.draft_s * tries / max(1, asked) + self._more_s(launched.num_tokens - verified, verified)

    def wanted(self, sequence: Sequence) -> int:
        """How many tokens to propose for it when the next one is drawn."""
        known = sequence.speculated
        if known.trying and not known.on_trial:
            known.tries_from = sequence.num_tokens + _PAUSE
        known.trying = False
        if self._idle > 0 and (self._tried or self._purse_s < self._price_s):
            return 0
        most = self._most(sequence)
        if self._config.speculative_pace == "fixed" or most == 0:
            return most
        count = 0
        if self._usual.tried >= _EVIDENCE:
            count = self._worthwhile(sequence, most, self._for_next.threshold)
            unread, left = sequence.num_tokens - known.read, sequence.params.max_tokens - len(sequence.emitted)
            if unread > _NEWS and self._draft_s(unread) > self._for_next.saved_s * min(_HORIZON, left):
                count = 0
        known.trying = count == 0 and not self._tried and self._may_try(sequence)
        if known.trying:
            count, self._tried = most, True
        return count

    def settled(self, sequence: Sequence, *, verify: int, propose: int) -> None:
        """So many of those kept and wanted are in the plan: none where there were no blocks for them."""
        known = sequence.speculated
        if not verify:
            known.on_trial = False
        if propose:
            known.read = sequence.num_tokens
            self._free_tries -= known.trying and self._beginning
        elif known.trying:
            known.trying = self._tried = False

    def kept(self, sequence: Sequence) -> list[int]:
        """Of what was proposed for it, and paid for, as much as is worth verifying."""
        most = min(len(sequence.proposed), sequence.params.max_tokens - len(sequence.emitted) - 1)
        known = sequence.speculated
        known.on_trial = known.trying
        if self._config.speculative_pace == "adaptive" and not known.trying:
            most = self._worthwhile(sequence, most, self._for_this.threshold)
        return sequence.proposed[:most]

    def verified(self, sequence: Sequence, proposed: int, stood: int) -> None:
        """So many of the proposed tokens stood."""
        known = sequence.speculated
        self._idle = 0
        known.observe(proposed, stood)
        self._usual.observe(proposed, stood)
        if known.on_trial and self._target.known:  # a try that brings something costs less, but never nothing
            self._purse_s += min(_REFUND * self._price_s, stood * self._target.seconds(self._decodes) / self._decodes)
        known.on_trial = False

    def _may_try(self, sequence: Sequence) -> bool:
        """Before anything is known of the drafter, in any case. What the draft has to read first is paid afterwards, however long
        it takes: else what is dear to read would never be tried."""
        if sequence.num_tokens < sequence.speculated.tries_from:
            return False
        return self._beginning or self._purse_s >= self._price_s

    @property
    def _beginning(self) -> bool:
        """Tries need not be paid for yet."""
        return self._usual.tried < _EVIDENCE and self._free_tries > 0

    def _draft_s(self, tokens: float) -> float:
        """Of a draft model's pass; nothing as long as none was seen, as with drafters that are no models."""
        return self._draft.seconds(tokens) if self._draft.known else 0.0

    def _more_s(self, tokens: int, more: int) -> float:
        return self._target.seconds(tokens + more) - self._target.seconds(tokens) if self._target.known else 0.0

    def _most(self, sequence: Sequence) -> int:
        """Those that are certain to be within max_tokens, when one more token has been drawn."""
        left = sequence.params.max_tokens - len(sequence.emitted) - 2
        return 0 if sequence.params.beam_width else max(0, min(self._config.speculative_tokens, left))

    def _level(self, sequence: Sequence) -> float:
        return round(sequence.speculated.rate(self._usual) * _LEVELS) / _LEVELS

    def _worthwhile(self, sequence: Sequence, most: int, threshold: float) -> int:
        rate, count = self._level(sequence), 0
        while count < most and rate ** (count + 1) >= threshold:
            count += 1
        return count

    def _best(self, groups: Counter[tuple[float, int]], shares: float, *, drafting: bool) -> _Choice:
        """groups: how many sequences have a rate, and can have so many tokens. shares: how many iterations they are
        divided among. drafting: a draft's passes count as well."""
        decodes = self._decodes
        steps = sorted(
            ((rate**n, -n, number) for (rate, most), number in groups.items() for n in range(1, most + 1) if rate > 0), reverse=True
        )
        if not steps or not self._target.known:
            return _Choice()
        alone_s = self._target.seconds(decodes)
        best, found = _GAIN * decodes / alone_s, _Choice()
        expected, tokens, drafted, deepest = float(decodes), 0.0, 0.0, 0
        for index, (chance, negative, number) in enumerate(steps):
            expected += chance * number / shares
            tokens += number / shares
            deepest = max(deepest, -negative)
            drafted += number / shares if negative == -1 else 0.0
            if index + 1 < len(steps) and steps[index + 1][0] == chance:
                continue
            seconds = self._target.seconds(decodes + tokens)
            if drafting:  # the first pass reads what the last iteration brought
                seconds += self._draft_s(drafted * expected / decodes) + (deepest - 1) * self._draft_s(drafted)
            if expected / seconds > best:
                best = expected / seconds
                found = _Choice(chance, alone_s / decodes - seconds / expected)
        return found
