"""Makes tunix's Gemma 3 in NF4 with adapters, by this library and by qwix, from the same weights.

Rank and alpha are also the same. The bodies of `ours` and `with_qwix` are the code that a user
writes; all other code is common to both sides.
"""

import ast
import inspect
import textwrap
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import qlora_jax as qj
from experiments.other_models import tunix
from qlora_jax.modules.variables import QWeight

RANK, ALPHA, BLOCK = 16, 32.0, 64

Adapted = Callable[[Any], Any]
"""A function that takes an unmodified model and returns one with 4-bit weights and adapters."""

SHAPES: dict[str, dict[str, int]] = {
    "tiny": {"num_embed": 128, "num_layers": 2, "embed_dim": 64, "hidden_dim": 128, "head_dim": 16},
    "small": {
        "num_embed": 2048,
        "num_layers": 6,
        "embed_dim": 256,
        "hidden_dim": 1024,
        "head_dim": 64,
    },
}
"""Name to the settings in which shapes differ; every shape has 4 heads and 2 KV heads."""


def sizes_of(shape: str, dtype: str) -> dict[str, Any]:
    """Returns the arguments of the model's configuration."""
    own = {**SHAPES[shape], "sliding_window_size": 32, "param_dtype": jnp.dtype(dtype)}
    return tunix.SIZES | own


def gemma3(shape: str, dtype: str, **changes: Any) -> Any:
    """Returns Gemma 3 with random weights, which are the same in every call."""
    return tunix.gemma3(0, **(sizes_of(shape, dtype) | changes))


def ours(model: Any) -> Any:
    """Quantizes and adapts the model with this library, as a user writes it."""
    where = r"layers\.\d+\.(attn\.(q|kv)_einsum\.w|mlp\.\w+_proj\.kernel)"
    qj.quantize_model(model, where, block_size=BLOCK)
    return qj.add_lora(model, where, rank=RANK, alpha=ALPHA, rngs=nnx.Rngs(1))


def like_qwix(model: Any) -> Any:
    """Does as `ours` with qwix's choices: no double quantization, A and B in the model's dtype."""
    where = r"layers\.\d+\.(attn\.(q|kv)_einsum\.w|mlp\.\w+_proj\.kernel)"
    dtype = jnp.dtype(model.config.param_dtype).name
    qj.quantize_model(model, where, block_size=BLOCK, double_quant=False)
    return qj.add_lora(model, where, rank=RANK, alpha=ALPHA, dtype=dtype, rngs=nnx.Rngs(1))


def with_qwix(model: Any) -> Any:
    """Quantizes and adapts the model with qwix, as tunix's examples for Gemma do."""
    import qwix

    provider = qwix.LoraProvider(
        module_path=".*q_einsum|.*kv_einsum|.*gate_proj|.*down_proj|.*up_proj",
        rank=RANK,
        alpha=ALPHA,
        weight_qtype="nf4",
        tile_size=BLOCK,
    )
    inputs = model.get_model_input()
    return qwix.apply_lora_to_model(model, provider, rngs=nnx.Rngs(1), **inputs)


SIDES: dict[str, Adapted] = {
    "ours": ours,
    "ours, set as qwix is": like_qwix,
    "qwix": with_qwix,
}


def code_of(function: Adapted) -> tuple[int, int]:
    """Counts the lines and statements of a function's body, without docstring and imports."""
    (tree,) = ast.parse(textwrap.dedent(inspect.getsource(function))).body
    assert isinstance(tree, ast.FunctionDef)
    body = tree.body[1:] if ast.get_docstring(tree) else tree.body
    code = [s for s in body if not isinstance(s, ast.Import | ast.ImportFrom)]
    return sum((s.end_lineno or s.lineno) - s.lineno + 1 for s in code), len(code)


class Stored(NamedTuple):
    """A 4-bit weight of either library.

    Attributes:
      arrays: arrays that store the weight: codes, scales and others.
      weight: decoded weight, in the shape that the model uses.
      block: number of weights that share one scale.
    """

    arrays: list[jax.Array]
    weight: np.ndarray
    block: int


def stored(model: Any) -> dict[str, Stored]:
    """Returns the quantized weights of a model of either library, by dotted path."""
    return dict(_stored(model))


def _stored(model: Any) -> Iterator[tuple[str, Stored]]:
    for path, module in nnx.iter_modules(model):
        for name, value in vars(module).items():
            if isinstance(value, QWeight):
                q, weight = value.get_raw_value(), value[...]
                block = q.block_size
            elif hasattr(getattr(value, "array", None), "scale"):  # qwix's WithAux
                import qwix

                q = qwix.QArray(value.array.qvalue[...], value.array.scale[...], qtype="nf4")
                weight, block = qwix.dequantize(q), q.qvalue.size // q.scale.size
            else:
                continue
            whole = np.asarray(weight, np.float32)
            yield ".".join(map(str, (*path, name))), Stored(jax.tree.leaves(q), whole, block)


def bits(x: jax.Array) -> int:
    """Returns the bits of an array whose elements are packed: 4 for each uint4."""
    integer = jnp.issubdtype(x.dtype, jnp.integer)
    return x.size * (jnp.iinfo(x.dtype).bits if integer else 8 * x.dtype.itemsize)
