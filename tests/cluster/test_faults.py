"""Single faults that random ones seldom hit, each as one story in the simulated cluster."""

from cluster.config import BatchConfig
from cluster.protocol import SamplingParams
from tests.cluster.simulation import Client, Simulation

BATCH = BatchConfig(num_blocks=17, max_model_len=60, max_num_seqs=4)


LONG = BatchConfig(num_blocks=1001, max_model_len=4000, max_num_seqs=4)
"""For generations that take longer than a silence."""


def client(at: float, prompt: int = 5, max_tokens: int = 40) -> Client:
    return Client(list(range(prompt)), SamplingParams(seed=1, max_tokens=max_tokens), at)


def finished(simulation: Simulation) -> bool:
    simulation.run(limit_s=200.0)
    simulation.check_clients()
    return all(all(client.finish) for client in simulation.clients.values())


def test_one_too_large_asked_while_engines_load_does_not_block_the_queue() -> None:
    simulation = Simulation(0, [client(0.0, max_tokens=100), client(0.01)], BATCH)
    simulation.run(limit_s=200.0)
    huge, other = simulation.clients.values()
    assert huge.error is not None
    assert all(other.finish)
    simulation.check_empty()


def test_a_router_wrongly_taken_for_dead_keeps_its_clients() -> None:
    simulation = Simulation(0, [client(2.0, max_tokens=1000) for _ in range(8)], LONG)
    simulation.at(2.2, lambda: simulation.cut_off("router0"))
    assert finished(simulation)


def test_an_engine_that_dies_for_good_while_the_scheduler_is_down() -> None:
    simulation = Simulation(0, [client(2.0, max_tokens=50) for _ in range(4)], BATCH, num_engines=2)

    def die() -> None:
        process = simulation.processes["engine0"]
        process.alive, process.life = False, process.life + 1
        simulation._worker_lives("engine0")

    simulation.at(2.2, simulation.restart_scheduler)
    simulation.at(2.2, die)
    assert finished(simulation)


def test_an_engine_cut_off_while_busy_speaks_to_nobody() -> None:
    simulation = Simulation(3, [client(2.0, max_tokens=1000) for _ in range(6)], LONG, num_engines=2)
    simulation.at(2.1, lambda: simulation.cut_off("engine0"))
    assert finished(simulation)
    simulation.check_empty()
