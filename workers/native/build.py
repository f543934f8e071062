"""The native kernels as a shared library: built once by the system's C++ compiler and kept in the user's cache.

A build is known by its sources, its flags, the compiler and the CPU, so that a changed one of these gives another file. Processes
that build the same at the same time do it twice and keep one: a file comes into its place whole.
"""

import functools
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
    """The library for a CPU that runs code compiled with the flags `cpu`; `extra` flags are for debugging. Raises BuildError.

    A compiler that does not know the own CPU is asked for what all CPUs of the kind run.
    """
    try:
        compiler = shlex.split(os.environ.get("CXX", "")) or ["c++"]
        if shutil.which(compiler[0]) is None:
            raise BuildError(f"no C++ compiler: {compiler[0]} is not there")
        try:
            return _built(compiler, [*FLAGS, *cpu, *extra])
        except BuildError:
            if cpu != OWN_CPU:
                raise
            return _built(compiler, [*FLAGS, *extra])
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        raise BuildError(f"the native kernels could not be built: {error}") from None


def _built(compiler: list[str], flags: list[str]) -> Path:
    """A file's name has its size, so that one that was cut off is not taken."""
    cache, name = _cache(), f"native-{_digest(compiler, flags)}"
    for found in cache.glob(f"{name}-*.so"):
        if found.stem.endswith(f"-{found.stat().st_size}"):
            return found
        found.unlink()
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        made = Path(folder) / "made.so"
        command = [*compiler, *flags, str(SOURCE), "-o", str(made)]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=_TIMEOUT_S, check=False)
        if done.returncode != 0:
            lines = (
                [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines() or ["no reason given"]
            )
            raise BuildError(f"{compiler[0]} failed: {lines[0]}")
        return made.replace(cache / f"{name}-{made.stat().st_size}.so")


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
    """The user's own; where that can't be written, or others could write there, one that lasts as long as the process."""
    root = os.environ.get("XDG_CACHE_HOME", "")
    try:
        cache = (Path(root) if os.path.isabs(root) else Path.home() / ".cache") / "rayline"
        cache.mkdir(mode=0o700, parents=True, exist_ok=True)
        about = cache.stat()
        if about.st_uid == os.geteuid() and not about.st_mode & 0o022 and os.access(cache, os.W_OK):
            return cache
    except (OSError, RuntimeError):  # no home
        pass
    return Path(_own_folder().name)


@functools.cache
def _own_folder() -> "tempfile.TemporaryDirectory[str]":
    return tempfile.TemporaryDirectory(prefix="rayline-")
