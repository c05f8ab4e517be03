"""Estimates what XLA allocates on a device within a training step's gradient.

What is kept of every layer follows from the code and is what JAX saves; that XLA keeps just that,
and what it needs for a moment, was compared with its buffer assignment for GPUs (`compile`).
"""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

from qlora_jax.config import Config
from qlora_jax.kernels.attention import reference
from qlora_jax.models.config import DecoderConfig
from qlora_jax.models.families import HEAD
from qlora_jax.models.layers import ACTIVATIONS, mlp_parts
from qlora_jax.models.parts import linears, norms
from qlora_jax.models.rope import by_layer
from qlora_jax.quant.dynamic8 import BLOCK
from qlora_jax.train.loss import COLUMNS, ROWS
from qlora_jax.train.offload import memory_of

FLOAT32 = 4


class _Step(NamedTuple):
    """What the formulas have in common: widths of a layer, and bytes of the compute dtype.

    Attributes:
      hidden, query, key, inner: features of the layer's input, q, k (and v), and the MLP.
      heads: of queries.
      outputs: of all linears, summed, as far as the backward pass reads them.
      norms: features of all norms, and how many means they take, summed.
      mlp: arrays as wide as `inner` that the MLP's elementwise part keeps.
      ranks: of all adapters of a layer, summed.
      dropped: input features of all adapters that drop some of theirs, summed.
      scaled: output features of all linears that DoRA scales, summed.
      width: bytes of an element in the compute dtype.
      rows, length: of a micro-batch.
    """

    hidden: int
    query: int
    key: int
    inner: int
    heads: int
    outputs: int
    norms: int
    mlp: int
    ranks: int
    dropped: int
    scaled: int
    width: int
    rows: int
    length: int

    @property
    def tokens(self) -> int:
        return self.rows * self.length


def estimates(model: DecoderConfig, run: Config, ranks: Mapping[str, int]) -> dict[str, int]:
    """Estimates bytes by part.

    Args:
      model: shapes of the decoder.
      run: dtypes, remat, rows and their length are read.
      ranks: rank of each of a layer's adapters, by the linear's path below the layer, and of those
        of embedding and head, by their paths.
    """
    parts, names = linears(model), model.names
    head_rank = ranks.get(HEAD, 0)
    ranks = {path: rank for path, rank in ranks.items() if path in parts}
    # what is only added to x is not read again: the MLP's, and attention's beside it
    added = set() if model.post_norms else {names.down_proj}
    added |= {names.o_proj} if model.parallel_residual else set()
    step = _Step(
        hidden=model.hidden_size,
        query=model.num_heads * model.head_dim,
        key=model.num_kv_heads * model.head_dim,
        inner=model.intermediate_size,
        heads=model.num_heads,
        outputs=sum(linear.outputs for path, linear in parts.items() if path not in added),
        norms=_normalized(model),
        mlp=_residuals(model.activation) + (3 if model.gated else 1),
        ranks=sum(ranks.values()),
        dropped=sum(parts[path].inputs for path in ranks) if run.lora.dropout else 0,
        scaled=sum(parts[path].outputs for path in ranks) if run.lora.variant == "dora" else 0,
        width=jnp.dtype(run.model.compute_dtype).itemsize,
        rows=run.train.batch_size // run.mesh.devices,
        length=run.data.sequence_length,
    )
    remat = memory_of(run).remat
    kept = KEPT[remat]
    if run.model.layer_inputs == "int8" and kept is _input:
        kept = _input_in_8_bits
    # where ropes differ, a layer's angles are its own
    inside = model.num_layers * (remat == "none")
    ropes = len(by_layer(model)[0])
    turns = inside if inside and ropes > 1 else ropes
    rotated = 2 * FLOAT32 * _angles(model)
    outside = 2 * FLOAT32 * (step.hidden + 1) + turns * rotated
    return {
        "activations": step.tokens * (model.num_layers * kept(step) + outside),
        "layer's working set": _working_set(model, step),
        "decoded weights": _decoded(
            run, step, sum(linear.inputs * linear.outputs for linear in parts.values())
        ),
        "loss": _loss(model, run, step, head_rank),
    }


def _angles(model: DecoderConfig) -> int:
    """Returns how many pairs of channels a head rotates."""
    return 0 if model.rope is None else int(model.head_dim * model.rope.fraction) // 2


def _normalized(model: DecoderConfig) -> int:
    """Counts the elements that a layer's norms read per token, and the means they take."""
    heads = {model.names.q_norm: model.num_heads, model.names.k_norm: model.num_kv_heads}
    each = heads if model.qk_norm == "head" else {}
    return sum(each.get(path, 1) * (width + 1) for path, width in norms(model).items())


def _residuals(activation: str) -> int:
    """Counts the arrays that the gradient of an activation function keeps, which is up to jax."""
    x = jax.ShapeDtypeStruct((2,), jnp.bfloat16)
    saved = jax.eval_shape(lambda x: jax.tree.leaves(jax.vjp(ACTIVATIONS[activation], x)[1]), x)
    return sum(s.shape == x.shape and s.dtype == x.dtype for s in saved)


def _everything(step: _Step) -> int:
    inputs = 2 * step.hidden + 2 * step.query + 2 * step.key + step.mlp * step.inner + step.ranks
    adapters = (step.width + 1) * step.dropped + FLOAT32 * step.scaled
    return FLOAT32 * (2 * step.norms + step.heads) + step.width * inputs + adapters


def _products(step: _Step) -> int:
    products = step.hidden + step.query + step.outputs + step.ranks + step.scaled
    return step.width * products + FLOAT32 * step.heads


def _input(step: _Step) -> int:
    return step.width * step.hidden


def _input_in_8_bits(step: _Step) -> int:
    return step.hidden + FLOAT32 * step.hidden // BLOCK


KEPT = {"none": _everything, "dots": _products, "full": _input, "host": _input}
"""`decoder.REMAT`'s policies, each with the bytes that a layer keeps per token.

full: the layer's input. dots: also the outputs and normalizers of attention, and the outputs of A
and of the linears, but of those that are only added to x, and DoRA's before they are scaled. none:
the norms' float32 inputs and results, the normalizers of attention, the inputs of all linears (with
dropout, what is left of them, and the mask), q, k and v, the parts of the activation function, and
what DoRA scales in float32. Where few linears have adapters, a little less is kept.
"""


def _working_set(model: DecoderConfig, step: _Step) -> int:
    """Estimates a layer's backward pass: all that its second forward pass gives, the scores of some
    queries twice in float32 and twice in the compute dtype, and the MLP's two gradients."""
    block = min(reference.QUERIES, step.length) * min(reference.KEYS, step.length)
    scores = step.rows * model.num_heads * block
    scores *= 2 * (FLOAT32 + step.width)
    inner = (step.mlp + 2) * step.inner * step.width
    parts = mlp_parts(step.rows, step.length, step.inner * step.width)
    outside = _everything(step) - step.mlp * step.inner * step.width
    return step.tokens * (outside + inner // parts) + scores


def _decoded(run: Config, step: _Step, elements: int) -> int:
    """Estimates a layer's weights in the compute dtype, where they are not stored in it: nothing
    keeps XLA from decoding all of them before it multiplies by the first."""
    if run.method == "qlora":
        return 0 if run.kernels.materialize == "never" else step.width * elements
    stored = run.lora.dtype if run.method == "full" else run.model.storage_dtype
    return 0 if stored == run.model.compute_dtype else step.width * elements


def _loss(model: DecoderConfig, run: Config, step: _Step, head_rank: int) -> int:
    """Adds up a block of logits, of their exponentials and of the head, its part of the mean, and
    the gradients of all positions and of a trained head or of its B, in float32."""
    rows, columns = min(ROWS, step.tokens), min(COLUMNS, model.vocab_size)
    width = step.hidden + head_rank
    block = rows * columns * (2 * FLOAT32 + step.width) + columns * width * step.width
    positions = (2 * rows + step.tokens) * width * FLOAT32
    trained = step.hidden if run.method == "full" else head_rank
    return block + positions + model.vocab_size * trained * FLOAT32
