"""Hypothesis profiles: `make test` draws the same examples every time, `make fuzz` new and many more. And how tests are shared out
between two processes: those that start Ray stay together, so that they share its start."""

import pytest
from hypothesis import HealthCheck, Phase, settings

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


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """One group, run by one process, of all tests that start Ray."""
    for item in items:
        if item.get_closest_marker("serve") is not None:
            item.add_marker(pytest.mark.xdist_group("serve"))
