"""Install peers, each in an environment of its own, and prepare models for them.

    python -m bench.peers.install [NAME ...] [--into build/peers] [--model DIR]

NAME: vllm, openvino, llamacpp, transformers (default: all). What is there already is left as it is; an installation that was broken
off begins again. With --model, which can be given several times, a Hugging Face directory is also written in the formats that the
named peers read: OpenVINO's IR (by optimum-intel, in an environment `export` of its own) and GGUF. pip, venv and, for tcmalloc,
apt-get do the work, with the indexes that they are set up with. llama.cpp is compiled here, for this CPU: a quarter of an hour on
two cores. Everything runs at the lowest priority; --jobs says how many compilers run at a time.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from bench import options
from bench.peers.gguf_model import ConversionError, architecture
from bench.peers.known import EXPORT, FOLDER, KNOWN, SOURCE, STAMP, Environment, Known, fingerprint, prepared, read_json, stamp_of

VERSION = "3.11"
"""Of Python: the one that all peers have packages for."""
LOG_LINES = 12


class InstallError(RuntimeError):
    """A step that failed; with the end of what it said."""


def find_python() -> str:
    """An interpreter of VERSION. Raises InstallError."""
    if f"{sys.version_info.major}.{sys.version_info.minor}" == VERSION:
        return sys.executable
    found = shutil.which(f"python{VERSION}")
    if found is None:
        raise InstallError(f"peers need Python {VERSION}, and there is no python{VERSION} on the PATH; name one with --python")
    return found


class Installer:
    """Installs below one folder. Every command's output goes to a log there."""

    def __init__(self, into: Path, python: str, jobs: int, say: Callable[[str], None]) -> None:
        self._into, self._python, self._jobs, self._say = into, python, jobs, say

    def install(self, environment: Environment) -> None:
        """One environment, unless it is complete. Raises InstallError."""
        folder = environment.folder(self._into)
        if environment.complete(self._into):
            self._say(f"{environment.name}: there already")
            return
        self._say(f"{environment.name}: installing {' '.join(environment.requirements)} in {folder}")
        (folder / STAMP).unlink(missing_ok=True)
        self._run(environment.name, [self._python, "-m", "venv", "--clear", str(folder)])
        pip = [str(environment.python(self._into)), "-m", "pip"]
        build = {"CMAKE_BUILD_PARALLEL_LEVEL": str(self._jobs), "MAX_JOBS": str(self._jobs), **environment.build}
        self._run(environment.name, [*pip, "install", *environment.requirements], build)
        if environment.without:
            self._run(environment.name, [*pip, "uninstall", "--yes", *environment.without])
        for package in environment.debian:
            self._unpack(package, folder / "debian")
        (folder / STAMP).write_text(json.dumps(environment.stamp) + "\n", encoding="utf-8")

    def prepare(self, peer: Known, model: Path) -> None:
        """What a peer reads, of a Hugging Face directory. Raises InstallError."""
        if not peer.reads:
            return
        read = prepared(self._into, model) / peer.reads
        if read.exists() and read_json(stamp_of(read)) == fingerprint(model):
            self._say(f"{peer.name}: {model} is prepared already")
            return
        self._say(f"{peer.name}: writing {read}")
        stamp_of(read).unlink(missing_ok=True)
        read.parent.mkdir(parents=True, exist_ok=True)
        if peer.reads.endswith(".gguf"):
            self._to_gguf(peer, model, read)
        else:
            self._to_openvino(model, read)
        stamp_of(read).write_text(json.dumps(fingerprint(model)) + "\n", encoding="utf-8")

    def _to_gguf(self, peer: Known, model: Path, read: Path) -> None:
        python = peer.environment.python(self._into)
        words = [str(python), str(SOURCE / "gguf_model.py"), str(model), str(read), read.name.removesuffix(".gguf")]
        self._run(f"{peer.name}-model", words)

    def _to_openvino(self, model: Path, read: Path) -> None:
        self.install(EXPORT)
        shutil.rmtree(read, ignore_errors=True)
        command = EXPORT.folder(self._into) / "bin" / "optimum-cli"
        task = ["--task", "text-generation-with-past", "--weight-format", "fp16"]
        self._run("openvino-model", [str(command), "export", "openvino", "--model", str(model), *task, str(read)])

    def _unpack(self, package: str, folder: Path) -> None:
        """A Debian package's files, without installing it. It is not needed: that it can't be had is said only."""
        folder.mkdir(exist_ok=True)
        try:
            self._run(package, ["apt-get", "download", package], where=folder)
            for file in folder.glob("*.deb"):
                self._run(package, ["dpkg", "-x", file.name, "."], where=folder)
        except InstallError as error:
            self._say(f"left out: {package} (try apt-get update): {error}")

    def _run(
        self, name: str, command: Sequence[str], environment: Mapping[str, str] | None = None, where: Path | None = None
    ) -> None:
        """Raises InstallError."""
        self._into.mkdir(parents=True, exist_ok=True)
        path = self._into / f"{name}.log"
        try:
            with path.open("ab") as log:
                log.write(f"\n$ {' '.join(command)}\n".encode())
                log.flush()
                done = subprocess.run(
                    ["nice", "-n", "19", *command],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    env={**os.environ, "HF_HUB_OFFLINE": "1", **(environment or {})},
                    cwd=where,
                    check=False,
                )
        except OSError as error:
            raise InstallError(f"{command[0]} does not run: {error.strerror}") from error
        if done.returncode:
            lines = [line for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
            end = "\n    ".join(line[:300] for line in lines[-LOG_LINES:])
            raise InstallError(f"{' '.join(command[:4])} ... ended with {done.returncode}; {path} ends:\n    {end}")


def check_model(model: Path) -> None:
    """Raises InstallError where it is none that can be prepared."""
    config = read_json(model / "config.json")
    if config is None:
        raise InstallError(f"{model} is no Hugging Face directory: it has no config.json")
    if not list(model.glob("*.safetensors")):
        raise InstallError(f"{model} has no safetensors")
    try:
        architecture(config)
    except ConversionError as error:
        raise InstallError(f"{model}: {error}") from error


def run(installer: Installer, names: Iterable[str], models: Sequence[Path], say: Callable[[str], None]) -> int:
    """All of them; how many failed. One that fails keeps no other from being installed."""
    failed = 0
    for name in names:
        try:
            installer.install(KNOWN[name].environment)
            for model in models:
                installer.prepare(KNOWN[name], model)
        except InstallError as error:
            failed += 1
            say(f"FAILED: {name}: {error}")
    return failed


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; 1 where something could not be installed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"{', '.join(KNOWN)} (default: all)")
    parser.add_argument("--into", type=Path, default=FOLDER, metavar="DIR", help="(default: %(default)s)")
    parser.add_argument("--model", type=Path, action="append", default=[], metavar="DIR", help="prepare this model too")
    parser.add_argument("--python", metavar="PROGRAM", help=f"of version {VERSION} (default: this one, or that of the PATH)")
    parser.add_argument("--jobs", type=options.positive, default=1, help="compilers at a time (default: %(default)s)")
    arguments = parser.parse_args(argv)
    if unknown := sorted(set(arguments.names) - set(KNOWN)):
        parser.error(f"no such peer: {', '.join(unknown)}; there are {', '.join(KNOWN)}")

    def say(text: str) -> None:
        print(text, flush=True)

    try:
        for model in arguments.model:
            check_model(model)
        installer = Installer(arguments.into, arguments.python or find_python(), arguments.jobs, say)
    except InstallError as error:
        parser.error(str(error))
    return 1 if run(installer, arguments.names or list(KNOWN), arguments.model, say) else 0


if __name__ == "__main__":
    sys.exit(main())
