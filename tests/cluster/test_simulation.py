"""The contracts, together, under random arrivals, cancels, deaths and tiny pools: nothing lost, doubled, mixed up or left over."""

import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.config import BatchConfig, Batching, Reservation
from cluster.protocol import SamplingParams, StepResult
from router.journal import News
from tests.cluster.simulation import Client, Simulation
from tests.conftest import examples

FAULTS = ("kill_workers", "freeze_workers", "kill_engine", "restart_scheduler", "cut_off", "freeze_engine")


@st.composite
def clients(draw: st.DrawFn, longest: int, most_beams: int) -> Client:
    num_prompt = draw(st.integers(1, longest - 1))
    max_tokens = draw(st.integers(0, longest - num_prompt))
    at = draw(st.floats(0, 6))
    n = draw(st.sampled_from([1, 1, 1, 2, 5]))
    beams = max_tokens > 0 and n <= most_beams and draw(st.sampled_from([False, False, True]))
    params = SamplingParams(
        seed=draw(st.integers(0, 2**64 - 1)),
        max_tokens=max_tokens,
        n=n,
        beam_width=draw(st.integers(n, most_beams)) if beams else 0,
        length_penalty=draw(st.sampled_from([1.0, 0.5])) if beams else 1.0,
        early_stopping=draw(st.booleans()) if beams else False,
        stop_token_ids=tuple(range(draw(st.sampled_from([0, 0, 100])))),
        logprobs=draw(st.sampled_from([None, 0])),
        prompt_logprobs=draw(st.sampled_from([None, 0])),
        min_tokens=draw(st.integers(0, max_tokens)),
    )
    prompt = random.Random(draw(st.sampled_from([0, 0, 0, 1, 2]))).choices(range(997), k=num_prompt)  # many begin alike
    prompt[-1] = draw(st.integers(0, 2))
    cancel_at = draw(st.one_of(st.none(), st.none(), st.floats(0, 3).map(lambda wait: at + wait)))
    return Client(prompt, params, at, cancel_at, salt=draw(st.sampled_from(["", "", "x"])))


@st.composite
def simulations(draw: st.DrawFn, pp: int, reservation: Reservation = "paged", batching: Batching = "continuous") -> Simulation:
    block_size = draw(st.sampled_from([1, 4, 16]))
    batch = BatchConfig(
        num_blocks=draw(st.integers(3, 24)),
        block_size=block_size,
        max_model_len=draw(st.integers(2, 200)),
        max_num_seqs=draw(st.integers(1, 8)),
        max_num_batched_tokens=draw(st.integers(8, 64)),
        pp=pp,
        reservation=reservation,
        batching=batching,
        prefix_cache=draw(st.sampled_from(["on", "on", "on", "off"])),
        host_blocks=draw(st.sampled_from([0, 0, 2, 20])),
        run_ahead=draw(st.sampled_from(["on", "auto", "off"])),
        speculative_tokens=draw(st.sampled_from([0, 0, 3])),
    )
    longest = batch.max_sequence_tokens
    forks = reservation == "paged" and batching == "continuous"
    asked = draw(st.lists(clients(max(2, longest), batch.max_num_seqs if forks else 0), min_size=1, max_size=10))
    seed = draw(st.integers(0, 2**32))
    simulation = Simulation(seed, asked, batch, num_engines=draw(st.integers(1, 2)), num_routers=draw(st.integers(1, 2)))
    for kind, time, victim in draw(st.lists(st.tuples(st.sampled_from(FAULTS), st.floats(0.5, 8), st.integers(0, 1)), max_size=4)):
        simulation.fault(kind, time, f"engine{victim % len(simulation.engines)}")
    return simulation


def check(simulation: Simulation) -> None:
    simulation.run(limit_s=300.0)
    simulation.check_clients()
    for id, client in simulation.clients.items():
        assert client.error is None, f"{id}: {client.error!r}"
    simulation.check_empty()


@pytest.mark.parametrize("pp", [1, 4])
def test_every_client_gets_its_tokens_whatever_dies(pp: int) -> None:
    @examples(120)
    @given(simulations(pp))
    def run(simulation: Simulation) -> None:
        check(simulation)

    run()


@pytest.mark.parametrize("reservation", ["max_tokens", "contiguous"])
@pytest.mark.parametrize("pp", [1, 4])
def test_baseline_reservations_keep_the_same_promise(pp: int, reservation: Reservation) -> None:
    @examples(50)
    @given(simulations(pp, reservation=reservation))
    def run(simulation: Simulation) -> None:
        check(simulation)

    run()


@pytest.mark.parametrize("batching", ["static", "static-skip"])
@pytest.mark.parametrize("pp", [1, 4])
def test_static_batching_keeps_the_same_promise(pp: int, batching: Batching) -> None:
    @examples(50)
    @given(simulations(pp, batching=batching))
    def run(simulation: Simulation) -> None:
        check(simulation)

    run()


def test_the_simulation_notices_a_lost_token() -> None:
    """The oracle bites: an engine that loses one token of a result is caught."""
    params = SamplingParams(seed=1, max_tokens=20)
    batch = BatchConfig(num_blocks=10, max_model_len=100, max_num_seqs=4)
    simulation = Simulation(0, [Client([1, 2, 3], params, 0.0)], batch)
    engine = simulation.engines["engine0"]
    original = engine.receive

    def corrupt(message: object, now: float) -> None:
        if isinstance(message, StepResult) and message.step == 7:
            message.results[0].tokens[0] += 1
        original(message, now)  # type: ignore[arg-type]

    engine.receive = corrupt  # type: ignore[method-assign]
    with pytest.raises(AssertionError, match="r0/0"):
        check(simulation)


@pytest.mark.parametrize("harm", ["lose", "repeat"])
def test_the_simulation_notices_a_prompt_position_lost_or_told_twice(harm: str) -> None:
    params = SamplingParams(seed=1, max_tokens=2, prompt_logprobs=0)
    batch = BatchConfig(num_blocks=10, max_model_len=100, max_num_seqs=4, max_num_batched_tokens=8)
    simulation = Simulation(0, [Client(list(range(30)), params, 0.0)], batch)
    (journal,) = simulation.routers.values()
    original = journal.take_news

    def corrupt() -> list[News]:
        news = original()
        for delta in (d for item in news for d in item.deltas if len(d.prompt_logprobs) > 1):
            delta.prompt_logprobs[:] = delta.prompt_logprobs[1:] if harm == "lose" else delta.prompt_logprobs[:1] * 2
        return news

    journal.take_news = corrupt  # type: ignore[method-assign]
    with pytest.raises(AssertionError):
        check(simulation)


def pulls(simulation: Simulation) -> Counter[str]:
    """How they ended, of the engines that live at the end."""
    return sum((engine.metrics.pulls.ended for engine in simulation.engines.values()), Counter())


class Busy(Simulation):
    """Workers have several plans to run when KV comes or goes."""

    plan_times = (0.001, 0.02, 0.3)


@pytest.mark.parametrize("pp", [1, 2])
def test_kv_pulled_from_other_engines_is_right_whatever_dies(pp: int) -> None:
    """Many requests with the same beginnings, at engines of few places each: one engine pulls them from another."""
    seen: Counter[str] = Counter()

    @examples(50)
    @given(
        st.integers(0, 2**32),
        st.integers(14, 34),
        st.lists(st.tuples(st.sampled_from(FAULTS), st.floats(0.5, 8)), max_size=2),
        st.sampled_from([Simulation, Busy]),
    )
    def run(seed: int, num_blocks: int, faults: list[tuple[str, float]], kind: type[Simulation]) -> None:
        chance = random.Random(seed)
        batch = BatchConfig(
            num_blocks=num_blocks,
            block_size=4,
            max_model_len=80,
            max_num_seqs=4,
            max_num_batched_tokens=16,
            pp=pp,
            plans_in_flight=chance.choice([None, pp + 1]),
            host_blocks=chance.choice([0, 30]),
            run_ahead=chance.choice(["on", "off"]),
            speculative_tokens=chance.choice([0, 4]),
        )
        length = min(40, batch.max_sequence_tokens - 8)
        stems = [chance.choices(range(997), k=length) for _ in range(3)]
        asked = []
        for i in range(20):
            known = chance.choice([0, length // 2 + chance.randrange(4), length])  # what nobody knows pushes the others out
            prompt = [*chance.choice(stems)[:known], *chance.choices(range(997), k=length - known), i]
            params = SamplingParams(seed=i, max_tokens=chance.randrange(1, 7), n=chance.choice([1, 1, 2]))
            at = chance.uniform(2, 10)
            asked.append(Client(prompt, params, at, cancel_at=chance.choice([None, None, None, at + 0.3])))
        simulation = kind(seed, asked, batch, num_engines=3)
        for fault, time in faults:
            simulation.fault(fault, 2.0 + time, f"engine{chance.randrange(3)}")
        check(simulation)
        seen.update(pulls(simulation))

    run()
    assert seen["done"]
    assert seen["failed"] + seen["late"]
