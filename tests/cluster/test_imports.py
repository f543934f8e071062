"""The control plane stays light: importing it loads neither torch nor transformers, nor Ray."""

import subprocess
import sys

import pytest

LIGHT = ["cluster.engine", "cluster.scheduler", "cluster.channel", "cluster.model", "kv.manager", "router.journal", "workers.fake"]


@pytest.mark.parametrize("module", LIGHT)
def test_imports_neither_torch_nor_ray(module: str) -> None:
    heavy = f"import sys, {module}; print(sorted({{'torch', 'transformers', 'ray'}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", heavy], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"


def test_the_actors_do_without_torch() -> None:
    code = "import sys, cluster.actors, cluster.launch, workers.worker; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "False"
