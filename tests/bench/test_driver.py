"""The driver, occupancy, the static hold and the waste ledger against brute force, on the fake model."""

import heapq
import itertools
import random
from collections.abc import Sequence

import pytest

from bench import occupancy
from bench.driver import Drive, Hold, Occupancy
from bench.waste import CASES, account, asking, next_power_of_two
from bench.workload import Job, Shape
from cluster.config import Batching, Reservation
from cluster.protocol import SamplingParams
from tests.bench.virtual import PricedRunner, config
from workers.fake import fake_output

SEEDS = range(5)


def outputs(seed: int, count: int = 21) -> list[int]:
    return [random.Random(seed * 1000 + i).randint(1, 30) for i in range(count)]


def occupancies(lengths: Sequence[int], batching: Batching, slots: int) -> tuple[Occupancy, Occupancy]:
    batch = config(batching=batching, max_num_seqs=slots)
    runner = PricedRunner(batch)
    drive = Drive([Job([7], length) for length in lengths], batch, runner, runner.timer)
    whole, in_demand = Occupancy(slots), Occupancy(slots)
    for iteration in drive.iterations():
        whole.add(iteration)
        if iteration.waiting:
            in_demand.add(iteration)
    assert [len(served.tokens) for served in drive.served] == list(lengths)
    drive.batcher.check_integrity()
    return whole, in_demand


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("batching", ["static", "static-skip"])
def test_static_occupancy(seed: int, batching: Batching) -> None:
    lengths = outputs(seed)
    batches = [lengths[i : i + 4] for i in range(0, len(lengths), 4)]
    whole, in_demand = occupancies(lengths, batching, 4)
    assert whole.share == pytest.approx(sum(lengths) / (4 * sum(map(max, batches))))
    assert in_demand.share == pytest.approx(sum(map(sum, batches[:-1])) / (4 * sum(map(max, batches[:-1]))))


@pytest.mark.parametrize("seed", SEEDS)
def test_continuous_occupancy(seed: int) -> None:
    lengths = outputs(seed)
    ends = [0] * 4
    for length in lengths:  # a freed slot takes the next request in the following iteration
        heapq.heapreplace(ends, ends[0] + length)
    whole, in_demand = occupancies(lengths, "continuous", 4)
    assert whole.share == pytest.approx(sum(lengths) / (4 * max(ends)))
    assert in_demand.share == 1.0


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("slots", [1, 3, 8, 30])
def test_occupancy_is_computed_as_the_batcher_gives_it(seed: int, slots: int) -> None:
    lengths = outputs(seed)
    assert occupancy.static(lengths, slots) == occupancies(lengths, "static", slots)
    assert occupancy.continuous(lengths, slots) == occupancies(lengths, "continuous", slots)
    occupancy.check(lengths, slots)


def test_a_wrong_occupancy_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(occupancy, "static", lambda lengths, slots: (Occupancy(slots), Occupancy(slots)))
    with pytest.raises(RuntimeError, match="static-skip, 4 slots: the Batcher gives"):
        occupancy.check([3, 5, 1], 4)


def test_iterations_that_only_prefill_do_not_count() -> None:
    batch = config(max_num_seqs=2, max_num_batched_tokens=4)
    runner = PricedRunner(batch)
    whole = Occupancy(2)
    for iteration in Drive([Job([1] * 20, 3)], batch, runner, runner.timer).iterations():
        whole.add(iteration)
    assert (runner.time, whole.iterations, whole.share) == (7.0, 3, 0.5)


def test_tokens_are_the_fake_models() -> None:
    batch = config()
    runner = PricedRunner(batch)
    jobs = [Job([i, 5, 9], 4 + i, max_tokens=16) for i in range(12)]
    for served in Drive(jobs, batch, runner, runner.timer).run():
        assert served.tokens == fake_output(served.job.prompt, SamplingParams(max_tokens=served.job.output_tokens), 0, 1)


def test_arrivals_and_idle_time() -> None:
    batch = config()
    runner = PricedRunner(batch)
    jobs = [Job([1], 2, 0.0), Job([1], 2, 0.5), Job([1], 4, 100.0)]
    served = Drive(jobs, batch, runner, runner.timer).run()
    assert [one.finish_s for one in served] == [2.0, 3.0, 104.0]
    assert [one.normalized_latency for one in served] == [1.0, 1.25, 1.0]


def test_a_batch_starts_when_full_or_when_the_oldest_has_waited() -> None:
    batch = config(batching="static", max_num_seqs=2)
    runner = PricedRunner(batch)
    jobs = [Job([1], 1, at) for at in (0.0, 1.0, 2.0, 10.0, 30.0, 30.0, 30.0)]
    served = Drive(jobs, batch, runner, runner.timer, Hold(2, 5.0)).run()
    assert [one.finish_s for one in served] == [2.0, 2.0, 8.0, 16.0, 31.0, 31.0, 36.0]


def test_no_batch_starts_before_the_last_is_done() -> None:
    batch = config(batching="static", max_num_seqs=4)
    runner = PricedRunner(batch)
    jobs = [Job([1], 2, 0.0), Job([1], 9, 0.0), *(Job([1], 1, 1.0) for _ in range(4))]
    served = Drive(jobs, batch, runner, runner.timer, Hold(2, 0.0)).run()
    assert [one.finish_s for one in served] == [2.0, 9.0, 10.0, 10.0, 11.0, 11.0]


def test_answers_of_a_batch_together() -> None:
    batch = config(batching="static", max_num_seqs=2)
    runner = PricedRunner(batch)
    served = Drive([Job([1], n, 0.0) for n in (2, 9, 3)], batch, runner, runner.timer, Hold(2, 0.0, together=True)).run()
    assert [one.finish_s for one in served] == [9.0, 9.0, 12.0]


@pytest.mark.parametrize(("reservation", "asked"), list(itertools.product(["paged", "max_tokens", "contiguous"], [11, 30])))
def test_waste_of_one_request(reservation: Reservation, asked: int) -> None:
    prompt, output = 9, 11
    usage = account([Job([3] * prompt, output, max_tokens=asked)], config(reservation=reservation))
    computed = [prompt + i for i in range(output)]
    slots = {
        "paged": [-(-n // 4) * 4 for n in computed],
        "max_tokens": [-(-(prompt + asked) // 4) * 4] * output,
        "contiguous": [128] * output,
    }[reservation]
    assert (usage.iterations, usage.used, usage.allocated) == (output, sum(computed), sum(slots))
    assert usage.waste == pytest.approx(1 - sum(computed) / sum(slots))
    assert usage.mean_running == 1.0


def test_waste_of_many() -> None:
    shapes = [Shape(1 + 3 * i % 20, n) for i, n in enumerate(outputs(1, 60))]
    found = {}
    for case in CASES:
        jobs = asking(shapes, case, 128)
        assert all(job.output_tokens <= job.asked <= 128 - len(job.prompt) for job in jobs)
        found[case.name] = account(jobs, config(num_blocks=4 * 32 + 1, max_num_seqs=64, reservation=case.reservation))
    paged, exact, pow2, contiguous = found.values()
    assert paged.waste < exact.waste < pow2.waste < contiguous.waste
    assert paged.mean_running > exact.mean_running > pow2.mean_running > contiguous.mean_running
    assert contiguous.running <= 4 * contiguous.iterations


def test_next_power_of_two() -> None:
    assert [next_power_of_two(n) for n in (1, 2, 3, 4, 5, 1000)] == [1, 2, 4, 4, 8, 1024]
