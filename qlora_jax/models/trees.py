"""A model as plain pytrees: what is trained, what is frozen, and how their leaves are named."""

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
"""Method to the kind of variable that is differentiated and updated; the rest is frozen."""


class SplitModel(NamedTuple):
    """A model taken apart, of arrays or of shapes.

    Attributes:
      graph: its structure.
      trained: the trained tree.
      frozen: the rest.
    """

    graph: nnx.GraphDef
    trained: nnx.State
    frozen: nnx.State


def split(model: Decoder, method: str) -> SplitModel:
    """Takes a model apart; `nnx.merge(*parts)` puts it together again, inside jit as well."""
    graph, *states = nnx.split(model, TRAINED[method], ...)
    return SplitModel(graph, states[0], states[1])


def flatten(tree: Any, is_leaf: Callable[[Any], bool] | None = None) -> dict[str, Any]:
    """Leaves by a dotted path such as runs.0.q_proj.adapter.a, in the tree's own order.

    Args:
      tree: any pytree.
      is_leaf: as `jax.tree.flatten` takes it; a QTensor, say, may count as one leaf.
    """
    leaves = jax.tree_util.tree_flatten_with_path(tree, is_leaf)[0]
    return {".".join(_key(k) for k in path if _key(k)): leaf for path, leaf in leaves}


def sha256(tree: Any) -> str:
    """Digest of every leaf's path, dtype, shape and bytes, as hex."""
    digest = hashlib.sha256()
    for path, leaf in flatten(tree).items():
        array = np.ascontiguousarray(leaf)
        digest.update(f"{path} {array.dtype} {array.shape}".encode())
        digest.update(array.view(np.uint8).data)
    return digest.hexdigest()


def quantized_size(model: Decoder) -> tuple[float, int]:
    """(bits per parameter, bytes) of the quantized weights, scales and codebooks included.

    Both are 0 where there are none.
    """
    weights = jax.tree.leaves(nnx.state(model, Weight), is_leaf=lambda x: isinstance(x, QTensor))
    quantized = [w for w in weights if isinstance(w, QTensor)]
    size = nbytes(quantized)
    return 8 * size / max(sum(math.prod(w.shape) for w in quantized), 1), size


def parameter_counts(model: Decoder, method: str) -> tuple[int, int]:
    """(trained, total) parameters; zero padding of mixed ranks is not counted.

    The total holds the pretrained weights and the adapters, a quantized weight counted by the
    elements it stands for.
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
