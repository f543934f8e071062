"""The native kernels for other CPUs than this one."""

import hashlib
import platform
from pathlib import Path

import pytest

from workers.native.library import Library

X86 = platform.machine() == "x86_64"
EMULATION = Path(__file__).parent / "emulated_avx512.h"


def built_for(instructions: str) -> Library:
    """Kernels for other instructions than this CPU's, as far as it runs them; AVX-512 is emulated."""
    own = Library()
    if own.instructions == instructions:
        return own
    if not X86 or (instructions != "portable" and own.instructions == "portable"):
        pytest.skip("not for this CPU")
    if instructions in ("portable", "avx2"):
        return Library(("-march=x86-64" if instructions == "portable" else "-march=x86-64-v3",))
    version = hashlib.sha256(EMULATION.read_bytes()).hexdigest()[:8]
    extra = [
        "-O1",
        "-include",
        str(EMULATION),
        f"-DEMULATION=0x{version}",
        *(["-DEMULATE_BF16"] if instructions == "avx512-bf16" else []),
    ]
    return Library(("-march=x86-64-v3",), extra)
