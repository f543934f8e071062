"""The demo model's text: the Python standard library, as documents, chats and tokens.

The corpus is the source text of the standard library of the running interpreter.
Nothing is downloaded: whoever has the same Python version has the same corpus.
"""

import ast
import hashlib
import json
import math
import platform
import sysconfig
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

END_OF_TEXT = "<|endoftext|>"
IM_START = "<|im_start|>"
IM_END = "<|im_end|>"
SPECIAL_TOKENS = [END_OF_TEXT, IM_START, IM_END]

# Tests and bundled wheels are left out as is usual; `encodings`, `pydoc_data` and
# the files below hold generated tables rather than code that somebody wrote.
EXCLUDED_FOLDERS = frozenset(
    {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__", "_bundled", "encodings", "pydoc_data"}
)
EXCLUDED_PREFIXES = ("_sysconfigdata", "config-", "lib-dynload")

HELD_OUT_PER_MILLE = 30

# One piece per alternative, tried in this order: a whole run of spaces (so that any
# indentation is one token, wherever a prompt is cut), newlines, a word or identifier
# with the space before it, a single digit, punctuation, and whatever is left.
PIECES = r" {2,}|\n+| ?[\p{L}\p{M}_]+| ?\p{N}| ?[^\s\p{L}\p{M}\p{N}_]+|\s"

SYSTEM_PROMPT = "You write Python."
LONGEST_FUNCTION = 1600
SHORTEST_FUNCTION = 60

GOLDEN = (math.sqrt(5) - 1) / 2


@dataclass(frozen=True)
class Document:
    """One source file: its path relative to the library's root, and its text."""

    path: str
    text: str


@dataclass(frozen=True)
class Corpus:
    """Training and held-out documents, each sorted by path; no file is in both."""

    training: tuple[Document, ...]
    held_out: tuple[Document, ...]

    def listing(self) -> dict[str, object]:
        """What `data.json` says: enough to see whether another corpus is the same one."""
        return {
            "python": platform.python_version(),
            "source": "standard library, *.py",
            "training": _summary(self.training),
            "held_out": _summary(self.held_out),
        }

    def write_listing(self, path: Path) -> None:
        path.write_text(json.dumps(self.listing(), indent=1) + "\n", encoding="utf-8")


def _summary(documents: Sequence[Document]) -> dict[str, object]:
    texts = [document.text.encode() for document in documents]
    return {
        "bytes": sum(map(len, texts)),
        "sha256": hashlib.sha256(b"\0".join(texts)).hexdigest(),
        "files": [document.path for document in documents],
    }


def standard_library() -> Path:
    """The folder that holds the running interpreter's standard library."""
    return Path(sysconfig.get_paths()["stdlib"])


def is_held_out(path: str) -> bool:
    """Whether a file is kept from training; depends on nothing but its relative path."""
    digest = hashlib.sha256(path.encode()).digest()
    return int.from_bytes(digest[:8], "big") % 1000 < HELD_OUT_PER_MILLE


def collect(root: Path) -> Corpus:
    """Read every eligible file under `root` and split it by the hash of its path."""
    training: list[Document] = []
    held_out: list[Document] = []
    for document in _documents(root):
        (held_out if is_held_out(document.path) else training).append(document)
    return Corpus(tuple(training), tuple(held_out))


def _documents(root: Path) -> Iterator[Document]:
    files = {path.relative_to(root).as_posix(): path for path in root.rglob("*.py")}
    for name in sorted(files):
        parts = name.split("/")
        if EXCLUDED_FOLDERS.intersection(parts) or parts[0].startswith(EXCLUDED_PREFIXES):
            continue
        try:
            text = files[name].read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        if text.strip():
            yield Document(name, text)


# ------------------------------------------------------------------ chat examples


def functions(document: Document) -> Iterator[tuple[str, str]]:
    """Name and dedented source of each function or method of moderate length."""
    try:
        tree = ast.parse(document.text)
    except (SyntaxError, ValueError):
        return
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        # Whole lines, so that the first line is indented like the rest.
        lines = document.text.splitlines()[node.lineno - 1 : node.end_lineno]
        source = textwrap.dedent("\n".join(lines))
        if SHORTEST_FUNCTION <= len(source) <= LONGEST_FUNCTION:
            yield node.name, source


def _request(kind: int, name: str, source: str) -> str:
    """One of a few ways in which a user may ask for this function."""
    if kind == 0:
        return f"Write a function called {name}."
    if kind == 1:
        return f"Write a Python function named {name}."
    if kind == 2:
        return f"Show me the code of {name}."
    if kind == 3:
        return f"How do I write {name} in Python?"
    lines = source.splitlines()
    head = "\n".join(lines[: max(1, len(lines) // 3)])
    return f"Complete this code:\n{head}"


def render(messages: Iterable[tuple[str, str]]) -> str:
    """The chat template in Python: (role, content) pairs as one string."""
    return "".join(f"{IM_START}{role}\n{content}{IM_END}\n" for role, content in messages)


def chats(documents: Iterable[Document]) -> list[str]:
    """A short conversation for each function: a request, and its source as the answer.

    The answers end in `<|im_end|>`, from which the model learns where to stop. Kind of
    request and presence of a system message follow from a hash of the source, so that
    the examples are the same in every run.
    """
    examples: list[str] = []
    seen: set[bytes] = set()
    for document in documents:
        for name, source in functions(document):
            digest = hashlib.sha256(source.encode()).digest()
            if digest in seen:
                continue
            seen.add(digest)
            messages = [("system", SYSTEM_PROMPT)] if digest[1] % 4 == 0 else []
            messages += [("user", _request(digest[0] % 5, name, source)), ("assistant", source)]
            examples.append(render(messages))
    return examples


# ---------------------------------------------------------------------- tokenizer


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE tokenizer learnt from `texts`; any text at all can be encoded."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


# ------------------------------------------------------------------- token streams


def stream(tokenizer: Tokenizer, texts: Iterable[str]) -> Tensor:
    """All texts as one run of token ids [n], int32, each followed by end of text."""
    ids: list[int] = []
    for encoding in tokenizer.encode_batch(list(texts)):
        ids += encoding.ids
        ids.append(0)
    return torch.tensor(ids, dtype=torch.int32)


class Rows:
    """Training rows, cut from the token streams without any state but a counter.

    Row n starts at the fractional part of n times the golden ratio, along the stream:
    such points spread evenly over the corpus, however many are taken.
    """

    def __init__(self, tokenizer: Tokenizer, documents: Iterable[Document], chat_every: int) -> None:
        documents = tuple(documents)
        self.text = stream(tokenizer, (document.text for document in documents))
        self.chat = stream(tokenizer, chats(documents))
        self.chat_starts = torch.cat([torch.zeros(1, dtype=torch.long), (self.chat == 0).nonzero()[:-1, 0] + 1])
        self.chat_every = chat_every

    def row(self, number: int, length: int) -> Tensor:
        """Token ids [length]; text starts anywhere, chat at the start of a conversation."""
        where = (number * GOLDEN) % 1.0
        if number % self.chat_every == self.chat_every - 1:
            start = int(self.chat_starts[int(where * len(self.chat_starts))])
            return self.chat[(start + torch.arange(length)) % len(self.chat)]
        return self.text[int(where * (len(self.text) - length)) :][:length]

    def batch(self, first: int, rows: int, length: int) -> Tensor:
        """Token ids [rows, length] of the rows from number `first` on."""
        return torch.stack([self.row(first + index, length) for index in range(rows)]).long()


def main(folder: Annotated[Path, typer.Argument(help="Where to write the files: below training/ and held_out/.")]) -> None:
    """Write the corpus down, as files of text."""
    corpus = collect(standard_library())
    for name, documents in (("training", corpus.training), ("held_out", corpus.held_out)):
        for document in documents:
            file = folder / name / document.path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(document.text, encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
