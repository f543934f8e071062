"""Hypothesis profiles: `make test` draws the same examples every time, `make fuzz` new and many more. And how tests are shared out
between two processes: those that start Ray stay together, so that they share its start."""

from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from xdist.scheduler import LoadScopeScheduling

# Shrinking a simulation that hangs costs minutes and helps little: the failing example is printed as it was drawn.
_COMMON = {
    "deadline": None,
    "suppress_health_check": list(HealthCheck),
    "phases": [Phase.explicit, Phase.generate],
    "print_blob": True,
}
settings.register_profile("test", max_examples=100, derandomize=True, **_COMMON)  # type: ignore[arg-type]
settings.register_profile("fuzz", max_examples=2000, **_COMMON)  # type: ignore[arg-type]
settings.load_profile("test")


def examples(count: int) -> settings:
    """Settings for a test that draws `count` examples in `make test`, and as many times more in `make fuzz` as others do."""
    return settings(max_examples=max(1, count * settings.default.max_examples // 100))  # type: ignore[union-attr]


class _RayTogether(LoadScopeScheduling):  # type: ignore[misc]
    """Gives each process a test at a time, but all that start Ray to one."""

    def _split_scope(self, nodeid: str) -> str:
        return "serve" if nodeid.startswith(("tests/serve/", "tests/deploy/")) else str(nodeid)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> _RayTogether:
    """For -n. (pytest-xdist 3.8 does not see groups under pytest 9.2: it writes to an attribute that is not read any more.)"""
    return _RayTogether(config, log)
