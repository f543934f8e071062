"""The ranks of one engine as a grid: pipeline stages, each of several tensor-parallel ranks."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Mesh:
    """`pp` stages of `tp` ranks. Ranks count through a stage before they go on to the next: rank = stage * tp + tp_rank."""

    tp: int = 1
    pp: int = 1

    @property
    def size(self) -> int:
        """All ranks."""
        return self.tp * self.pp

    def seat(self, rank: int) -> "Seat":
        """The place of `rank`."""
        stage, tp_rank = divmod(rank, self.tp)
        return Seat(self, stage, tp_rank)


@dataclass(frozen=True)
class Seat:
    """One rank's place in a mesh."""

    mesh: Mesh
    stage: int = 0
    tp_rank: int = 0

    @property
    def rank(self) -> int:
        """Its number in the mesh."""
        return self.stage * self.mesh.tp + self.tp_rank

    @property
    def first(self) -> bool:
        """Whether its stage is the first: the one that embeds."""
        return self.stage == 0

    @property
    def last(self) -> bool:
        """Whether its stage is the last: the one that makes logits."""
        return self.stage == self.mesh.pp - 1

    @property
    def leader(self) -> bool:
        """Whether it leads its stage: it passes plans on, and in the last stage it draws tokens."""
        return self.tp_rank == 0

    @property
    def followers(self) -> list[int]:
        """Ranks that it passes plans on to: a leader to the next stage's leader, then to its own tensor-parallel peers."""
        if not self.leader:
            return []
        following = [] if self.last else [self.rank + self.mesh.tp]
        return following + list(range(self.rank + 1, self.rank + self.mesh.tp))


SOLO = Seat(Mesh())
"""The seat of a model that is not divided."""
