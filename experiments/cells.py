"""What cells of several experiments do: train from a config, read a text, quantize a model."""

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import inputs
import numpy as np

from qlora_jax import config as configs
from qlora_jax.config import Config, DataConfig, ModelConfig


def config_of(path: str, settings: Mapping[str, Any]) -> Config:
    """The config of a YAML file with settings laid over it, given as Python values."""
    text = {k: v if isinstance(v, str) else json.dumps(v) for k, v in settings.items()}
    return configs.load(path, text)


def finetuned(path: str, folder: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Trains in a cell's folder, going on where a killed cell stopped; its figures.

    Args:
      path: YAML of the run.
      folder: the cell's.
      settings: laid over it, by dotted key.
    """
    from qlora_jax.train.run import train

    own = {"output": str(folder / "run"), "train.samples": 0, **settings}
    summary = train(config_of(path, own), say=print, command="", resume=True)
    return {
        "loss_before": summary.eval_before,
        "loss": summary.eval_after,
        "trainable": summary.trainable,
        "total": summary.total,
        "share": summary.trainable / summary.total,
        "wall_s": summary.wall_s,
        "run": summary.run_dir,
    }


@functools.cache
def text_ids(tokenizer: Path, source: str, tokens: int) -> np.ndarray:
    """The first tokens of a source's held-out part, its records one after the other."""
    from qlora_jax.data import sources
    from qlora_jax.data import tokenizer as tokenizers

    split = sources.read(DataConfig(source=source, format="text"))
    text = tokenizers.load(tokenizer)
    ids: list[int] = []
    for record in split.held_out:
        ids += text.encode(record.key)
        if len(ids) >= tokens:
            break
    return np.array(ids[:tokens], np.int32)


@functools.lru_cache(maxsize=1)
def opened(model: str) -> Any:
    """A model's open checkpoint; a worker's next cells have it at hand."""
    from qlora_jax.formats.source import open_checkpoint

    return open_checkpoint(ModelConfig(path=model))


def losses(model: Any, checkpoint: Any) -> dict[str, Any]:
    """A model's loss on every text of `inputs.TEXTS`, in nats per token."""
    import jax.numpy as jnp

    from qlora_jax.evaluate.perplexity import text_loss

    found = {}
    for source in inputs.TEXTS:
        ids = text_ids(checkpoint.tokenizer_path, source, inputs.TOKENS)
        found[source] = text_loss(model, ids, window=inputs.WINDOW, dtype=jnp.float32).loss
    return found


def relative_error(checkpoint: Any, quant: Any) -> float:
    """‖W - dequantize(quantize(W))‖ / ‖W‖ over all of a model's linears together."""
    import jax.numpy as jnp

    from qlora_jax.models.parts import linears
    from qlora_jax.quant import dequantize, quantize

    names = checkpoint.config.names
    ends = tuple(f".{path}.weight" for path in linears(checkpoint.config))
    off = whole = 0.0
    for name in checkpoint.names():
        if name.startswith(names.layers) and name.endswith(ends):
            w = jnp.asarray(checkpoint.read(name), jnp.float32).T
            q = quantize(w, quant.codebook, quant.block_size, quant.double_quant, name=name)
            off += float(jnp.sum((w - dequantize(q)) ** 2))
            whole += float(jnp.sum(w**2))
    return (off / whole) ** 0.5
