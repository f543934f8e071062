"""The benchmark of a cluster: its pure parts, its clients against a small server, the exchanges' check on gloo without Ray."""

import argparse
import json
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed import HashStore  # type: ignore[attr-defined]

from bench import cluster, collectives
from bench.clients import Answer, Run, _take, body, percentile, run
from bench.collectives import ALL_GATHER, ALL_REDUCE, HAND_OVER, IN_TURN, Case, ExchangeError, Outcome, Rank, cases, check
from bench.counters import COMPUTED, ITERATIONS, PREEMPTED, STAGES, Counters, parse, settled
from bench.deployed import DeployError, config_of, deployed
from bench.grids import Grid, parse_grids, parse_range, random_shapes
from bench.same_tokens import OUTPUT_TOKENS, compare, lengths, requests
from bench.workload import Job
from cluster.config import ConfigError
from parallel.groups import Group
from parallel.handoff import Handoff
from parallel.membership import Membership
from parallel.mesh import Mesh
from parallel.rendezvous import StoreServer, connect
from tests.parallel.ranks import CPU

SMALL = [(1, 64), (3, 101)]


# --- the exchanges' check -------------------------------------------------------------------------------------------


def checked(mesh: Mesh, todo: Sequence[Case], join: Any, timeout_s: float = 20.0) -> list[collectives.Measured]:
    """The check with a thread for each rank. join(rank): its store."""
    with ThreadPoolExecutor(mesh.size) as threads:
        made = list(threads.map(lambda r: Rank(Membership(mesh.seat(r), join(r), wait_s=20.0), CPU, timeout_s), range(mesh.size)))
        return check(mesh, todo, lambda case: list(threads.map(lambda rank: rank.run(case), made)))


@pytest.mark.parametrize(("tp", "pp"), [(2, 1), (1, 2), (2, 2), (1, 3)])
def test_exchanges_are_right_and_timed(tp: int, pp: int) -> None:
    mesh, store = Mesh(tp, pp), HashStore()
    todo = cases(mesh, SMALL)
    rows = [measured.row for measured in checked(mesh, todo, lambda rank: store)]
    assert len(rows) == len(todo)
    assert all(len(row) == len(collectives.COLUMNS) for row in rows)
    assert all(isinstance(cell, float) and cell > 0 for row in rows for cell in row[-2:])


def test_ranks_meet_at_a_store_of_the_driver() -> None:
    store = StoreServer("127.0.0.1")
    todo = [Case(ALL_REDUCE, "float32", 512, 64)]
    (measured,) = checked(Mesh(2, 1), todo, lambda rank: connect(store.address, 7, 20.0))
    assert measured.case.num_bytes == 512 * 64 * 4


def test_each_mesh_has_the_exchanges_that_it_uses() -> None:
    def names(tp: int, pp: int) -> set[str]:
        return {case.exchange for case in cases(Mesh(tp, pp))}

    assert names(1, 1) == set()
    assert names(4, 1) == {ALL_REDUCE, ALL_GATHER}
    assert names(1, 2) == {HAND_OVER}
    assert names(2, 2) == {ALL_REDUCE, ALL_GATHER, HAND_OVER, IN_TURN}
    assert {(case.rows, case.features, case.dtype) for case in cases(Mesh(2, 1))} >= {(1, 8192, "float32"), (512, 8192, "bfloat16")}


@pytest.mark.parametrize("exchange", [ALL_REDUCE, ALL_GATHER, HAND_OVER, IN_TURN])
def test_a_wrong_value_is_an_error_that_names_the_exchange(monkeypatch: pytest.MonkeyPatch, exchange: str) -> None:
    where, name = (Handoff, "receive") if exchange == HAND_OVER else (Group, "all_gather")
    whole = getattr(where, name)

    def broken(self: object, given: Any) -> torch.Tensor:
        got: torch.Tensor = whole(self, given)
        if got.numel() > mesh.size:  # not where ranks only wait for each other
            got.view(-1)[5] += 1
        return got

    mesh, store = Mesh(2, 2), HashStore()
    monkeypatch.setattr(where, name, broken)
    with pytest.raises(ExchangeError, match=rf"^{exchange} of 3 x 101 bfloat16 over 2x2 ranks: rank \d: ValueError"):
        checked(mesh, [Case(exchange, "bfloat16", 3, 101)], lambda rank: store, timeout_s=3.0)


def test_a_rank_that_stays_away_is_a_time_out_that_names_the_exchange(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Rank.run
    monkeypatch.setattr(Rank, "run", lambda self, case: Outcome([1.0]) if self._seat.rank else whole(self, case))
    store = HashStore()
    with pytest.raises(ExchangeError, match=r"^all_gather of 1 x 64 float32 over 2x1 ranks: rank 0: RuntimeError"):
        checked(Mesh(2, 1), [Case(ALL_GATHER, "float32", 1, 64)], lambda rank: store, timeout_s=1.0)


def test_what_starts_the_ranks_may_fail() -> None:
    def dies(case: Case) -> list[Outcome]:
        raise TimeoutError("no answer\nmore")

    with pytest.raises(ExchangeError, match=r"^hand-over of 1 x 64 float32 over 1x2 ranks: TimeoutError: no answer$"):
        check(Mesh(1, 2), [Case(HAND_OVER, "float32", 1, 64)], dies)


# --- pure parts -----------------------------------------------------------------------------------------------------


def test_grids() -> None:
    assert parse_grids("1x1x1, 2x1x3") == [Grid(1, 1, 1), Grid(2, 1, 3)]
    assert [str(grid) for grid in parse_grids(cluster.GRIDS)] == cluster.GRIDS.split(",")
    assert (Grid(2, 3, 4).ranks, Grid(2, 3, 4).mesh) == (24, Mesh(2, 3))
    for wrong, said in {"2x1": "'2x1' is no grid", "1x0x1": "each at least 1", "": "no grid", "1x1x1,1x1x1": "twice"}.items():
        with pytest.raises(argparse.ArgumentTypeError, match=said):
            parse_grids(wrong)


def test_ranges() -> None:
    assert parse_range("32:256") == (32, 256)
    assert parse_range("7") == (7, 7)
    for wrong in ("0:4", "9:3", "a", "1:2:3", ""):
        with pytest.raises(argparse.ArgumentTypeError, match="no range of lengths"):
            parse_range(wrong)
    shapes = random_shapes(200, (3, 5), (7, 7))
    assert {shape.prompt_tokens for shape in shapes} == {3, 4, 5}
    assert {shape.output_tokens for shape in shapes} == {7}
    assert random_shapes(20, (3, 5), (7, 7)) == shapes[:20]


def test_percentiles() -> None:
    assert percentile([], 50) is None
    assert percentile([3.0], 99) == 3.0
    assert percentile([4.0, 1.0, 2.0, 3.0], 50) == 2.5
    assert percentile(list(range(101)), 99) == 99.0


def test_counters_and_bubble() -> None:
    text = "\n".join(
        [
            "# TYPE rayline:stage_compute_seconds counter",
            f'{STAGES}{{engine="engine-0",stage="0"}} 3.0',
            f'{STAGES}{{engine="engine-0",stage="1"}} 2.0',
            "# TYPE rayline:iterations counter",
            f'{ITERATIONS}{{engine="engine-0"}} 10.0',
            "# TYPE rayline:computed_tokens counter",
            f'{COMPUTED}{{engine="engine-0"}} 70.0',
            "",
        ]
    )
    counted = parse(text).since(Counters({STAGES: 1.0, ITERATIONS: 3.0}))
    assert counted.totals == {STAGES: 4.0, ITERATIONS: 7.0, COMPUTED: 70.0, PREEMPTED: 0.0}
    assert counted.idle_share(2, 4.0) == 0.5
    assert counted.tokens_per_iteration == 10.0
    assert parse("").tokens_per_iteration is None


def test_a_row_of_the_table() -> None:
    answers = [Answer(0.0, [1, 2, 3], [0.1, 0.2, 0.4], 0.4), Answer(0.0, [1], [0.3], 0.3, error="HTTP 500: ?")]
    counted = Counters({STAGES: 2.0, ITERATIONS: 2.0, COMPUTED: 8.0, PREEMPTED: 1.0})
    made = cluster.row(Grid(1, 2, 1), 16, Run(answers, 2.0, 0.5), counted, True)
    named = dict(zip(cluster.LOAD_COLUMNS, made, strict=True))
    assert len(named) == len(cluster.LOAD_COLUMNS)
    assert (named["tp x pp x engines"], named["requests"], named["failed"], named["preempted"]) == ("1x2x1", 2, 1, 1)
    assert (named["output tok/s"], named["a rank"], named["requests/s"]) == (2.0, 1.0, 0.5)
    assert named["TTFT ms p50"] == pytest.approx(200)
    assert named["ITL ms p50"] == pytest.approx(150)
    assert (named["bubble"], named["tokens/iteration"], named["client CPU"]) == (0.5, 4.0, 0.25)
    assert cluster.row(Grid(), 1, Run(answers, 2.0, 0.5), counted, False)[cluster.LOAD_COLUMNS.index("bubble")] is None


def test_tokens_are_compared_place_by_place() -> None:
    same = compare([[1, 2], [3]], [[1, 2], [3]])
    assert (same.requests, same.positions, same.requests_differing, same.differing, same.first) == (2, 3, 0, 0, "")
    other = compare([[1, 2, 3], [4, 9, 9]], [[1, 2, 3], [4, 5, 9]])
    assert (other.requests_differing, other.differing, other.first) == (1, 1, "request 1, token 1")
    assert compare([[1]], [[1, 2]]).differing == 1


def test_the_requests_to_compare_fit_and_are_chunked() -> None:
    assert lengths(1024, 512) == [1, 7, 16, 17, 100, 384, 1000]
    assert lengths(100_000, 512)[-1] == 1031
    assert lengths(30, 512) == [1, 6]
    asked = requests(1024, 512, 4096)
    assert [len(one["prompt"]) for one in asked[::2]] == lengths(1024, 512)
    assert [one["temperature"] for one in asked[:2]] == [0.0, 1.0]
    assert all(one["max_tokens"] == OUTPUT_TOKENS for one in asked)


# --- clients --------------------------------------------------------------------------------------------------------


class _Handler(BaseHTTPRequestHandler):
    """Streams as many tokens as are asked for, two at a time, and counts the calls at once."""

    now = most = 0
    lock = threading.Lock()

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["content-length"])))
        with self.lock:
            type(self).now += 1
            type(self).most = max(self.most, self.now)
        refused = asked["prompt"] == [13]
        self.send_response(400 if refused else 200)
        self.end_headers()
        if refused:
            self.wfile.write(b"unlucky")
        for i in range(0, 0 if refused else asked["max_tokens"], 2):
            tokens = list(range(i, min(i + 2, asked["max_tokens"])))
            self.wfile.write(f"data: {json.dumps({'choices': [{'token_ids': tokens}]})}\n\n".encode())
        if asked["prompt"] == [14]:
            self.wfile.write(b'data: {"error": {"message": "the engine died"}}\n\n')
        with self.lock:
            type(self).now -= 1

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(f'# TYPE x counter\n{STAGES}{{stage="0"}} 2.5\n'.encode())

    def log_message(self, *_: Any) -> None:
        pass


@contextmanager
def server() -> Iterator[str]:
    listening = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    thread = threading.Thread(target=listening.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{listening.server_port}"
    finally:
        listening.shutdown()
        thread.join()
        listening.server_close()


def test_a_closed_loop_asks_all_and_times_what_comes() -> None:
    with server() as url:
        done = run(url, [body(Job([1], tokens)) for tokens in (5, 1, 4, 2, 7, 3)], 2)
        assert settled(url, quiet_s=0.3).totals[STAGES] == 2.5
    assert [answer.tokens for answer in done.answers] == [list(range(n)) for n in (5, 1, 4, 2, 7, 3)]
    assert all(1 <= len(answer.arrivals) == len(answer.gaps_s) + 1 <= (len(answer.tokens) + 1) // 2 for answer in done.answers)
    assert done.output_tokens == 22
    assert not done.failed
    assert _Handler.most <= 2
    first = done.first_token_ms(50)
    assert first is not None
    assert 0 < first < 1000 * done.seconds


def test_what_comes_at_once_is_one_delivery(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([1.0, 1.0004, 1.0011, 1.5])
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    answer = Answer(0.5)
    for token in range(4):
        _take(answer, [b"", f'data: {{"choices": [{{"token_ids": [{token}]}}]}}'.encode(), b"data: [DONE]"])
    assert answer.tokens == [0, 1, 2, 3]
    assert answer.arrivals == [1.0, 1.0011, 1.5]
    assert answer.first_token_s == 0.5


def test_what_fails_is_told() -> None:
    with server() as url:
        done = run(url, [body(Job([13], 2)), body(Job([14], 2)), body(Job([1], 2)), body(Job([1], 2), max_tokens=3)], 4)
    assert [answer.error for answer in done.answers] == ["HTTP 400: unlucky", "the engine died", "", ""]
    gone = run("http://127.0.0.1:9", [body(Job([1], 2))], 1)
    assert gone.failed[0].error.startswith("ConnectError")
    assert gone.first_token_ms(50) is None


# --- the command ----------------------------------------------------------------------------------------------------


def test_the_settings_are_those_of_rayline_serve() -> None:
    config = config_of(["some/model", "--tp", "2", "--kv-memory", "4MiB"])
    assert (config.model, config.tp, config.kv_memory) == ("some/model", 2, 4 << 20)
    with pytest.raises(ConfigError, match="tp is 0"):
        config_of(["some/model", "--tp", "0"])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--grids", "2x2"], "is no grid"),
        (["--serve", "--no-such-option 3"], "no-such-option"),
        (["--serve", "--max-num-seqs 0"], "max_num_seqs is 0"),
        (["--prompt-tokens", "2000"], "fits the model's 1024 tokens"),
        (["no/such/model"], "no/such/model"),
    ],
)
def test_what_the_user_can_mend_is_one_line(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster, "protect_ray", lambda environ: None)
    monkeypatch.setattr("signal.signal", lambda *_: None)
    with pytest.raises(SystemExit) as ended:
        cluster.main(words)
    assert ended.value.code == 2
    assert said in capsys.readouterr().err.splitlines()[-1]


def test_a_model_that_cannot_be_served_ends_with_what_was_said(tmp_path: Path) -> None:
    with pytest.raises(DeployError, match=r"config\.json"), deployed([str(tmp_path)]):
        raise AssertionError("it can't be served")
