"""Estimates of what XLA allocates within a training step's gradient.

What is kept of every layer follows from the code and is what JAX saves; that XLA keeps just that,
and what it needs for a moment, was compared with its buffer assignment for GPUs (`compile`).
"""

from collections.abc import Mapping
from typing import NamedTuple

import jax.numpy as jnp

from qlora_jax.config import Config
from qlora_jax.formats.names import expected_shapes
from qlora_jax.models import attention
from qlora_jax.models.config import DecoderConfig
from qlora_jax.train.loss import COLUMNS, ROWS

LAYER = "model.layers.0."
FLOAT32 = 4


class _Step(NamedTuple):
    """What the formulas have in common: widths of a layer, and bytes of the compute dtype.

    Attributes:
      hidden, query, key, inner: features of the layer's input, q, k (and v), and the MLP.
      ranks: of all adapters of a layer, summed.
      dropped: input features of all adapters that drop some of theirs, summed.
      width: bytes of an element in the compute dtype.
      rows, length: of a micro-batch.
    """

    hidden: int
    query: int
    key: int
    inner: int
    ranks: int
    dropped: int
    width: int
    rows: int
    length: int

    @property
    def tokens(self) -> int:
        return self.rows * self.length


def layer_linears(model: DecoderConfig) -> dict[str, tuple[int, int]]:
    """A layer's linears: name below `model.layers.N`, such as self_attn.q_proj, to (in, out)."""
    return {
        name.removeprefix(LAYER).removesuffix(".weight"): (shape[1], shape[0])
        for name, shape in expected_shapes(model).items()
        if name.startswith(LAYER) and len(shape) == 2
    }


def estimates(model: DecoderConfig, run: Config, ranks: Mapping[str, int]) -> dict[str, int]:
    """Bytes by part.

    Args:
      model: shapes of the decoder.
      run: dtypes, remat, rows and their length are read.
      ranks: rank of each of a layer's adapters, by the linear's name in `layer_linears`.
    """
    linears = layer_linears(model)
    step = _Step(
        hidden=model.hidden_size,
        query=model.num_heads * model.head_dim,
        key=model.num_kv_heads * model.head_dim,
        inner=model.intermediate_size,
        ranks=sum(ranks.values()),
        dropped=sum(linears[name][0] for name in ranks) if run.lora.dropout else 0,
        width=jnp.dtype(run.model.compute_dtype).itemsize,
        rows=run.train.batch_size,
        length=run.data.sequence_length,
    )
    kept = KEPT[run.model.remat]
    # a window makes the mask a part of the layer
    windowed, whole = any(model.windows), run.model.remat == "none"
    masks = model.num_layers * whole if windowed else 1
    outside = 2 * FLOAT32 * (step.hidden + 1) + FLOAT32 * model.head_dim + masks * step.length
    return {
        "activations": step.tokens * (model.num_layers * kept(step) + outside),
        "layer's working set": _working_set(model, step),
        "decoded weights": _decoded(run, step, sum(k * n for k, n in linears.values())),
        "loss": _loss(model, run, step),
    }


def _everything(step: _Step) -> int:
    norms = 2 * 2 * FLOAT32 * (step.hidden + 1)
    inputs = 2 * step.hidden + 2 * step.query + 2 * step.key + 6 * step.inner + step.ranks
    return norms + step.width * inputs + (step.width + 1) * step.dropped


def _products(step: _Step) -> int:
    outputs = 2 * step.query + 2 * step.key + step.hidden + 2 * step.inner
    return step.width * (step.hidden + outputs + step.ranks)


def _input(step: _Step) -> int:
    return step.width * step.hidden


KEPT = {"none": _everything, "dots": _products, "full": _input, "host": _input}
"""`decoder.REMAT`'s policies, each with the bytes that a layer keeps per token.

full: the layer's input. dots: also the outputs of the linears but the last, of attention and of
A. none: the norms' float32 inputs and results, the inputs of all linears (with dropout, what is
left of them, and the mask), q, k and v, the parts of the activation function. Where few linears
have adapters, a little less is kept.
"""


def _working_set(model: DecoderConfig, step: _Step) -> int:
    """Of a layer's backward pass: what its second forward pass gives, some queries' scores twice in
    float32 and twice in the compute dtype, and the MLP's two gradients."""
    scores = step.rows * model.num_heads * min(attention.ROWS, step.length) * step.length
    gradients = 2 * step.tokens * step.inner * step.width
    return step.tokens * _everything(step) + 2 * scores * (FLOAT32 + step.width) + gradients


def _decoded(run: Config, step: _Step, elements: int) -> int:
    """A layer's weights in the compute dtype, where they are not stored in it: nothing keeps XLA
    from decoding all of them before it multiplies by the first."""
    if run.method == "qlora":
        return 0 if run.kernels.materialize == "never" else step.width * elements
    stored = run.lora.dtype if run.method == "full" else run.model.storage_dtype
    return 0 if stored == run.model.compute_dtype else step.width * elements


def _loss(model: DecoderConfig, run: Config, step: _Step) -> int:
    """A block of logits, of their exponentials and of the head, its part of the mean, the gradient
    of all positions, and of a trained head in float32."""
    rows, columns = min(ROWS, step.tokens), min(COLUMNS, model.vocab_size)
    block = rows * columns * (2 * FLOAT32 + step.width) + columns * step.hidden * step.width
    positions = (2 * rows + step.tokens) * step.hidden * FLOAT32
    head = model.vocab_size * step.hidden * FLOAT32 if run.method == "full" else 0
    return block + positions + head
