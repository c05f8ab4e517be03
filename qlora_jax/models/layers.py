"""The parts of a decoder layer as modules over (stacks of) weights."""

from collections.abc import Mapping
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
from flax import nnx

from qlora_jax.kernels import dense, kept, matmul
from qlora_jax.lora import Adapter
from qlora_jax.models.attention import attend
from qlora_jax.models.config import DecoderConfig
from qlora_jax.models.rope import rotate
from qlora_jax.quant import QTensor

LINEARS = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)
"""A layer's linears, as Hugging Face names them below `model.layers.N`."""

NORMS = ("input_layernorm", "post_attention_layernorm")


class KVCache(NamedTuple):
    """Keys and values [L, B, S, kv_heads, head_dim]; slot s holds position s."""

    k: jax.Array
    v: jax.Array


class Slots(NamedTuple):
    """A layer's part of the cache [B, S, ...] and the positions [B, T] of its input."""

    cache: KVCache
    positions: jax.Array

    def put(self, new: KVCache) -> KVCache:
        """The layer's cache with keys and values [B, T, kv_heads, head_dim] in their slots."""
        rows = jnp.arange(new.k.shape[0])[:, None]
        return jax.tree.map(lambda all, x: all.at[rows, self.positions].set(x), self.cache, new)


class Weight(nnx.Param):
    """A pretrained weight: an array or a QTensor. Trained by method full only."""


class Linear(nnx.Module):
    """x @ W + bias, plus an adapter where one was attached.

    Attributes:
      weight: [..., in, out], an array or a QTensor.
      bias: [..., out] or None.
      adapter: None until `attach` sets it.
      implementation: of `matmul`; None until `use_kernel` sets it.
    """

    def __init__(self, weight: jax.Array | QTensor, bias: jax.Array | None = None):
        self.weight = Weight(weight)
        self.bias = None if bias is None else Weight(bias)
        self.adapter: Adapter | None = None
        self.implementation: str | None = None

    def __call__(self, x: jax.Array, key: jax.Array | None = None) -> jax.Array:
        def multiply(x: jax.Array) -> jax.Array:
            return project(x, self.weight.get_value(), self.implementation)

        y = multiply(x) if self.adapter is None else self.adapter.product(x, multiply, key)
        if self.bias is not None:
            y = y + self.bias.get_value().astype(x.dtype)
        return kept(y)


def project(
    x: jax.Array, weight: jax.Array | QTensor, implementation: str | None = None
) -> jax.Array:
    """x @ weight in x's dtype, accumulated in float32; `implementation` is `matmul`'s."""
    if isinstance(weight, QTensor):
        return matmul(x, weight, implementation)
    return dense(x, weight)


class RMSNorm(nnx.Module):
    """Root-mean-square normalization in float32; weight [..., features]."""

    def __init__(self, weight: jax.Array, eps: float):
        self.weight = Weight(weight)
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        wide = x.astype(jnp.float32)
        scale = jax.lax.rsqrt(jnp.mean(wide**2, axis=-1, keepdims=True) + self.eps)
        return (wide * scale).astype(x.dtype) * self.weight.get_value().astype(x.dtype)


class Layer(nnx.Module):
    """One pre-norm decoder layer, or a stack of them with a leading axis on every weight.

    Args:
      config: shapes and switches.
      weights: Hugging Face's names below `model.layers.N.` to stacks, linears [L, in, out].
    """

    q_proj: Linear
    k_proj: Linear
    v_proj: Linear
    o_proj: Linear
    gate_proj: Linear
    up_proj: Linear
    down_proj: Linear
    input_layernorm: RMSNorm
    post_attention_layernorm: RMSNorm

    def __init__(self, config: DecoderConfig, weights: Mapping[str, jax.Array | QTensor]):
        self.config = config
        for path in LINEARS:
            name = path.rpartition(".")[2]
            bias = cast(jax.Array | None, weights.get(f"{path}.bias"))
            setattr(self, name, Linear(weights[f"{path}.weight"], bias))
        for name in NORMS:
            setattr(
                self, name, RMSNorm(cast(jax.Array, weights[f"{name}.weight"]), config.rms_norm_eps)
            )

    def linears(self) -> dict[str, Linear]:
        """The seven linears by their path below the layer, such as self_attn.q_proj."""
        return {path: getattr(self, path.rpartition(".")[2]) for path in LINEARS}

    def __call__(
        self,
        x: jax.Array,
        rope: tuple[jax.Array, jax.Array],
        mask: jax.Array,
        key: jax.Array | None,
        slots: Slots | None = None,
    ) -> tuple[jax.Array, KVCache | None]:
        """One layer on x[B, T, hidden]; with slots, over the cache too.

        Returns:
          x, and the keys and values [B, T, kv_heads, head_dim] to write to the cache, if any.
        """
        keys = (
            dict.fromkeys(LINEARS) if key is None else dict(zip(LINEARS, jax.random.split(key, 7)))
        )
        head = (*x.shape[:2], -1, self.config.head_dim)
        h = self.input_layernorm(x)
        q = rotate(self.q_proj(h, keys["self_attn.q_proj"]).reshape(head), *rope)
        k = rotate(self.k_proj(h, keys["self_attn.k_proj"]).reshape(head), *rope)
        v = self.v_proj(h, keys["self_attn.v_proj"]).reshape(head)
        new = None
        if slots is not None:
            new = KVCache(k.astype(slots.cache.k.dtype), v.astype(slots.cache.v.dtype))
            k, v = slots.put(new)
        out = kept(attend(q, k, v, mask).reshape(*x.shape[:2], -1))
        x = x + self.o_proj(out, keys["self_attn.o_proj"])
        h = self.post_attention_layernorm(x)
        gate = self.gate_proj(h, keys["mlp.gate_proj"])
        up = self.up_proj(h, keys["mlp.up_proj"])
        return x + self.down_proj(jax.nn.silu(gate) * up, keys["mlp.down_proj"]), new
