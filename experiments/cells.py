"""Functions that several experiments share: train a config, read a text, quantize a model."""

import functools
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments import inputs
from qlora_jax import config as configs
from qlora_jax.config import Config, DataConfig, ModelConfig
from qlora_jax.sweep import Context, Rows
from qlora_jax.sweep.metrics import Metric, measured

RUN = "run"
"""Name of the run directory in a cell's folder."""


def config_of(path: str, settings: Mapping[str, Any]) -> Config:
    """Returns the config of a YAML file, changed by settings: Python values by dotted key."""
    text = {k: v if isinstance(v, str) else json.dumps(v) for k, v in settings.items()}
    return configs.load_config(inputs.in_checkout(path), text)


def finetuned(path: str, folder: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Trains a config in `RUN` of a cell's folder, or resumes that run; returns its figures.

    Args:
      path: YAML file of the run.
      folder: folder of the cell.
      settings: changes to the YAML file, Python values by dotted key.
    """
    from qlora_jax.train.run import train

    own = {"output": str(folder / RUN), "train.samples": 0, **settings}
    summary = train(config_of(path, own), say=print, command="", resume=True)
    return {
        "loss_before": summary.eval_before,
        "loss": summary.eval_after,
        "trainable": summary.trainable,
        "total": summary.total,
        "share": summary.trainable / summary.total,
        "train_s": summary.wall_s,
    }


@functools.cache
def text_ids(tokenizer: Path, source: str, tokens: int) -> np.ndarray:
    """Returns the first token ids of a source's held-out part, its records concatenated."""
    from qlora_jax.data import sources
    from qlora_jax.text import tokenizer as tokenizers

    split = sources.read(DataConfig(source=source, format="text"))
    text = tokenizers.load_tokenizer(tokenizer)
    ids: list[int] = []
    for record in next(iter(split.held_out.values()), []):
        ids += text.encode(record.key)
        if len(ids) >= tokens:
            break
    return np.array(ids[:tokens], np.int32)


@functools.lru_cache(maxsize=1)
def opened(model: str) -> Any:
    """Returns a model's open checkpoint; the last one stays open for the worker's next cells."""
    from qlora_jax.formats.source import open_checkpoint

    return open_checkpoint(ModelConfig(path=model))


def described(model: str) -> Any:
    """Returns a model's open checkpoint, or a fresh one of its shapes if it is not made yet."""
    from qlora_jax.formats.fresh import FreshCheckpoint, shapes

    if model in inputs.PRETRAINED and not Path(model).exists():
        pretrain = config_of(inputs.PRETRAINED[model], {}).pretrain
        return FreshCheckpoint(shapes(pretrain), seed=0)
    return opened(model)


def losses(model: Any, checkpoint: Any) -> dict[str, Any]:
    """Returns a model's loss on every text of `inputs.TEXTS`, in nats per token."""
    import jax.numpy as jnp

    from qlora_jax.evaluate.perplexity import text_loss

    found = {}
    for source in inputs.TEXTS:
        ids = text_ids(checkpoint.tokenizer_path, source, inputs.TOKENS)
        found[source] = text_loss(model, ids, window=inputs.WINDOW, dtype=jnp.float32).loss
    return found


def relative_error(checkpoint: Any, quant: Any) -> float:
    """Returns ‖W - dequantize(quantize(W))‖ / ‖W‖ over all linears of a model together."""
    import jax.numpy as jnp

    from qlora_jax.models.weight_shapes import linears
    from qlora_jax.quant import quantize
    from qlora_jax.quant.error import quantization_error

    names = checkpoint.config.names
    ends = tuple(f".{path}.weight" for path in linears(checkpoint.config))
    off = whole = 0.0
    for name in checkpoint.names():
        if name.startswith(names.layers) and name.endswith(ends):
            w = jnp.asarray(checkpoint.read(name), jnp.float32).T
            q = quantize(w, quant.codebook, quant.block_size, quant.double_quant, name=name)
            off += quantization_error(w, q).mse * w.size
            whole += float(jnp.sum(w**2))
    return (off / whole) ** 0.5


def short(model: str) -> str:
    """Returns a model's short name, for pictures."""
    return model.removesuffix("/model").rpartition("/")[2]


def linears(path: str, targets: str | list[str]) -> dict[str, tuple[int, int]]:
    """Returns the linears that the targets select in a config's model: path to (in, out)."""
    from qlora_jax.lora import choose_adapters
    from qlora_jax.models.weight_shapes import layer_linears

    config = config_of(path, {"lora.target_modules": targets})
    shapes = layer_linears(described(config.model.path).config)
    return {name: shapes[name] for name in choose_adapters(config.lora, shapes)}


def population(
    path: str, members: Sequence[Mapping[str, Any]], context: Context, **common: Any
) -> list[Rows]:
    """Trains adapters of different settings in one program; returns the figures of each.

    Args:
      path: YAML file of the run.
      members: settings of each adapter, by dotted key.
      context: context of the first member's cell.
      common: settings of all adapters; `__` stands for the dot in a key.
    """
    from qlora_jax.train.population import train_population

    shared = {name.replace("__", "."): value for name, value in common.items()}
    config = config_of(path, {"output": str(context.folder), **shared})
    texts = [
        {k: v if isinstance(v, str) else json.dumps(v) for k, v in member.items()}
        for member in members
    ]
    steps = config.train.step_count
    found = train_population(
        config, texts, say=print, progress=lambda step: context.progress(f"step {step}/{steps}")
    )
    checkpoint = opened(config.model.path)
    base = sum(math.prod(checkpoint.shape(name)) for name in checkpoint.names())
    return [measured(MEMBER, Member(result, base)) for result in found]


class Member(NamedTuple):
    """A trained member of a population.

    Attributes:
      result: losses, norms and adapters, a `train.population.MemberResult`.
      base: number of parameters of the base.
    """

    result: Any
    base: int

    @property
    def trainable(self) -> int:
        return sum(a.a.size + a.b.size for a in self.result.adapters.values())


MEMBER: Mapping[str, Metric[Member]] = {
    "loss": Metric(lambda member: member.result.held_out[max(member.result.held_out)]),
    "loss_before": Metric(lambda member: member.result.held_out[0]),
    "last_losses": Metric(lambda member: member.result.losses[-10:]),
    "trainable": Metric(lambda member: member.trainable),
    "share": Metric(lambda member: member.trainable / (member.trainable + member.base)),
    "diverged": Metric(lambda member: member.result.diverged),
}
"""Figures of a population's member. Experiments add a column for each figure with a title."""


def trained(run: Path) -> Any:
    """Restores a finished run: its model, config and tokenizer."""
    from qlora_jax.train.restore import restore

    return restore(run, base=False, warn=print)


def answers(restored: Any, count: int, tokens: int = 48) -> list[tuple[Any, str]]:
    """Returns a run's first held-out questions, each with the model's greedy answer."""
    import jax.numpy as jnp

    from qlora_jax.models.generate import generate
    from qlora_jax.train.examples import read_data

    config, tokenizer = restored.config, restored.tokenizer
    asking = configs.changed(config, {"train.samples": str(count)})
    questions = read_data(asking, tokenizer, restored.model.config.longest_cached).questions
    rows = generate(
        restored.model,
        [q.ids for q in questions],
        max_new_tokens=tokens,
        stop_ids=tokenizer.stop_ids,
        pad_id=tokenizer.pad_id,
        dtype=jnp.dtype(config.model.compute_dtype),
    )
    return [(q, tokenizer.decode(row)) for q, row in zip(questions, rows)]


def rouge_of(run: Path, count: int) -> float:
    """Returns the mean ROUGE-L of a run's greedy answers to `count` held-out questions."""
    from qlora_jax.evaluate.rouge import rouge_l

    pairs = answers(trained(run), count)
    return sum(rouge_l(answer, q.answer) for q, answer in pairs) / len(pairs)


@functools.cache
def base_loss(model: str, source: str) -> float:
    """Returns the loss of an unquantized model, in float32, on a source's held-out text."""
    import jax.numpy as jnp

    from qlora_jax.evaluate.perplexity import text_loss
    from qlora_jax.formats.load import load_model

    checkpoint = opened(model)
    loaded = load_model(checkpoint, quant=None, dtype=jnp.float32)
    ids = text_ids(checkpoint.tokenizer_path, source, inputs.TOKENS)
    return text_loss(loaded, ids, window=inputs.WINDOW, dtype=jnp.float32).loss
