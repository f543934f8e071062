"""A model made larger without changing what it computes: text and acceptance stay the demo's, the cost becomes a large model's.

    python -m bench.enlarged MODEL OUT [--hidden 1024] [--intermediate 4096] [--layers 34]

New inner features have output weights of zero, and so have the attention and the mlp of new layers: they are computed, and add
zeros. New hidden features are zero everywhere: no output weights reach them. That makes mean squares smaller by the factor f by
which there are more features, so eps is divided by f and the norms' weights by sqrt(f), and so are the weights of queries and keys
where they have norms, which share eps. f is a power of 4: all of these factors are exact.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from bench import options
from cluster.model import open_model
from compress.distill import copy_beside


def enlarge(source: Path, out: Path, hidden: int, intermediate: int, layers: int, dtype: torch.dtype = torch.bfloat16) -> int:
    """Write it; the number of its parameters. Raises ValueError where it would be smaller, or hidden not 4**n times the old one."""
    small = AutoModelForCausalLM.from_pretrained(source, dtype=dtype)
    config = small.config
    if intermediate < config.intermediate_size or layers < config.num_hidden_layers:
        raise ValueError(f"the model has {config.num_hidden_layers} layers of {config.intermediate_size} inner features already")
    factor = hidden // config.hidden_size
    if factor * config.hidden_size != hidden or factor not in (1, 4, 16, 64):
        raise ValueError(f"hidden is {hidden}, but must be {config.hidden_size} times 1, 4, 16 or 64")
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    sizes = {"hidden_size": hidden, "head_dim": head_dim, "intermediate_size": intermediate, "num_hidden_layers": layers}
    config.update({**sizes, "rms_norm_eps": config.rms_norm_eps / factor})
    config.layer_types = None
    torch.manual_seed(0)
    large: PreTrainedModel = type(small)(type(config)(**config.to_dict())).to(dtype)
    old, new = small.state_dict(), large.state_dict()
    shrunk = [name for name in old if name.endswith("norm.weight") and not name.endswith(("q_norm.weight", "k_norm.weight"))]
    if any(name.endswith("q_norm.weight") for name in old):
        shrunk += [name for name in old if name.endswith(("q_proj.weight", "k_proj.weight"))]
    with torch.no_grad():
        for name, weight in new.items():
            if name.endswith(("o_proj.weight", "down_proj.weight", "embed_tokens.weight")):
                weight.zero_()
            if name in old:
                weight[tuple(slice(0, size) for size in old[name].shape)] = old[name] / (factor**0.5 if name in shrunk else 1)
    large.generation_config = small.generation_config
    large.save_pretrained(out)
    copy_beside(source, out)
    return int(large.num_parameters())


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = options.parser(__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("into", type=Path, metavar="OUT")
    parser.add_argument("--hidden", type=options.positive, default=1024)
    parser.add_argument("--intermediate", type=options.positive, default=4096)
    parser.add_argument("--layers", type=options.positive, default=34)
    arguments = parser.parse_args(argv)
    count = enlarge(
        open_model(str(arguments.model)).path, arguments.into, arguments.hidden, arguments.intermediate, arguments.layers
    )
    print(f"{arguments.into}: {count / 1e6:.0f} million parameters")


if __name__ == "__main__":
    main()
