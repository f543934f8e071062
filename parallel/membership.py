"""A rank's way into its engine's mesh: it says where it is, learns where the others are, and forms groups with them."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

from cluster.config import ConfigError
from parallel.groups import SOLO_GROUP, Group, make_group
from parallel.mesh import SOLO, Seat

if TYPE_CHECKING:
    import torch
    from torch.distributed import Store  # type: ignore[attr-defined]


@dataclass(frozen=True)
class Peers:
    """What a rank knows of the others once all have joined."""

    stage: Group = SOLO_GROUP
    """The tensor-parallel ranks of its stage, by tp_rank."""
    column: Group = SOLO_GROUP
    """The ranks of all stages with its tp_rank, by stage."""
    mailboxes: tuple[str, ...] = ("",)
    """By rank."""
    neighbours: int = 0
    """Other ranks on this rank's node."""


NO_PEERS = Peers()
"""One rank alone."""


@dataclass(frozen=True)
class Membership:
    """One rank's place in the mesh of one epoch."""

    seat: Seat = SOLO
    store: "Store | None" = None
    """Shared by the ranks of this epoch alone; None where there is one rank only."""
    host: str = "127.0.0.1"
    """This node's own address, as the other ranks' nodes reach it."""
    mailbox: str = ""
    """Address of the rank's mailbox."""
    wait_s: float = 600.0
    """How long to wait for ranks that have not come yet."""

    def join(self, device: "torch.device", timeout_s: float, terms: Mapping[str, str] = {}) -> Peers:
        """Returns when all ranks have joined. timeout_s: for each exchange between ranks from then on.

        terms: what must be the same on all ranks, for what they exchange is not described on the way. Raises ConfigError where it
        is not, torch.distributed.DistError or RuntimeError when the others don't come in time.
        """
        if self.store is None:
            return Peers(mailboxes=(self.mailbox,))
        seat, mesh = self.seat, self.seat.mesh
        self.store.set(f"rank{seat.rank}", json.dumps([self.host, self.mailbox, dict(terms)]))
        keys = [f"rank{rank}" for rank in range(mesh.size)]
        self.store.wait(keys, timedelta(seconds=self.wait_s))
        hosts, mailboxes, all_terms = zip(*(json.loads(self.store.get(key)) for key in keys), strict=True)
        for rank, theirs in enumerate(all_terms):
            for name, value in terms.items():
                if theirs.get(name) != value:
                    raise ConfigError(
                        f"rank {seat.rank} on {self.host} has {name} {value}, but rank {rank} on {hosts[rank]} {theirs.get(name)}"
                    )
        stage = make_group(f"tp{seat.stage}", self.store, seat.tp_rank, mesh.tp, device, self.host, timeout_s)
        column = make_group(f"pp{seat.tp_rank}", self.store, seat.stage, mesh.pp, device, self.host, timeout_s, line=True)
        return Peers(stage, column, mailboxes, hosts.count(self.host) - 1)


ALONE = Membership()
"""A model that is not divided."""
