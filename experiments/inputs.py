"""Models, texts and configs of the experiments.

Change a line here, or give `--set`, for other models or for a GPU. The small models are pretrained
by the experiments, because their weights must never have been in 4 bits; a sweep makes the models
that are missing (`made`). The available weights of SmolLM2 are Q4_1, so its "16 bits" are
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
"""Config of the cells that fine-tune; `configs/rank.yaml` is a larger one for a GPU."""

LOW_RANK_RATE, FULL_RATE = 4e-3, 1e-3
"""Learning rates of adapters and of full fine-tuning; models of a billion parameters need a tenth
or less."""

PRETRAINED: Mapping[str, str] = {
    f"runs/pretrain_{size}/model": f"configs/pretrain_{size}.yaml" for size in ("1m", "4m", "12m")
}
"""Path of each model that `qlora-jax pretrain` makes, to its config."""

MODELS = [*PRETRAINED, "smollm2-135m-instruct"]
"""Models whose weights are quantized: paths, or hub ids such as EleutherAI/pythia-410m."""

ONCE_4_BIT = {"smollm2-135m-instruct"}
"""Models of `MODELS` whose available weights were already quantized to 4 bits; they say nothing
about whether trained weights are normal."""

TEXTS = ["python-docs", "python-source", "package-docs"]
"""Values of `data.source` whose held-out parts are used for perplexity."""

TOKENS = 4096
"""Number of tokens of each text that are used for perplexity."""

WINDOW = 256
"""Tokens of context for perplexity."""

CHAT = "configs/quickstart.yaml"
"""Config of the runs of `instruction_tuning`."""

JUDGE = "smollm2-135m-instruct"
"""Judge of `instruction_tuning`: an answer wins if the right answer is likelier after it."""

ENDPOINT: tuple[str, str] | None = None
"""(URL, model) of an OpenAI-compatible endpoint that judges instead of `JUDGE`, or None."""


def in_checkout(path: str) -> str:
    """Returns the path in the checkout if only the checkout has the file; else `path`."""
    ours = Path(__file__).parents[1] / path
    return str(ours) if ours.exists() and not Path(path).exists() else path


def made(cell: Cell) -> Sequence[Input]:
    """Returns the models of `PRETRAINED` that a cell's axes `model` and `config` name."""
    values = [cell.values.get(axis) for axis in ("model", "config")]
    models = [_model(value) for value in values if isinstance(value, str)]
    return [_input(model) for model in models if model in PRETRAINED]


def _input(model: str) -> Input:
    config = in_checkout(PRETRAINED[model])
    cost = re.search(r"^# Cost: (.*)\.$", Path(config).read_text("utf-8"), re.MULTILINE)
    return Input(
        Path(model),
        ("pretrain", config, "--resume"),
        cost[1] if cost else "not stated in its config",
    )


@functools.cache
def _model(value: str) -> str:
    """Returns the model that a value names: the value itself, or the model of a config file.

    Returns "" for an invalid config, because the cell reports that error.
    """
    if not value.endswith(".yaml"):
        return value
    try:
        return configs.load_config(in_checkout(value)).model.path
    except UserError:
        return ""
