"""What the tests of this folder share: models, native kernels."""

from pathlib import Path

import pytest

from tests import threads
from tests.workers.builds import built_for
from tests.workers.models import KINDS, TinyModel, make_model
from workers.native.library import Library

one_thread = pytest.fixture(scope="session", autouse=True)(threads.one_thread)


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, TinyModel]:
    """One model of each kind."""
    root: Path = tmp_path_factory.mktemp("models")
    return {kind: make_model(root / kind, kind) for kind in KINDS}


@pytest.fixture(scope="module", params=["avx512-bf16", "avx512", "avx2", "portable"])
def library(request: pytest.FixtureRequest) -> Library:
    """Kernels for all kinds of CPUs."""
    made = built_for(request.param)
    assert made.instructions == request.param
    return made
