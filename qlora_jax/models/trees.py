"""Splits a model into plain pytrees, trained and frozen, and names and counts their leaves."""

import hashlib
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx

from qlora_jax.lora import LoraParam, Weight
from qlora_jax.models.decoder import Decoder
from qlora_jax.quant import QTensor, nbytes

TRAINED = {"qlora": LoraParam, "lora": LoraParam, "full": Weight}
"""Method to the kind of variable that it trains; all other variables are frozen."""


class SplitModel(NamedTuple):
    """A model as a structure and two trees; the leaves are arrays or shapes.

    Attributes:
      graph: structure of the model.
      trained: tree of the trained variables.
      frozen: tree of all other variables.
    """

    graph: nnx.GraphDef
    trained: nnx.State
    frozen: nnx.State


def split(model: Decoder, method: str) -> SplitModel:
    """Splits a model. `nnx.merge(*parts)` builds the model again, also inside `jax.jit`."""
    graph, *states = nnx.split(model, TRAINED[method], ...)
    return SplitModel(graph, states[0], states[1])


def flatten(tree: Any, is_leaf: Callable[[Any], bool] | None = None) -> dict[str, Any]:
    """Returns the leaves of a tree by dotted path (runs.0.q_proj.adapter.a), in the tree's order.

    Args:
      tree: any pytree.
      is_leaf: function that makes a subtree, such as a QTensor, one leaf, as in
        `jax.tree.flatten`.
    """
    leaves = jax.tree_util.tree_flatten_with_path(tree, is_leaf)[0]
    return {".".join(_key(k) for k in path if _key(k)): leaf for path, leaf in leaves}


def sha256(tree: Any) -> str:
    """Returns SHA-256 of every leaf's path, dtype, shape and bytes, as hex."""
    digest = hashlib.sha256()
    for path, leaf in flatten(tree).items():
        array = np.ascontiguousarray(leaf)
        digest.update(f"{path} {array.dtype} {array.shape}".encode())
        digest.update(array.view(np.uint8).data)
    return digest.hexdigest()


def quantized_size(model: Decoder) -> tuple[float, int]:
    """Returns (bits per parameter, bytes) of all quantized weights, with scales and codebooks.

    Both are 0 if no weight is quantized.
    """
    weights = jax.tree.leaves(nnx.state(model, Weight), is_leaf=lambda x: isinstance(x, QTensor))
    quantized = [w for w in weights if isinstance(w, QTensor)]
    size = nbytes(quantized)
    return 8 * size / max(sum(math.prod(w.shape) for w in quantized), 1), size


def parameter_counts(model: Decoder, method: str) -> tuple[int, int]:
    """Returns the numbers (trained, total) of parameters.

    The total is the number of elements of the pretrained weights (of the matrix that a QTensor
    represents) plus those of the adapters. The zero padding of smaller ranks is not counted.
    """
    weights = jax.tree.leaves(nnx.state(model, Weight), is_leaf=lambda x: isinstance(x, QTensor))
    base = sum(math.prod(w.shape) for w in weights)
    sizes = [
        linear.adapter.sizes()
        for run in model.runs
        for linear in run.linears().values()
        if linear.adapter is not None
    ]
    sizes += [adapter.sizes() for adapter in model.outer_adapters().values()]
    trained, adapters = (sum(column) for column in zip(*sizes)) if sizes else (0, 0)
    return (base if method == "full" else trained), base + adapters


def _key(entry: Any) -> str:
    name = str(getattr(entry, "key", getattr(entry, "idx", getattr(entry, "name", entry))))
    return "" if name == "value" else name
