"""The router stays light."""

import subprocess
import sys
from pathlib import Path

_ROOT = Path(__file__).parents[2]

_SCRIPT = """
import importlib, pathlib, sys
for file in sorted(pathlib.Path("router").glob("*.py")):
    if file.stem != "app":
        importlib.import_module("router" if file.stem == "__init__" else f"router.{file.stem}")
heavy = {"torch", "transformers", "ray", "kv", "workers", "parallel"}
print(*sorted(heavy & {name.partition(".")[0] for name in sys.modules}))
"""


def test_router_imports_neither_torch_nor_ray() -> None:
    done = subprocess.run([sys.executable, "-c", _SCRIPT], capture_output=True, text=True, timeout=60, check=False, cwd=_ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []
