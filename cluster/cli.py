"""The `rayline` command. The engine's options are made from cluster.config.Config, so that names and help stand in one place."""

import ast
import dataclasses
import inspect
import json
import os
import secrets
import sys
import tempfile
import threading
import time
from collections.abc import Callable, MutableMapping
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import click
import yaml

from cluster.config import Config, ConfigError, Dtype, from_mapping, parse_bytes
from cluster.haproxy import choose_haproxy
from cluster.model import DEMO_MODEL, open_model
from cluster.schemes import UNCHANGED, parse_recipe
from parallel.mesh import Mesh
from parallel.partition import partition

Command = TypeVar("Command", bound=Callable[..., Any])


def main() -> None:
    """Entry point: one clear line and exit code 2 for what the user can mend, 130 after Ctrl-C."""
    try:
        cli.main(standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError as help_text:
        click.echo(help_text.format_message())
    except click.ClickException as error:
        sys.exit(_failed(error.format_message()))
    except ConfigError as error:
        sys.exit(_failed(str(error)))
    except (click.Abort, KeyboardInterrupt):
        sys.exit(130)


def _failed(message: str) -> int:
    click.echo(f"rayline: {' '.join(message.split())}", err=True)
    return 2


def _descriptions() -> dict[str, str]:
    """The docstrings that stand below Config's fields, first line each."""
    (definition,) = ast.parse(inspect.getsource(Config)).body
    assert isinstance(definition, ast.ClassDef)
    found = {}
    for field, text in zip(definition.body, definition.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(text, ast.Expr):
            assert isinstance(text.value, ast.Constant)
            found[field.target.id] = " ".join(str(text.value.value).split())
    return found


def engine_options(command: Command) -> Command:
    """Adds MODEL, --config and one option for each of Config's settings."""
    hints, descriptions = get_type_hints(Config), _descriptions()
    for field in reversed(dataclasses.fields(Config)):
        if field.name == "model":
            continue
        hint = hints[field.name]
        kind = hint if get_origin(hint) is Literal else next(part for part in get_args(hint) or (hint,) if part is not type(None))
        text = descriptions.get(field.name, "")
        default = "" if field.default is None else f"  [default: {field.default}]"
        option = f"--{field.name.replace('_', '-')}"
        choice = click.Choice(get_args(kind)) if get_origin(kind) is Literal else None
        type_ = choice or (str if field.name in ("kv_memory", "host_kv_memory", "stage_layers") else kind)
        command = click.option(option, field.name, type=type_, default=None, help=text + default)(command)
    command = click.option("--config", "config_file", type=click.Path(), help="YAML file with the same names.")(command)
    return click.argument("model", required=False)(command)


def resolve(model: str | None, config_file: str | None, options: dict[str, Any]) -> Config:
    """Config of file and command line; the command line wins. Without a model: the demo. Raises ConfigError."""
    values: dict[str, Any] = {"model": str(DEMO_MODEL), "served_model_name": "demo"}
    if config_file is not None:
        try:
            loaded = yaml.safe_load(Path(config_file).read_text(encoding="utf-8"))
        except OSError as error:
            raise ConfigError(f"{config_file} cannot be read: {error.strerror}") from None
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ConfigError(f"{config_file} is no YAML: {error}") from None
        if not isinstance(loaded, dict):
            raise ConfigError(f"{config_file} must hold settings as name: value")
        values = {**({} if "model" in loaded else values), **loaded}
    if model is not None:
        if config_file is None:
            values.pop("served_model_name")
        values["model"] = model
    return from_mapping({**values, **{name: value for name, value in options.items() if value is not None}})


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def cli() -> None:
    """Serve large language models."""


@cli.command()
@engine_options
def serve(model: str | None, config_file: str | None, **options: Any) -> None:
    """Serve MODEL (a directory or hub id; default: the bundled demo) over HTTP (OpenAI's interface) and gRPC."""
    config = resolve(model, config_file, options)
    files = open_model(config.model, config.revision)
    partition(files.shape, Mesh(config.tp, config.pp).seat(0), config.stage_layers)  # can it be divided so? before Ray is started
    parse_recipe(config.quantization).check(files.shape.num_layers)
    from router.tokenizer import load

    if config.draft_model is not None:
        from workers.device import resolve_max_model_len
        from workers.speculative.load import open_draft

        drafting = open_draft(config, files.shape, resolve_max_model_len(config, files.shape))
        parse_recipe(config.draft_quantization).check(drafting.shape.num_layers)
    draft = None if config.draft_model is None else _anywhere(config.draft_model)
    config = dataclasses.replace(config, model=_anywhere(config.model), draft_model=draft)
    load(files.path)  # a broken tokenizer is the user's to mend, so it is said here and not by a replica
    stop = threading.Event()
    began = time.monotonic()
    click.echo(f"starting {config.model_name} ...")
    with tempfile.TemporaryDirectory(prefix="rayline-", dir="/tmp") as folder:  # the path of a socket has to be short
        protect_ray(os.environ)
        choose_haproxy(config, os.environ, Path(folder))
        _serve(config, stop, began)


def _anywhere(model: str) -> str:
    """Workers run in other directories, and on other nodes."""
    path = Path(model).expanduser()
    return os.path.abspath(path) if path.is_dir() else model


def _serve(config: Config, stop: threading.Event, began: float) -> None:
    from cluster.launch import served, wait_until_healthy

    with served(config, stop) as url:
        wait_until_healthy(url, config.load_timeout_s, stop)
        if not stop.is_set():
            ours = config.grpc_port and "RAY_ADDRESS" not in os.environ  # a Serve that runs already has ports of its own
            over = f" and gRPC port {config.grpc_port} (on all addresses)" if ours else ""
            click.echo(f"serving {config.model_name} at {url}/v1{over} after {time.monotonic() - began:.1f} s (Ctrl-C to stop)")
            stop.wait()
        click.echo("stopping ...")


def protect_ray(environ: MutableMapping[str, str]) -> None:
    """Let the Ray that is about to start in this process want a token that only its own processes know. Call before importing Ray.

    What the user chose stays, and nothing is set where RAY_ADDRESS names a cluster: that one has its own mode.
    """
    if "RAY_ADDRESS" in environ or environ.setdefault("RAY_AUTH_MODE", "token") != "token":
        return
    if "RAY_AUTH_TOKEN_PATH" not in environ:
        environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex())


@cli.command()
@engine_options
@click.option("--prompt", help="The text to continue; default: standard input.")
@click.option("--max-tokens", type=click.IntRange(min=1), default=128, show_default=True)
@click.option("--min-tokens", type=click.IntRange(min=0), default=0, show_default=True, help="Nothing ends the output before.")
@click.option("--temperature", type=click.FloatRange(min=0), default=0.0, show_default=True, help="0 is greedy.")
@click.option("--top-p", type=click.FloatRange(0, 1, min_open=True), default=1.0, show_default=True)
@click.option("--top-k", type=click.IntRange(min=0), default=0, show_default=True, help="0 is off.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--stop", multiple=True, help="A text that ends the output; may be given several times.")
def generate(model: str | None, config_file: str | None, prompt: str | None, stop: tuple[str, ...], **options: Any) -> None:
    """Continue a text with MODEL in this process, without Ray."""
    from cluster.offline import LLM
    from cluster.protocol import SamplingParams

    if options["min_tokens"] > options["max_tokens"]:
        raise ConfigError(f"min_tokens is {options['min_tokens']}, but max_tokens {options['max_tokens']}")
    params = SamplingParams(
        max_tokens=options.pop("max_tokens"),
        min_tokens=options.pop("min_tokens"),
        temperature=options.pop("temperature"),
        top_p=options.pop("top_p"),
        top_k=options.pop("top_k"),
        seed=options.pop("seed") % 2**64,
    )
    config = resolve(model, config_file, options)
    text = sys.stdin.read() if prompt is None else prompt
    settings = {name: value for name, value in dataclasses.asdict(config).items() if name != "model"}
    llm = LLM(config.model, progress=sys.stderr.isatty(), **settings)
    click.echo(text, nl=False)
    try:
        for progress in llm.stream(text, params, stop=stop):
            click.echo(progress.text, nl=False)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    click.echo()


@cli.command()
@engine_options
@click.option("--requests", type=click.IntRange(min=1), default=64, show_default=True)
@click.option("--prompt-tokens", type=click.IntRange(min=1), help="Of each request. Default: 32 to 256.")
@click.option("--output-tokens", type=click.IntRange(min=1), help="Of each request. Default: 16 to 128.")
@click.option("--repetitions", type=click.IntRange(min=1), default=1, show_default=True)
@click.option("--profile", is_flag=True, help="Print where an iteration's time goes.")
@click.option("--out", type=click.Path(path_type=Path), default=Path("build/bench"), show_default=True, help="Where JSON goes.")
def bench(model: str | None, config_file: str | None, profile: bool, repetitions: int, out: Path, **options: Any) -> None:
    """Measure how fast MODEL generates in this process, without Ray."""
    from bench.profile import run, workload
    from bench.report import Report
    from cluster.offline import LLM

    requests, prompt_tokens, output_tokens = (options.pop(name) for name in ("requests", "prompt_tokens", "output_tokens"))
    config = resolve(model, config_file, options)
    if profile and config.num_ranks > 1:
        raise ConfigError("a profile is of one rank: tp and pp must be 1")
    settings = {name: value for name, value in dataclasses.asdict(config).items() if name != "model"}
    with LLM(config.model, progress=sys.stderr.isatty(), **settings) as llm:
        asked = workload(requests, prompt_tokens, output_tokens, llm.vocab_size)
        report = Report("profile" if profile else "generate", sys.argv[1:])
        try:
            run(llm, asked, report, profile=profile, repetitions=repetitions)
        except ValueError as error:
            raise ConfigError(str(error)) from None
        report.save(out)


@cli.command()
@click.argument("target")
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "--text", type=click.Path(path_type=Path, exists=True), multiple=True, required=True, help="Files, or folders of them."
)
@click.option(
    "--held-out", type=click.Path(path_type=Path, exists=True), multiple=True, help="To measure on. Default: the end of it."
)
@click.option("--minutes", type=click.FloatRange(min=0, min_open=True), default=30.0, show_default=True, help="Of processor time.")
@click.option("--steps", type=click.IntRange(min=1), help="Instead of --minutes.")
@click.option(
    "--hidden", type=click.IntRange(min=8), help="Width of the draft. Default: TARGET's, whose weights it then begins with."
)
@click.option("--intermediate", type=click.IntRange(min=8), help="Its inner features. Default: half of TARGET's.")
@click.option("--layers", type=click.IntRange(min=1), default=1, show_default=True, help="Its layers.")
@click.option("--own", type=click.FloatRange(0, 1), default=0.5, show_default=True, help="Share of TARGET's own text.")
@click.option("--samples", type=click.IntRange(min=1), default=1500, show_default=True, help="Pieces of that text.")
@click.option("--batch-tokens", type=click.IntRange(min=64), default=8192, show_default=True, help="Of one update.")
@click.option("--threads", type=click.IntRange(min=1), default=2, show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--resume", is_flag=True, help="Go on from the checkpoint in OUT.")
@click.option("--compiled/--no-compiled", default=True, show_default=True, help="Compile the draft: needs a C++ compiler.")
def distill(target: str, out: Path, text: tuple[Path, ...], held_out: tuple[Path, ...], **options: Any) -> None:
    """Train a small draft model for TARGET (a directory or hub id) on a text, and write it to OUT."""
    import torch

    from compress.distill import Distillation, DraftShape, read_text
    from compress.distill import distill as train

    torch.set_num_threads(options.pop("threads"))
    if options["steps"] is not None:
        options["minutes"] = None
    resume, size = options.pop("resume"), [options.pop(name) for name in ("hidden", "intermediate", "layers")]
    try:
        files, texts, others = open_model(target), read_text(text), read_text(held_out) if held_out else []
        recipe = Distillation(shape=DraftShape.of(files.shape, *size), **options)
        figures = train(files, recipe, texts, out, held_out_texts=others, resume=resume)
    except (ValueError, OSError) as error:
        raise ConfigError(str(error)) from None
    for rule, by_name in figures["acceptance"].items():
        for name, found in by_name.items():
            shares = ", ".join(f"{share:.0%}" for share in found["by_position"])
            click.echo(
                f"{rule}, {name}: {shares} of the proposed tokens stand, {found['tokens_per_step']:.2f} tokens for each step"
            )


_TEXT = click.Path(path_type=Path, exists=True)


@cli.command()
@click.argument("model")
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "--scheme",
    required=True,
    help="A precision (int4-g128, int8, fp8, int8-dynamic, bf16 ...), rules (lm_head: bf16, layers.0-1: int8, rest: int4-g128), or "
    "mixed: int8, int4-g128 or none for each linear, by what it loses, for --target-size or else for --max-loss.",
)
@click.option("--target-size", metavar="300MB", help="Of mixed: what all tensors may take.")
@click.option("--qat", is_flag=True, help="Train after calibration, with rounded weights; the model is in memory twice in fp32.")
@click.option("--steps", type=click.IntRange(min=1), default=150, show_default=True, help="Of --qat.")
@click.option("--text", type=_TEXT, multiple=True, help="Files, or folders of them, for calibration. Default: Python's library.")
@click.option("--held-out", type=_TEXT, multiple=True, help="To measure on. Default: what calibration leaves of the text.")
@click.option("--method", type=click.Choice(["rtn", "gptq"]), help="Default: gptq for 4 bits, else round to nearest.")
@click.option("--range", "ranging", type=click.Choice(["minmax", "percentile", "mse"]), help="Default: mse for 4 bits.")
@click.option("--samples", type=click.IntRange(min=1), default=128, show_default=True, help="Rows of calibration text.")
@click.option("--context", type=click.IntRange(min=2), default=512, show_default=True, help="Tokens of a row.")
@click.option("--max-loss", type=click.FloatRange(min=0), default=0.1, show_default=True, help="Most nats per token from MODEL.")
@click.option("--measure/--no-measure", default=True, show_default=True, help="Both models are in memory for it.")
@click.option("--resume", is_flag=True, help="Go on from the last layer that was finished.")
@click.option("--force", is_flag=True, help="Keep a model that is further from MODEL than --max-loss.")
@click.option("--threads", type=click.IntRange(min=1), help="Default: all cores.")
def quantize(
    model: str, out: Path, scheme: str, target_size: str | None, qat: bool, steps: int, threads: int | None, **options: Any
) -> None:
    """Write MODEL (a directory or hub id) in fewer bits to OUT, a layer at a time, and measure what is lost."""
    recipe = UNCHANGED if scheme.strip() == "mixed" else parse_recipe(scheme)
    if target_size is not None and recipe.rules:
        raise ConfigError("--target-size is for --scheme mixed")
    target_bytes = None if target_size is None else parse_bytes(target_size)
    import torch

    from compress.posttraining import make
    from compress.qat import Tuning
    from compress.quantize import Plan

    if threads is not None:
        torch.set_num_threads(threads)
    plan = Plan(recipe, options.pop("method"), options.pop("ranging"))
    try:
        tuning = Tuning(steps=steps) if qat else None
        shown = sys.stderr.isatty()
        found = make(open_model(model), plan, out, target_bytes=target_bytes, tuning=tuning, progress=shown, **options)
    except (ValueError, OSError) as error:
        raise ConfigError(str(error)) from None
    click.echo(found or f"{out} is written")


@cli.command("eval")
@click.argument("model")
@click.option("--against", metavar="BASE", help="A model of the same vocabulary, to tell how far MODEL is from it.")
@click.option("--than", metavar="OTHER", help="Another such model, to tell which of the two is nearer to BASE.")
@click.option("--text", type=_TEXT, multiple=True, help="Files, or folders of them. Default: some of Python's library.")
@click.option("--context", type=click.IntRange(min=2), default=512, show_default=True, help="Tokens of a row.")
@click.option("--samples", type=click.IntRange(min=2), default=64, show_default=True, help="Rows.")
@click.option("--dtype", type=click.Choice(get_args(Dtype)), default="auto", show_default=True, help="To compute in.")
@click.option("--threads", type=click.IntRange(min=1), help="Default: all cores.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def evaluate(model: str, against: str | None, than: str | None, text: tuple[Path, ...], as_json: bool, **options: Any) -> None:
    """Measure how well MODEL (a directory or hub id) predicts a text, how large it is, and how far from another."""
    if than is not None and against is None:
        raise ConfigError("--than needs --against: a model is nearer to something than another")
    from compress.calibration import held_out_text, rows_of
    from compress.evaluate import Comparison
    from compress.evaluate import evaluate as measure

    files = open_model(model)
    try:
        length = min(options.pop("context"), files.shape.max_position_embeddings)
        rows = rows_of(files, held_out_text(text), options.pop("samples"), length)
    except (ValueError, OSError) as error:
        raise ConfigError(str(error)) from None
    found = measure(model, against, rows, progress=sys.stderr.isatty(), **options)
    told, figures = str(found), found.as_dict()
    if than is not None:
        other = measure(than, against, rows, progress=sys.stderr.isatty(), **options)
        compared = Comparison.of(found, other)
        told += f"\n\n{than}:\n{other}\n\ndivergence of {model} less, and by, that of {than}, on the same rows:\n{compared}"
        figures |= {"than": other.as_dict(), "compared": dataclasses.asdict(compared)}
    click.echo(json.dumps(figures, indent=1) if as_json else told)


@cli.command()
@click.option("--url", default="http://localhost:8000/v1", show_default=True, help="Of the server, /v1 included.")
@click.option("--api-key", envvar="OPENAI_API_KEY", help="Of the server, if it asks for one. Default: $OPENAI_API_KEY.")
@click.option("--model", help="Default: the first that the server names.")
@click.option("--system-prompt", help="How the model should behave.")
@click.option("-q", "--quick", metavar="PROMPT", help="Answer this and end.")
@click.option("--max-tokens", type=click.IntRange(min=1), help="Of one answer. Default: what the context holds.")
@click.option("--temperature", type=click.FloatRange(min=0), help="0 is greedy. Default: the server's.")
def chat(url: str, api_key: str | None, model: str | None, system_prompt: str | None, quick: str | None, **parameters: Any) -> None:
    """Talk to a model that a server serves. Ctrl-C ends an answer, /new a conversation, Ctrl-D the session."""
    from cluster.chat import chat as talk

    talk(url, api_key, model, system_prompt, quick, {name: value for name, value in parameters.items() if value is not None})


if __name__ == "__main__":
    main()
