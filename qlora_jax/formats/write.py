"""Writes a checkpoint as a folder for transformers, as floats or in bitsandbytes' 4 bits."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from qlora_jax.config import QuantConfig
from qlora_jax.formats import bitsandbytes
from qlora_jax.formats.checkpoint import Checkpoint
from qlora_jax.formats.folder import write_folder
from qlora_jax.models.config import DecoderConfig
from qlora_jax.models.weight_shapes import linears
from qlora_jax.runtime.errors import UserError
from qlora_jax.text.tokenizer import Tokenizer


def write_model(
    checkpoint: Checkpoint,
    folder: Path,
    quant: QuantConfig | None,
    dtype: str,
    progress: Callable[[], None] = lambda: None,
    *,
    tokenizer: Tokenizer | None = None,
    replace: bool = False,
    add: Callable[[Path], None] = lambda folder: None,
) -> int:
    """Writes a checkpoint as a model folder, one tensor at a time.

    Args:
      checkpoint: checkpoint with float weights.
      folder: folder to write; it must be absent or empty unless `replace` is set.
      quant: quantization of the layers' linears; None writes them as floats.
      dtype: dtype of all weights that are not quantized; also the compute dtype in
        `quantization_config`.
      progress: callback, called once per tensor that is read.
      tokenizer: tokenizer to write; None: the checkpoint's tokenizer.
      replace: whether to replace an existing model folder.
      add: function that writes more files into the folder before it gets its final name.

    Returns:
      Number of bytes of the weights.

    Raises:
      UserError: bitsandbytes does not support the settings, weights are not finite or already in 4
        bits, or the folder cannot be written.
    """
    changes: dict[str, Any] = {}
    if quant is not None:
        bitsandbytes.check_writable(quant)
        changes["quantization_config"] = bitsandbytes.quantization_config(quant, dtype)
    if checkpoint.quantization:
        raise UserError(
            f"{checkpoint.path}: its weights are in 4 bits already ({checkpoint.description}); "
            "give the 16-bit checkpoint"
        )

    def tensors() -> Iterator[tuple[str, np.ndarray]]:
        for name in checkpoint.names():
            array = np.asarray(checkpoint.read(name))
            yield from _stored(name, array, checkpoint.config, quant, dtype)
            progress()

    return write_folder(
        folder, checkpoint, changes, dtype, tensors(), tokenizer=tokenizer, replace=replace, add=add
    )


def _stored(
    name: str, array: np.ndarray, config: DecoderConfig, quant: QuantConfig | None, dtype: str
) -> Iterator[tuple[str, np.ndarray]]:
    linear = name.removesuffix(".weight").endswith(tuple(f".{path}" for path in linears(config)))
    if quant is not None and array.ndim == 2 and linear:
        for suffix, tensor in bitsandbytes.pack(name, array, quant, dtype).items():
            yield name + suffix, tensor
        return
    with np.errstate(over="ignore"):
        value = array.astype(bitsandbytes.DTYPES[dtype])
    if not jnp.isfinite(value).all():
        raise UserError(
            f"{name}: holds NaN or Inf as {dtype}; check the checkpoint, or give another dtype"
        )
    yield name, value
