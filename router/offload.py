"""Work that would hold up the event loop is done beside it."""

import asyncio
from collections.abc import Callable
from typing import ParamSpec, TypeVar

INLINE = 1024
"""Work on up to so many characters, tokens or log-probabilities is done on the event loop (about a millisecond)."""

_P = ParamSpec("_P")
_R = TypeVar("_R")


async def offloaded(size: int, work: Callable[_P, _R], *args: _P.args, **kwargs: _P.kwargs) -> _R:
    """The result of work(...): at once where its size is small, else from a thread, so that other requests go on meanwhile."""
    return work(*args, **kwargs) if size <= INLINE else await asyncio.to_thread(work, *args, **kwargs)
