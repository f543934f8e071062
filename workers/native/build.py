"""The native kernels as a shared library: built once by the system's C++ compiler and kept in the user's cache.

A build is known by its sources, its flags, the compiler and the CPU, so that a changed one of these gives another file. Processes
that build the same at the same time do it twice and keep one: a file comes into its place whole.
"""

import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

SOURCE = Path(__file__).parent / "native.cpp"
FLAGS = ("-std=c++17", "-O2", "-ffp-contract=off", "-fno-math-errno", "-fPIC", "-shared", "-pthread", "-Wno-psabi")
"""Products and sums are joined where the sources say so and nowhere else: what a compiler chose could differ between two copies of
a kernel, and with it the bits of a row."""
OWN_CPU = ("-march=native",)
_TIMEOUT_S = 300


class BuildError(RuntimeError):
    """There is no compiler, or it gave up: the first line of what it said."""


def build(cpu: Sequence[str] = OWN_CPU, extra: Sequence[str] = ()) -> Path:
    """The library for a CPU that runs code compiled with the flags `cpu`; `extra` flags are for debugging. Raises BuildError."""
    compiler = shlex.split(os.environ.get("CXX", "")) or ["c++"]
    if shutil.which(compiler[0]) is None:
        raise BuildError(f"no C++ compiler: {compiler[0]} is not there")
    flags = [*FLAGS, *cpu, *extra]
    target = _cache() / f"native-{_digest(compiler, flags)}.so"
    if not target.exists():
        _compile([*compiler, *flags, str(SOURCE)], target)
    return target


def _compile(command: list[str], target: Path) -> None:
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            made = Path(folder) / target.name
            done = subprocess.run([*command, "-o", str(made)], capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
            if done.returncode != 0:
                lines = (
                    [line for line in done.stderr.splitlines() if "error" in line]
                    or done.stderr.splitlines()
                    or ["no reason given"]
                )
                raise BuildError(f"{command[0]} failed: {lines[0]}")
            made.replace(target)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"{command[0]} could not be run: {error}") from None


def _digest(compiler: list[str], flags: list[str]) -> str:
    found = hashlib.sha256(repr((compiler, flags, _cpu())).encode())
    version = subprocess.run([*compiler, "--version"], capture_output=True, check=False, timeout=_TIMEOUT_S).stdout
    found.update(version)
    for file in [*sorted(SOURCE.parent.glob("*.h")), SOURCE]:
        found.update(file.name.encode() + b"\0" + file.read_bytes())
    return found.hexdigest()[:20]


def _cpu() -> str:
    """What -march=native depends on."""
    wanted = ("vendor_id", "cpu family", "model\t", "flags", "Features", "CPU part")
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return "\n".join(sorted({line for line in lines if line.startswith(wanted)}))


def _cache() -> Path:
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "rayline"
