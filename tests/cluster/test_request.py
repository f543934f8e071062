"""What a sequence says of itself."""

from cluster.protocol import PromptScores, TokenLogprobs
from cluster.request import Scoring, Sequence
from tests.cluster.messages import request


def sequence() -> Sequence:
    return Sequence(1, request(prompt=8), 0, [], received_at=1.0, scoring=Scoring(1, 8), started_at=1.5)


def test_the_wait_is_told_once() -> None:
    scores = PromptScores(1, 1, [TokenLogprobs(-1.0, [], [])])
    scored = sequence()
    assert [scored.news(told).queued_s for told in (scores, scores, None)] == [0.5, None, None]
    plain = sequence()
    assert [plain.news(None).queued_s for _ in range(2)] == [0.5, 0.5], "the first had no news, so it was not sent"
    plain.emitted.append(7)
    assert plain.news(None).queued_s is None
