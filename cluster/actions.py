"""What a state machine wants done: the shell around it carries it out."""

from dataclasses import dataclass
from typing import Generic, TypeVar

Message = TypeVar("Message", covariant=True)


@dataclass(frozen=True)
class Send(Generic[Message]):
    """Put a message into the mailbox at `address`."""

    address: str
    message: Message


@dataclass(frozen=True)
class StartWorkers:
    """Start all ranks for `epoch`; each will answer WorkerReady or WorkerFailed to the engine's address."""

    epoch: int


@dataclass(frozen=True)
class KillWorkers:
    """Kill all ranks of `epoch` and make sure that they are dead, frozen ones too."""

    epoch: int
    reason: str


@dataclass(frozen=True)
class KillEngine:
    """End the process of the engine of this name, which does not speak any more, so that it is started anew."""

    engine: str
