"""Each exchange between ranks that serving uses, with known values: is what arrives right, and how long does it take?

The groups are formed as those of a served model (parallel.membership), gloo on CPUs and NCCL on CUDA. Per mesh of tp x pp ranks:

    all_reduce   sum over the tensor-parallel ranks of a stage (parallel.linear, parallel.vocabulary)
    all_gather   their parts side by side (parallel.vocabulary)
    hand-over    plan after plan through all stages by parallel.handoff
    in turn      the three of them by turns, as a step does: both groups of a rank in use at once

Nothing but fp32 and half precision is ever exchanged, so there are no integers here. This file knows nothing of Ray: what starts
the ranks and has them all run the same case at once may be Ray (bench.ranks), threads or processes.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor

from bench.report import Cell
from parallel.groups import Group
from parallel.handoff import Handoff
from parallel.membership import Membership
from parallel.mesh import Mesh

ALL_REDUCE, ALL_GATHER, HAND_OVER, IN_TURN = "all_reduce", "all_gather", "hand-over", "in turn"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
SIZES = ((1, 8192), (3, 1001), (64, 8192), (512, 8192))
"""Rows and features. One size divides by nothing."""
COLUMNS = ["ranks (tp x pp)", "exchange", "dtype", "rows", "features", "us", "GB/s"]
_WARM = 2
_LARGE = 1 << 20
"""Bytes from which on fewer repetitions do."""


class ExchangeError(RuntimeError):
    """An exchange that gave wrong values or did not end; its text begins with the exchange's name."""


@dataclass(frozen=True)
class Case:
    """One exchange of one size."""

    exchange: str
    dtype: str
    rows: int
    features: int

    def __str__(self) -> str:
        return f"{self.exchange} of {self.rows} x {self.features} {self.dtype}"

    @property
    def num_bytes(self) -> int:
        """Of one rank's tensor."""
        return self.rows * self.features * DTYPES[self.dtype].itemsize

    @property
    def repetitions(self) -> int:
        """That count; a few more come before."""
        return 20 if self.num_bytes < _LARGE else 3


@dataclass(frozen=True)
class Outcome:
    """What one rank has to say of a case."""

    seconds: Sequence[float] = ()
    """Of each repetition; none where this rank does not see the end of it."""
    error: str = ""


@dataclass(frozen=True)
class Measured:
    """A case on a mesh, right and timed."""

    mesh: Mesh
    case: Case
    seconds: float
    """Median over repetitions, the slowest rank's; of plans through a pipeline, the mean time from one to the next."""

    @property
    def row(self) -> list[Cell]:
        """For a table with COLUMNS. GB/s are of one rank's tensor, whatever the algorithm sends."""
        case = self.case
        speed = case.num_bytes / self.seconds / 1e9
        return [f"{self.mesh.tp}x{self.mesh.pp}", case.exchange, case.dtype, case.rows, case.features, self.seconds * 1e6, speed]


def cases(mesh: Mesh, sizes: Sequence[tuple[int, int]] = SIZES) -> list[Case]:
    """All there are to check on `mesh`."""
    exchanges = [ALL_REDUCE, ALL_GATHER] if mesh.tp > 1 else []
    exchanges += [HAND_OVER] if mesh.pp > 1 else []
    exchanges += [IN_TURN] if mesh.tp > 1 and mesh.pp > 1 else []
    return [Case(exchange, dtype, *size) for exchange in exchanges for dtype in DTYPES for size in sizes]


def check(mesh: Mesh, todo: Sequence[Case], run: Callable[[Case], Sequence[Outcome]]) -> list[Measured]:
    """Have all ranks run the cases, one after the other. `run`: on all ranks at once, their outcomes by rank.

    Raises ExchangeError at the first one that fails, or for which `run` raises.
    """
    measured = []
    for case in todo:
        name = f"{case} over {mesh.tp}x{mesh.pp} ranks"
        try:
            outcomes = run(case)
        except Exception as error:
            reason = (str(error).strip().splitlines() or [repr(error)])[0]
            raise ExchangeError(f"{name}: {type(error).__name__}: {reason}") from error
        wrong = [f"rank {rank}: {outcome.error}" for rank, outcome in enumerate(outcomes) if outcome.error]
        if wrong:
            raise ExchangeError(f"{name}: {'; '.join(wrong)}")
        measured.append(Measured(mesh, case, max(median(outcome.seconds) for outcome in outcomes if outcome.seconds)))
    return measured


class Rank:
    """One rank's end of all exchanges."""

    def __init__(self, membership: Membership, device: torch.device, timeout_s: float) -> None:
        """Returns when all ranks have joined; timeout_s: for each exchange. Raises as Membership.join does."""
        self._seat = membership.seat
        self._device = device
        peers = membership.join(device, timeout_s)
        self._stage, self._column = peers.stage, peers.column

    def run(self, case: Case) -> Outcome:
        """The rank's part of a case; to be called on all ranks of the mesh with the same one."""
        parts = {
            ALL_REDUCE: self._all_reduce,
            ALL_GATHER: self._all_gather,
            HAND_OVER: self._hand_over,
            IN_TURN: self._in_turn,
        }
        try:
            return Outcome(parts[case.exchange](case))
        except Exception as error:
            return Outcome(error=f"{type(error).__name__}: {(str(error).strip().splitlines() or ['?'])[0]}")

    def _all_reduce(self, case: Case) -> list[float]:
        group = self._stage
        expected = self._sum(case)
        mine = self._pattern(case, group.rank)
        seconds = []
        for _ in range(_WARM + case.repetitions):
            x = mine.clone()
            began = self._now()
            summed = group.all_reduce(x)
            seconds.append(self._now() - began)
            self._same(summed, expected, "the sum")
        self._reals(case, group)
        return seconds[_WARM:]

    def _reals(self, case: Case, group: Group) -> None:
        """Sums that must be rounded: as near as that allows, and with the same bits on each rank."""
        parts = [self._noise(case, rank) for rank in range(group.size)]
        expected = sum(part.float() for part in parts)
        slack = sum(part.float().abs() for part in parts) * torch.finfo(parts[0].dtype).eps * group.size
        summed = group.all_reduce(parts[group.rank].clone())
        if not bool(((summed.float() - expected).abs() <= slack).all()):
            raise ValueError("a sum of random numbers is further off than rounding allows")
        for rank, theirs in enumerate(group.all_gather(summed)):
            self._same(theirs, summed, f"the sum on rank {rank}")

    def _all_gather(self, case: Case) -> list[float]:
        group = self._stage
        expected = torch.stack([self._pattern(case, rank) for rank in range(group.size)])
        seconds = []
        for _ in range(_WARM + case.repetitions):
            began = self._now()
            gathered = group.all_gather(expected[group.rank])
            seconds.append(self._now() - began)
            self._same(gathered, expected, "what was gathered")
        return seconds[_WARM:]

    def _hand_over(self, case: Case) -> list[float]:
        return self._chain(case, lambda hidden: None)

    def _in_turn(self, case: Case) -> list[float]:
        group = self._stage
        mine, total = self._pattern(case, group.rank), self._sum(case)

        def layer(hidden: Tensor) -> None:
            self._same(group.all_reduce(mine + hidden), total + group.size * hidden, "the sum")
            for rank, theirs in enumerate(group.all_gather(hidden)):
                self._same(theirs, hidden, f"what rank {rank} was handed")

        return self._chain(case, layer)

    def _chain(self, case: Case, layer: Callable[[Tensor], None]) -> list[float]:
        """Plans through all stages, as many known ahead as there are stages; in the last one, the mean time between two."""
        column = self._column
        handoff = Handoff(column, case.features, DTYPES[case.dtype], self._device)
        plans = range(1 + _WARM + case.repetitions)
        made = [self._pattern(case, plan) for plan in plans]
        received, arrivals = [], []
        for _ in range(min(column.size, len(plans))):
            handoff.expect(case.rows)
        self._together()
        for plan in plans:
            hidden = made[plan] if self._seat.first else handoff.receive(case.rows)
            if not self._seat.first and plan + column.size < len(plans):
                handoff.expect(case.rows)
            layer(hidden)
            arrivals.append(self._now())
            handoff.send(hidden)
            received.append(hidden)
        self._together()  # else what is still under way would go with its sender
        for plan in plans:
            self._same(received[plan], made[plan], f"plan {plan} as handed over")
        return [(arrivals[-1] - arrivals[_WARM]) / case.repetitions] if self._seat.last else []

    def _together(self) -> None:
        """Until all stages are here."""
        here = torch.ones(1, 1, device=self._device)
        if float(self._column.all_reduce(here)) != self._column.size:
            raise ValueError("the stages do not add up")

    def _sum(self, case: Case) -> Tensor:
        return sum((self._pattern(case, rank) for rank in range(1, self._stage.size)), self._pattern(case, 0))

    def _pattern(self, case: Case, salt: int) -> Tensor:
        """Whole numbers from -4 to 4: their sums are exact in every dtype, over up to 30 ranks in bf16."""
        rows = torch.arange(case.rows, device=self._device)[:, None]
        columns = torch.arange(case.features, device=self._device)
        return ((7 * rows + 3 * columns + 5 * salt) % 9 - 4).to(DTYPES[case.dtype])

    def _noise(self, case: Case, seed: int) -> Tensor:
        drawn = torch.Generator(self._device).manual_seed(seed)
        return torch.randn(case.rows, case.features, generator=drawn, device=self._device).to(DTYPES[case.dtype])

    def _now(self) -> float:
        """Seconds, when the device has done all it was given."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()

    @staticmethod
    def _same(found: Tensor, expected: Tensor, what: str) -> None:
        if not torch.equal(found, expected):
            wrong = int((found != expected).sum()) if found.shape == expected.shape else found.numel()
            raise ValueError(f"{what} is wrong in {wrong} of {expected.numel()} places")
