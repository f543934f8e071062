"""KV on its way from one engine to another: engine <-> engine, engine <-> workers. The KV itself goes from rank to rank.

destination --Pull--> source --Pulled--> destination
                      source --Give--> each of its ranks ===KV===> each rank of the destination <--Take-- destination
                      source <--Moved-- each of its ranks          each rank of the destination --Moved--> destination
"""

from typing import Literal

from cluster.protocol.base import Wire

PullRefusal = Literal["gone", "layout", "busy"]


class PullSource(Wire):
    """An engine that has more of a prompt's KV than the one that is to compute it."""

    engine: str
    epoch: int
    address: str
    num_blocks: int
    """That it has of the prompt, from its beginning, as far as is known."""


class Pull(Wire, tag=True, kw_only=True):
    """Engine -> engine: give me the KV of these tokens."""

    pull: str
    """Its name, never used twice in a cluster, and not to be guessed."""
    epoch: int
    """Of the engine asked."""
    peer: str
    """Who asks: its name and its epoch."""
    reply_to: str
    tokens: bytes
    """Packed (kv.names.pack): those of the blocks that are wanted, and one more."""
    salt: str
    first_block: int
    """The blocks before it are not wanted."""
    layout: list[str]
    """By rank: what its pool is like. It has to be the same on both sides."""
    stores: list[str]
    """By rank: where the two ranks meet (parallel.rendezvous)."""


class Pulled(Wire, tag=True):
    """Engine -> engine, in answer to Pull: the KV of the blocks up to `num_blocks` is on its way, or why nothing is."""

    pull: str
    num_blocks: int
    refused: PullRefusal | None = None


class Give(Wire, tag=True, kw_only=True):
    """Engine -> each of its workers: send these blocks to the rank of another engine that has yours there."""

    epoch: int
    pull: str
    peer: str
    """The other engine and its epoch."""
    store: str
    blocks: list[int]
    after: int
    """Not before this step has been run here: it may still write them. -1: at once."""
    within_s: float
    """If it is not done by then, it has failed."""


class Take(Wire, tag=True, kw_only=True):
    """Engine -> each of its workers: receive so many blocks from the rank of another engine that has yours there."""

    epoch: int
    pull: str
    peer: str
    store: str
    blocks: list[int]
    after: int
    """Not before this step has been run here: it may still read what was in them before."""
    within_s: float


class Moved(Wire, tag=True, kw_only=True):
    """Worker -> its engine: a Give or Take has ended; its blocks are not read or written any more."""

    epoch: int
    rank: int
    pull: str
    seconds: float
    """That the KV was on its way, without the time it took to meet."""
    error: str = ""
