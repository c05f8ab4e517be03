"""Estimates the memory that XLA allocates on a device in the gradient of a training step.

The arrays that are saved of each layer follow from the code: JAX saves them for the backward pass.
These arrays, and the temporaries of the formulas, were compared with XLA's buffer assignment for
GPUs (`compile`).
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
from qlora_jax.models.rope import by_layer
from qlora_jax.models.weight_shapes import linears, norms
from qlora_jax.quant.dynamic8 import BLOCK
from qlora_jax.train.loss import COLUMNS, ROWS
from qlora_jax.train.offload import memory_of

FLOAT32 = 4


class _Step(NamedTuple):
    """Inputs of the formulas: widths of a layer, size of a micro-batch, bytes of an element.

    Attributes:
      hidden, query, key, inner: features of the layer's input, q, k (and v), and the MLP.
      heads: number of query heads.
      outputs: sum of the output features of the linears whose output the backward pass reads.
      norms: sum of the features of all norms and of the number of means that they compute.
      mlp: number of arrays of `inner` features that the MLP's elementwise part saves.
      ranks: sum of the ranks of a layer's adapters.
      dropped: sum of the input features of all adapters with dropout.
      scaled: sum of the output features of all linears that DoRA scales.
      width: bytes of an element in the compute dtype.
      rows, length: rows of a micro-batch on one device, and tokens of a row.
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
    """Estimates the bytes of activations, working set, decoded weights and loss.

    Args:
      model: shapes of the decoder.
      run: config of the run; dtypes, remat, rows and sequence length are read.
      ranks: path to rank: of each adapter of a layer, by the linear's path below the layer, and of
        the adapters of embedding and head.
    """
    parts, names = linears(model), model.names
    head_rank = ranks.get(HEAD, 0)
    ranks = {path: rank for path, rank in ranks.items() if path in parts}
    # The backward pass does not read outputs that are only added to x: those of the MLP, and of
    # attention in a parallel residual.
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
    # If layers have different ropes, each layer has its own angles.
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
    """Returns the number of pairs of channels that a head rotates."""
    return 0 if model.rope is None else int(model.head_dim * model.rope.fraction) // 2


def _normalized(model: DecoderConfig) -> int:
    """Counts the elements that a layer's norms read per token, plus the means that they compute."""
    heads = {model.names.q_norm: model.num_heads, model.names.k_norm: model.num_kv_heads}
    each = heads if model.qk_norm == "head" else {}
    return sum(each.get(path, 1) * (width + 1) for path, width in norms(model).items())


def _residuals(activation: str) -> int:
    """Counts the arrays that JAX saves for the gradient of an activation function."""
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
"""Policy of `decoder.REMAT` to the function of the bytes that a layer saves per token.

full: the layer's input. dots: the same, the outputs and normalizers of attention, the outputs of A
and of the linears whose output is not only added to x, and DoRA's outputs before scaling. none: the
norms' float32 inputs and results, the normalizers of attention, the inputs of all linears (with
dropout also the inputs after dropout and the mask), q, k and v, the parts of the activation
function, and DoRA's outputs before scaling, in float32. If few linears have adapters, slightly less
is saved.
"""


def _working_set(model: DecoderConfig, step: _Step) -> int:
    """Estimates the bytes of one layer's backward pass.

    They are all results of the layer's second forward pass, one block of attention scores twice in
    float32 and twice in the compute dtype, and the MLP's two gradients.
    """
    block = min(reference.QUERIES, step.length) * min(reference.KEYS, step.length)
    scores = step.rows * model.num_heads * block
    scores *= 2 * (FLOAT32 + step.width)
    inner = (step.mlp + 2) * step.inner * step.width
    parts = mlp_parts(step.rows, step.length, step.inner * step.width)
    outside = _everything(step) - step.mlp * step.inner * step.width
    return step.tokens * (outside + inner // parts) + scores


def _decoded(run: Config, step: _Step, elements: int) -> int:
    """Estimates the bytes of one layer's weights in the compute dtype, if stored in another dtype.

    All weights of the layer count, because XLA may decode all of them before the first product.
    """
    if run.method == "qlora":
        return 0 if run.kernels.materialize == "never" else step.width * elements
    stored = run.lora.dtype if run.method == "full" else run.model.storage_dtype
    return 0 if stored == run.model.compute_dtype else step.width * elements


def _loss(model: DecoderConfig, run: Config, step: _Step, head_rank: int) -> int:
    """Adds up the bytes of the loss.

    They are one block of logits, of their exponentials and of the head, the block's part of the
    mean, and the float32 gradients of all positions and of a trained head or of its B.
    """
    rows, columns = min(ROWS, step.tokens), min(COLUMNS, model.vocab_size)
    width = step.hidden + head_rank
    block = rows * columns * (2 * FLOAT32 + step.width) + columns * width * step.width
    positions = (2 * rows + step.tokens) * width * FLOAT32
    trained = step.hidden if run.method == "full" else head_rank
    return block + positions + model.vocab_size * trained * FLOAT32
