"""Finding an application's actors by their names."""

import logging
import re
import threading
import time
from typing import Any

import ray

SCHEDULER = "scheduler"
"""The scheduler's name; every other actor of the namespace is an engine."""
_PERIOD_S = 5.0
_ANSWER_S = 10.0

log = logging.getLogger(__name__)


def find_actor(name: str, lease: str) -> Any | None:
    """A handle to the actor of this name in the namespace `lease`, or None."""
    try:
        return ray.get_actor(name, namespace=lease)
    except ValueError:
        return None


def named_actors(lease: str) -> list[str]:
    """Names of the actors in the namespace `lease`."""
    return [actor["name"] for actor in ray.util.list_named_actors(all_namespaces=True) if actor["namespace"] == lease]


def leases_of(application: str) -> list[str]:
    """Namespaces of the sets of actors that exist for the application of this name."""
    spaces = {actor["namespace"] for actor in ray.util.list_named_actors(all_namespaces=True)}
    return sorted(space for space in spaces if re.fullmatch(re.escape(application) + "-[0-9a-f]{8}", space))


class Finder:
    """Keeps looking where the application's scheduler is, in a thread: it may come back on another node."""

    def __init__(self, lease: str) -> None:
        self.address: str | None = None
        """Of the scheduler's mailbox, as last heard."""
        self._lease = lease
        self._missing_since: float | None = None
        threading.Thread(target=self._run, name="finder", daemon=True).start()

    @property
    def missing_s(self) -> float:
        """For how long there has been no scheduler. One that is dead and will be started again is not missing."""
        since = self._missing_since
        return 0.0 if since is None else time.monotonic() - since

    def _run(self) -> None:
        while True:
            time.sleep(_PERIOD_S)
            try:
                self._look()
            except Exception as error:  # between two lives, or slow, or Ray itself is: the next look will tell
                log.info("the scheduler could not be looked up: %s", error)

    def _look(self) -> None:
        actor = find_actor(SCHEDULER, self._lease)
        if actor is None:
            self._missing_since = self._missing_since or time.monotonic()
            return
        self._missing_since = None
        self.address = ray.get(actor.address.remote(), timeout=_ANSWER_S)
