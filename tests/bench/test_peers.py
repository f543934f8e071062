"""Peers in processes of their own: what they are asked, what they answer, and how their end is told; how they are installed, and
what models become in the formats that they read."""

import json
import struct
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bench import peers
from bench.peers import Peer, PeerError, gguf_model, install, known, vllm_peer
from bench.peers.gguf_model import ConversionError, architecture, converted, interleaved, metadata, tensor_name, tensors
from bench.peers.install import Installer, InstallError
from bench.peers.known import KNOWN, Environment, Known, Setting
from bench.workload import Job
from cluster.model import DEMO_MODEL

JOBS = [Job([5, 6, 7], 4), Job([9], 2)]
ECHO = """
import json, subprocess, sys
answers = open(int(sys.argv[1]), "w")
helper = subprocess.Popen([sys.executable, "-c", "import time\\nwhile time.process_time() < 0.2: pass\\ntime.sleep(600)"])
print("noise on standard output", flush=True)
print("ready", file=answers, flush=True)
for line in sys.stdin:
    asked = json.loads(line)
    outputs = [(ids * n)[:n] for ids, n in zip(asked["prompts"], asked["output_tokens"])]
    print(json.dumps({"outputs": outputs}), file=answers, flush=True)
"""


def script(tmp_path: Path, text: str) -> str:
    (tmp_path / "peer.py").write_text(text)
    return str(tmp_path / "peer.py")


def test_a_peer_answers_and_leaves_no_process(tmp_path: Path) -> None:
    peer = Peer(script(tmp_path, ECHO), Path(sys.executable))
    assert peer.generate(JOBS) == peer.generate(JOBS) == [[5, 6, 7, 5], [9, 9]]
    end = time.monotonic() + 60
    while peer.cpu_s() < 0.2:  # its helper's, too
        assert time.monotonic() < end
    peer.close()
    assert peer.cpu_s() == 0.0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("import sys\nprint('loading')\nsys.exit('no such model')", "ended with 1: no such model"),
        ("raise SystemExit(3)", "ended with 3: it said nothing"),
    ],
)
def test_a_peer_that_does_not_start_says_why(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(PeerError, match=message):
        Peer(script(tmp_path, text), Path(sys.executable))


def test_a_peer_that_dies_later_says_why(tmp_path: Path) -> None:
    text = (
        "import sys\nprint('ready', file=open(int(sys.argv[1]), 'w'), flush=True)\nsys.stdin.readline()\nsys.exit('out of memory')"
    )
    peer = Peer(script(tmp_path, text), Path(sys.executable))
    with pytest.raises(PeerError, match="ended with 1: out of memory"):
        peer.generate(JOBS)
    peer.close()


def test_a_peer_that_does_not_answer_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "TIMEOUT_S", 0)
    with pytest.raises(PeerError, match="no answer in 0 s: "):
        Peer(script(tmp_path, "import sys\nsys.stdin.read()"), Path(sys.executable))


def test_an_interpreter_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(PeerError, match="nowhere/python does not run"):
        Peer("vllm_peer.py", tmp_path / "nowhere" / "python")


def test_a_peer_says_what_it_is(tmp_path: Path) -> None:
    told = ECHO.replace('"ready"', '\'ready {"name": "Echo 1", "computes": "int"}\'')
    peer = Peer(script(tmp_path, told), Path(sys.executable))
    assert peer.said == {"name": "Echo 1", "computes": "int"}
    assert peer.generate(JOBS[:1]) == [[5, 6, 7, 5]]
    peer.close()


def test_a_paused_peer_takes_no_cpu_and_goes_on(tmp_path: Path) -> None:
    spinning = ECHO.replace("time.process_time() < 0.2", "True")
    peer = Peer(script(tmp_path, spinning), Path(sys.executable))
    end = time.monotonic() + 60
    while len(peer.pids()) < 2 or peer.cpu_s() < 0.2:
        assert time.monotonic() < end
    peer.pause()
    before = peer.cpu_s()
    time.sleep(0.2)
    assert peer.cpu_s() == before
    peer.resume()
    assert peer.generate(JOBS[:1]) == [[5, 6, 7, 5]]
    peer.pause()
    peer.close()
    assert peer.pids() == []


@pytest.mark.parametrize("name", ["rayline", *KNOWN])
def test_all_peers_take_the_same_words(name: str) -> None:
    """Those of Setting, after the descriptor and the model."""
    text = (known.SOURCE / (KNOWN[name].script if name in KNOWN else "rayline_peer.py")).read_text()
    positional = [line.split('"')[1] for line in text.splitlines() if line.strip().startswith('parser.add_argument("')]
    named = {"--prefix-cache", "--threads", "--kv-tokens"}
    assert positional[:5] == ["answers", "model", "dtype", "slots", "max_model_len"]
    assert set(positional[5:]) == named == {word for word in Setting(1, 2, 3, 4, True).words() if word.startswith("--")}


def test_vllms_kv_is_whole_gibibytes() -> None:
    config = json.loads((DEMO_MODEL / "config.json").read_text())
    token = 2 * 4 * config["num_hidden_layers"] * config["num_key_value_heads"] * config["head_dim"]
    assert vllm_peer.kv_gib(str(DEMO_MODEL), 1, "float32") == 1
    assert vllm_peer.kv_gib(str(DEMO_MODEL), 3 * 2**30 // token, "float32") == 3
    assert vllm_peer.kv_gib(str(DEMO_MODEL), 4 * 2**30 // token, "bfloat16") == 2


# --- starting -------------------------------------------------------------------------------------------------------

SETTING = Setting(8, 64, 512, 2, prefix_cache=True)


def installed(into: Path, name: str) -> Path:
    """An environment that is only said to be there."""
    environment = KNOWN[name].environment
    environment.folder(into).mkdir(parents=True)
    (environment.folder(into) / known.STAMP).write_text(json.dumps(environment.stamp))
    return environment.folder(into)


def test_what_is_missing_is_told_with_the_command_that_makes_it(tmp_path: Path) -> None:
    with pytest.raises(PeerError, match=r"not installed in .*: python -m bench\.peers\.install openvino --into"):
        known.start("openvino", tmp_path, DEMO_MODEL, SETTING)
    installed(tmp_path, "openvino")
    with pytest.raises(PeerError, match=r"not prepared for it: python -m bench\.peers\.install openvino .* --model .*demo"):
        known.start("openvino", tmp_path, DEMO_MODEL, SETTING)


def test_a_peer_gets_its_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    got: list[Any] = []
    monkeypatch.setattr(known, "Peer", lambda *words, environment: got.append((*words, environment)))
    installed(tmp_path, "llamacpp")
    read = known.prepared(tmp_path, DEMO_MODEL) / KNOWN["llamacpp"].reads
    read.parent.mkdir(parents=True)
    read.touch()
    known.stamp_of(read).write_text(json.dumps(known.fingerprint(DEMO_MODEL)))
    known.start("llamacpp", tmp_path, DEMO_MODEL, SETTING)
    named = ["--prefix-cache", "on", "--threads", "2", "--kv-tokens", "512"]
    assert got[0] == ("llamacpp_peer.py", tmp_path / "llamacpp/bin/python", str(read), "auto", "8", "64", *named, {})


def test_vllm_gets_both_cores_and_the_libraries_that_are_there(tmp_path: Path) -> None:
    folder = installed(tmp_path, "vllm")
    bound = {"OMP_NUM_THREADS": "2", "VLLM_CPU_OMP_THREADS_BIND": "0-1"}
    assert known.variables(KNOWN["vllm"], tmp_path, 2) == bound
    allocator, openmp = folder / "debian/usr/lib/libtcmalloc_minimal.so.4", folder / "lib/libiomp5.so"
    for library in (allocator, openmp):
        library.parent.mkdir(parents=True)
        library.touch()
    assert known.variables(KNOWN["vllm"], tmp_path, 2) == {**bound, "LD_PRELOAD": f"{allocator}:{openmp}"}
    assert known.variables(KNOWN["transformers"], tmp_path, 2) == {}


# --- installing -----------------------------------------------------------------------------------------------------


class Commands(Installer):
    """Runs nothing."""

    def __init__(self, into: Path) -> None:
        self.ran: list[list[str]] = []
        self.said: list[str] = []
        super().__init__(into, "python3.11", 1, self.said.append)

    def _run(self, name: str, command: Any, environment: Any = None, where: Path | None = None) -> None:
        self.ran.append(list(command))
        if "venv" in command:
            Path(command[-1]).mkdir(parents=True, exist_ok=True)
        if command[-1] == "impossible":
            raise InstallError("no such package")
        if "gguf_model.py" in " ".join(command):
            Path(command[3]).touch()


def test_an_environment_is_installed_once(tmp_path: Path) -> None:
    environment = Environment("tiny", ("a==1", "b==2"), without=("c",), debian=("impossible",))
    commands = Commands(tmp_path)
    commands.install(environment)
    python = str(tmp_path / "tiny/bin/python")
    assert commands.ran == [
        ["python3.11", "-m", "venv", "--clear", str(tmp_path / "tiny")],
        [python, "-m", "pip", "install", "a==1", "b==2"],
        [python, "-m", "pip", "uninstall", "--yes", "c"],
        ["apt-get", "download", "impossible"],
    ]
    assert commands.said[-1].startswith("left out: impossible")
    commands.install(environment)
    assert commands.said[-1] == "tiny: there already"
    commands.install(Environment("tiny", ("a==2",)))
    assert [words[-1] for words in commands.ran[4:]] == [str(tmp_path / "tiny"), "a==2"]


def test_a_model_is_prepared_again_when_it_changes(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    commands, peer = Commands(tmp_path), KNOWN["llamacpp"]
    commands.prepare(peer, model)
    commands.prepare(peer, model)
    assert len(commands.ran) == 1
    assert commands.said[-1].endswith("is prepared already")
    (model / "model.safetensors").touch()
    commands.prepare(peer, model)
    assert len(commands.ran) == 2
    commands.prepare(Known(Environment("any", ()), "any.py"), model)
    assert len(commands.ran) == 2


def test_a_step_that_fails_says_what_it_said(tmp_path: Path) -> None:
    installer = Installer(tmp_path, sys.executable, 1, print)
    with pytest.raises(InstallError, match=r"ended with 3; .*tiny\.log ends:\n +\$ .*\n +no room left"):
        installer._run("tiny", [sys.executable, "-c", "import sys; print('no room left'); sys.exit(3)"])
    with pytest.raises(InstallError, match="ended with"):
        installer._run("tiny", [str(tmp_path / "nowhere")])


def test_one_that_fails_keeps_no_other_from_being_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []

    def fails_for_vllm(self: Installer, environment: Environment) -> None:
        if environment.name == "vllm":
            raise InstallError("no such package")
        done.append(environment.name)

    monkeypatch.setattr(Installer, "install", fails_for_vllm)
    assert install.main(["vllm", "transformers", "--into", str(tmp_path)]) == 1
    assert done == ["transformers"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["ollama"], "no such peer: ollama; there are vllm"),
        (["vllm", "--model", "nowhere"], "nowhere is no Hugging Face directory"),
    ],
)
def test_bad_words_are_named(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        install.main(words)
    assert message in capsys.readouterr().err


def test_a_model_of_another_kind_is_named(tmp_path: Path) -> None:
    install.check_model(DEMO_MODEL)
    (tmp_path / "config.json").write_text('{"model_type": "mamba"}')
    with pytest.raises(InstallError, match="has no safetensors"):
        install.check_model(tmp_path)
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(InstallError, match="model type mamba is not one of llama, qwen3"):
        install.check_model(tmp_path)


# --- GGUF -----------------------------------------------------------------------------------------------------------

CONFIG = {
    "model_type": "qwen3",
    "max_position_embeddings": 128,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 50_000},
    "vocab_size": 100,
}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("model.embed_tokens.weight", "token_embd.weight"),
        ("lm_head.weight", "output.weight"),
        ("model.norm.weight", "output_norm.weight"),
        ("model.layers.11.self_attn.k_norm.weight", "blk.11.attn_k_norm.weight"),
        ("model.layers.0.self_attn.q_proj.bias", "blk.0.attn_q.bias"),
        ("model.layers.0.post_attention_layernorm.weight", "blk.0.ffn_norm.weight"),
    ],
)
def test_tensor_names(name: str, expected: str) -> None:
    assert tensor_name(name) == expected


@pytest.mark.parametrize("name", ["model.layers.0.mlp.experts.0.weight", "model.layers.0", "visual.weight"])
def test_unknown_tensors_are_refused(name: str) -> None:
    with pytest.raises(ConversionError, match="has no name in GGUF"):
        tensor_name(name)


def test_metadata() -> None:
    made = metadata(CONFIG)
    assert made["attention.key_length"] == made["rope.dimension_count"] == 32
    assert made["rope.freq_base"] == 50_000.0
    assert isinstance(made["rope.freq_base"], float)
    old = {**CONFIG, "head_dim": None, "rope_parameters": None, "rope_theta": 500, "num_key_value_heads": None}
    assert metadata(old)["attention.value_length"] == 16
    assert metadata(old)["attention.head_count_kv"] == 4
    assert metadata(old)["rope.freq_base"] == 500.0


def test_other_models_are_refused() -> None:
    with pytest.raises(ConversionError, match="scaled rotary"):
        architecture({**CONFIG, "rope_parameters": {"rope_type": "llama3"}})
    with pytest.raises(ConversionError, match="model type None"):
        architecture({})


def test_llamas_queries_are_turned_alike_in_either_order() -> None:
    """Turning neighbours of the reordered rows is turning halves of the rows, reordered."""
    rows = np.arange(2 * 8, dtype=np.float32).reshape(16, 1) + 1
    first, second = np.split(rows.reshape(2, 8), 2, axis=1)
    halves = np.concatenate((-second, first), axis=1).reshape(16, 1)
    reordered = interleaved(rows, 2).reshape(2, 4, 2)
    neighbours = np.stack((-reordered[..., 1], reordered[..., 0]), axis=-1).reshape(16, 1)
    assert np.array_equal(neighbours, interleaved(halves, 2))
    name, weight = "model.layers.0.self_attn.q_proj.weight", np.arange(4 * 32 * 2, dtype=np.float32).reshape(4 * 32, 2)
    assert np.array_equal(converted(name, weight, {**CONFIG, "model_type": "llama"})[1], interleaved(weight, 4))
    assert np.array_equal(converted(name, weight, CONFIG)[1], weight)


def test_safetensors_are_read_as_fp32(tmp_path: Path) -> None:
    half = np.array([1.5, -2.0], np.float16).tobytes()
    brain = struct.pack("<2H", 0x3FC0, 0xC000)  # 1.5, -2.0
    header = {
        "__metadata__": {"format": "pt"},
        "a": {"dtype": "F16", "shape": [2, 1], "data_offsets": [0, 4]},
        "b": {"dtype": "BF16", "shape": [2], "data_offsets": [4, 8]},
    }
    text = json.dumps(header).encode()
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + half + brain)
    found = dict(tensors(tmp_path))
    assert found["a"].tolist() == [[1.5], [-2.0]]
    assert found["b"].tolist() == [1.5, -2.0]
    with pytest.raises(ConversionError, match="tensor c is I64"):
        gguf_model._float32(np.zeros(8, np.uint8), "I64", "c")


def test_every_tensor_of_the_demo_has_a_name_and_the_same_size() -> None:
    config = json.loads((DEMO_MODEL / "config.json").read_text())
    found = [(name, weight, *converted(name, weight, config)) for name, weight in tensors(DEMO_MODEL)]
    assert len({new for _, _, new, _ in found}) == len(found) > 0
    assert all(weight.shape == values.shape for _, weight, _, values in found)
