"""A model made larger without changing what it computes: text and acceptance stay the demo's, the cost becomes a large model's.

    python -m bench.enlarged MODEL OUT [--intermediate 18432] [--layers 32]

New inner features have output weights of zero, and so have the attention and the mlp of new layers: they are computed, and add
zeros.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from bench import options
from cluster.model import open_model
from compress.distill import copy_tokenizer


def enlarge(source: Path, out: Path, intermediate: int, layers: int, dtype: torch.dtype = torch.bfloat16) -> int:
    """Write it; the number of its parameters. Raises ValueError where it would be smaller."""
    small = AutoModelForCausalLM.from_pretrained(source, dtype=dtype)
    config = small.config
    if intermediate < config.intermediate_size or layers < config.num_hidden_layers:
        raise ValueError(f"the model has {config.num_hidden_layers} layers of {config.intermediate_size} inner features already")
    old_layers = config.num_hidden_layers
    config.update({"intermediate_size": intermediate, "num_hidden_layers": layers})
    config.layer_types = None
    torch.manual_seed(0)
    large: PreTrainedModel = type(small)(type(config)(**config.to_dict())).to(dtype)
    old, new = small.state_dict(), large.state_dict()
    with torch.no_grad():
        for name, weight in new.items():
            number = int(name.split(".")[2]) if name.startswith("model.layers.") else 0
            if number >= old_layers:
                if name.endswith(("o_proj.weight", "down_proj.weight")):
                    weight.zero_()
            else:
                _widen(weight, old[name], zero=name.endswith("down_proj.weight"))
    large.generation_config = small.generation_config
    large.save_pretrained(out)
    copy_tokenizer(source, out)
    return int(large.num_parameters())


def _widen(weight: Tensor, old: Tensor, *, zero: bool) -> None:
    """Put `old` in the corner of `weight`, whose rest is zero or what it is."""
    if zero:
        weight.zero_()
    weight[tuple(slice(0, size) for size in old.shape)] = old


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = options.parser(__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("into", type=Path, metavar="OUT")
    parser.add_argument("--intermediate", type=options.positive, default=18_432)
    parser.add_argument("--layers", type=options.positive, default=32)
    arguments = parser.parse_args(argv)
    count = enlarge(open_model(str(arguments.model)).path, arguments.into, arguments.intermediate, arguments.layers)
    print(f"{arguments.into}: {count / 1e6:.0f} million parameters")


if __name__ == "__main__":
    main()
