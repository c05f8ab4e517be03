"""What the experiments run on. Change a line here, or give `--set`, for other models or a GPU.

The small models are pretrained here, so that there are weights that were never in 4 bits; a sweep
makes those that are not there (`made`). SmolLM2's weights reach us as Q4_1: its "16 bits" are
dequantized Q4_1.
"""

import functools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from qlora_jax import config as configs
from qlora_jax.runtime.errors import UserError
from qlora_jax.sweep import Cell, Input

CONFIG = "configs/small.yaml"
"""Where fine-tuning cells start from; `configs/rank.yaml` is the size of a GPU."""

LOW_RANK_RATE, FULL_RATE = 4e-3, 1e-3
"""Learning rates of adapters and of whole models; a tenth or less for models of a billion."""

PRETRAINED: Mapping[str, str] = {
    f"runs/pretrain_{size}/model": f"configs/pretrain_{size}.yaml" for size in ("1m", "4m", "12m")
}
"""Models that `qlora-jax pretrain` makes, each from its config."""

MODELS = [*PRETRAINED, "smollm2-135m-instruct"]
"""Whose weights are quantized; hub ids such as EleutherAI/pythia-410m belong here too."""

ONCE_4_BIT = {"smollm2-135m-instruct"}
"""Of these, whose weights were in 4 bits before they reached us: no witness of normal weights."""

TEXTS = ["python-docs", "python-source", "package-docs"]
"""Sources of `data.source` whose held-out part is read for perplexity."""

TOKENS = 4096
"""Tokens of each text that are read for perplexity."""

WINDOW = 256
"""Tokens of context for perplexity."""

CHAT = "configs/quickstart.yaml"
"""The run of `instruction_tuning`."""

JUDGE = "smollm2-135m-instruct"
"""The reference model: answers after which it finds the right one likelier win."""

ENDPOINT: tuple[str, str] | None = None
"""(URL, model) of an OpenAI-compatible endpoint that judges instead."""


def in_checkout(path: str) -> str:
    """A file that is not in the current folder, where the checkout has it; else the path itself."""
    ours = Path(__file__).parents[1] / path
    return str(ours) if ours.exists() and not Path(path).exists() else path


def made(cell: Cell) -> Sequence[Input]:
    """Returns the models of `PRETRAINED` that a cell reads: by its axis `model` or its config's."""
    values = [cell.values.get(axis) for axis in ("model", "config")]
    models = [_model(value) for value in values if isinstance(value, str)]
    return [_input(model) for model in models if model in PRETRAINED]


def _input(model: str) -> Input:
    config = in_checkout(PRETRAINED[model])
    cost = re.search(r"^# Cost: (.*)\.$", Path(config).read_text("utf-8"), re.MULTILINE)
    return Input(
        Path(model),
        ("pretrain", config, "--resume"),
        cost[1] if cost else "its config does not tell the cost",
    )


@functools.cache
def _model(value: str) -> str:
    """The model that a value names, itself or by a config; empty for a config that is none.

    The cell tells what is wrong with such a config.
    """
    if not value.endswith(".yaml"):
        return value
    try:
        return configs.load_config(in_checkout(value)).model.path
    except UserError:
        return ""
