"""The rule by which requests are placed."""

from cluster.placement import SEQUENCE_TOKENS, WORK, Option, cost


def test_known_tokens_are_worth_a_wait() -> None:
    away = cost(Option(overlap=0, backlog=0, sequences=0), 1000)
    assert cost(Option(overlap=900, backlog=2000, sequences=0), 1000) < away
    assert away < cost(Option(overlap=900, backlog=round(900 * (WORK + 1)) + 1, sequences=0), 1000)
    assert away < cost(Option(overlap=0, backlog=0, sequences=1), 1000) <= away + SEQUENCE_TOKENS


def test_a_few_known_tokens_do_not_gather_all_requests_where_much_was_computed() -> None:
    holder, idle = Option(50, 0, 0, turnover=2.0), Option(0, 0, 0, turnover=0.0)
    assert cost(idle, 1000) < cost(holder, 1000)
    assert cost(idle, 60) > cost(holder, 60)
