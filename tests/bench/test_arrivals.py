"""Continuous against static under Poisson arrivals, on the fake model and its virtual time."""

import math
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import pytest

from bench.arrivals import Bench, best_static, compare, grid, lines, percentile, tabulate
from bench.contenders import Policy
from bench.driver import Hold, Served
from bench.report import Report
from bench.workload import Job, jobs, lognormal_shapes, scaled
from tests.bench.virtual import PricedRunner, config

CONTINUOUS = Policy("continuous", 8)


def bench(some: list[Job], token_s: float = 0.0) -> Bench:
    base = config(max_model_len=512, num_blocks=2000)
    runner = PricedRunner(base, 1.0, token_s)

    def of(policy: Policy) -> object:
        return replace(base, batching=policy.batching, max_num_seqs=policy.slots)

    return Bench(runner, of, some, runner.timer)  # type: ignore[arg-type]


def test_percentile_is_what_nine_tenths_keep() -> None:
    assert percentile([Served(Job([1], 2), finish_s=2.0 * n) for n in range(1, 11)]) == 9.0
    assert percentile([Served(Job([1], 4, arrival_s=1.0), finish_s=2.0)]) == 0.25


def test_alone_a_request_takes_an_iteration_for_each_token() -> None:
    shared = bench([Job([1], 5)] * 30)
    assert [served.finish_s for served in shared.alone(CONTINUOUS)] == [5.0] * 30
    assert shared.latency(CONTINUOUS, 1e-6, seed=1) == 1.0
    assert shared.latency(Policy("static", 4, Hold(4, 10.0)), 1e-6, seed=1) == pytest.approx(3.0)


def test_a_lost_run_is_given_up() -> None:
    shared = bench([Job([1], 5)] * 200)
    assert isinstance(shared.runner, PricedRunner)
    worst = shared.latency(CONTINUOUS, 1e6, seed=1)
    whole, shared.runner.time = shared.runner.time, 0.0
    assert 10 < worst < math.inf
    assert shared.latency(CONTINUOUS, 1e6, seed=1, late=worst) == worst
    shared.runner.time = 0.0
    assert shared.latency(CONTINUOUS, 1e6, seed=1, late=2.0) == math.inf
    assert shared.runner.time < whole / 2


def test_arrivals_fill_the_window() -> None:
    some = [Job([1], n) for n in (5, 6, 7)]
    shared = replace(bench(some), window_s=10.0)
    assert [job.output_tokens for job in shared.arriving(0.1, 1)] == [5, 6, 7]
    assert [job.output_tokens for job in shared.arriving(0.8, 1)] == [5, 6, 7, 5, 6, 7, 5, 6]
    # Three requests at once are within anything; a rate above what can be sustained shows with time.
    assert bench(some).latency(CONTINUOUS, 10.0, 1) < 2.0 < replace(shared, window_s=100.0).latency(CONTINUOUS, 10.0, 1)


def test_the_best_hold_is_found() -> None:
    # An iteration costs the same whatever is in it, so large batches are good, and waiting alone does no good here.
    shared = bench([Job([1], 4)] * 200)
    candidates = grid("static", [1, 8], [0.0, 20.0], together=False)
    assert [(policy.slots, policy.hold) for policy in candidates] == [
        (8, Hold(8, 0.0)),
        (8, Hold(8, 20.0)),
        (1, Hold(1, 0.0)),
        (1, Hold(1, 20.0)),
    ]
    found = best_static(shared, candidates, 3.0, 1, 0.01)
    assert found is not None
    assert found[0] == candidates[0]
    assert shared.latency(found[0], found[1], 1) <= 3.0 < shared.latency(found[0], 4 * found[1], 1)
    assert best_static(shared, candidates, 0.5, 1, 0.01) is None


def test_continuous_sustains_more(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shared = bench(jobs(scaled(lognormal_shapes(40), 0.02, 0.1), 997), token_s=0.05)
    arguments = Namespace(
        slots=8,
        variants=["static", "static-skip"],
        batches=[2, 8],
        waits=[0.0, 1.0],
        answers="own",
        factors=[2.0, 4.0],
        seeds=[1, 2],
        tolerance=0.3,
        window=10.0,
    )
    report = Report("arrivals", [])
    sides, unloaded = compare(shared, arguments, report)
    for factor in (2.0, 4.0):
        continuous, static, skip = (side.sustained(factor, factor * unloaded) or 0.0 for side in sides)
        assert 0 < static <= 1.2 * skip
        assert continuous > 1.5 * skip
    assert sides[1].best.keys() == {2.0, 4.0}
    assert sides[1].sustained(3.0, 3 * unloaded) is None
    tabulate(sides, arguments.factors, unloaded, report)
    assert "continuous (slots 8) to static, best (B, w)" in capsys.readouterr().out
    drawn = lines(sides)
    assert len(drawn) == sum(len(side.curves) for side in sides) >= 3
    assert all(low <= y <= high for line in drawn for low, y, high in zip(line.low, line.y, line.high, strict=True))
    assert report.save(tmp_path).exists()
