"""The parts of a decoder layer as modules over (stacks of) weights."""

import functools
from collections.abc import Callable, Mapping
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
from flax import nnx

from qlora_jax.kernels import kept
from qlora_jax.lora.linear import LoraLinear
from qlora_jax.lora.variables import Vector
from qlora_jax.models.attention import attend
from qlora_jax.models.config import DecoderConfig
from qlora_jax.models.parts import linears, norms
from qlora_jax.models.rope import rotate
from qlora_jax.quant import QTensor

ACTIVATIONS: Mapping[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_pytorch_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),
    "relu6": jax.nn.relu6,
    "leaky_relu": jax.nn.leaky_relu,
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "mish": jax.nn.mish,
    "hardswish": jax.nn.hard_swish,
    "sigmoid": jax.nn.sigmoid,
    "tanh": jnp.tanh,
    "linear": lambda x: x,
}
"""By their names in config.json; `config.ACTIVATIONS` are its keys."""


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


class Norm(nnx.Module):
    """Normalization over the last axis in float32, by root mean square or as LayerNorm.

    Attributes:
      weight: [..., features].
      bias: the same, or None.
      kind: `DecoderConfig.norm`.
    """

    def __init__(self, config: DecoderConfig, weight: jax.Array, bias: jax.Array | None = None):
        self.weight = Vector(weight)
        self.bias = None if bias is None else Vector(bias)
        self.kind = config.norm
        self.eps = config.norm_eps

    def __call__(self, x: jax.Array) -> jax.Array:
        wide = x.astype(jnp.float32)
        if self.kind == "layer":
            wide = wide - jnp.mean(wide, axis=-1, keepdims=True)
        scale = jax.lax.rsqrt(jnp.mean(wide**2, axis=-1, keepdims=True) + self.eps)
        weight = self.weight.get_value()
        if self.kind == "rms":
            return (wide * scale).astype(x.dtype) * weight.astype(x.dtype)
        weight = weight.astype(jnp.float32)
        y = wide * scale * (1 + weight if self.kind == "rms_offset" else weight)
        if self.bias is not None:
            y = y + self.bias.get_value().astype(jnp.float32)
        return y.astype(x.dtype)


class Layer(nnx.Module):
    """One decoder layer, or a stack of them with a leading axis on every weight.

    Its linears and norms are attributes by the last part of their Hugging Face path, such as
    q_proj or input_layernorm.

    Args:
      config: shapes and switches.
      weights: Hugging Face's names below the layer to stacks, linears [L, in, out].
    """

    def __init__(self, config: DecoderConfig, weights: Mapping[str, jax.Array | QTensor]):
        self.config = config
        for path in linears(config):
            bias = cast(jax.Array | None, weights.get(f"{path}.bias"))
            setattr(self, _attribute(path), LoraLinear(weights[f"{path}.weight"], bias))
        for path in norms(config):
            weight = cast(jax.Array, weights[f"{path}.weight"])
            bias = cast(jax.Array | None, weights.get(f"{path}.bias"))
            setattr(self, _attribute(path), Norm(config, weight, bias))

    def linears(self) -> dict[str, LoraLinear]:
        """The linears by their path below the layer, such as self_attn.q_proj."""
        return {path: getattr(self, _attribute(path)) for path in linears(self.config)}

    def norms(self) -> dict[str, Norm]:
        """The norms by their path below the layer, such as input_layernorm."""
        return {path: getattr(self, _attribute(path)) for path in norms(self.config)}

    def __call__(
        self,
        x: jax.Array,
        rope: tuple[jax.Array, jax.Array] | None,
        mask: jax.Array,
        key: jax.Array | None,
        slots: Slots | None = None,
    ) -> tuple[jax.Array, KVCache | None]:
        """One layer on x[B, T, hidden]; with slots, over the cache too.

        Returns:
          x, and the keys and values [B, T, kv_heads, head_dim] to write to the cache, if any.
        """
        config, names = self.config, self.config.names
        paths = list(linears(config))
        keys = (
            dict.fromkeys(paths)
            if key is None
            else dict(zip(paths, jax.random.split(key, len(paths))))
        )

        def linear(path: str, x: jax.Array) -> jax.Array:
            return getattr(self, _attribute(path))(x, keys[path])

        def norm(path: str, x: jax.Array) -> jax.Array:
            return getattr(self, _attribute(path))(x)

        h = norm(names.attention_norm, x) if config.pre_norms else x
        q, k, v = self._heads(h, linear)
        if rope is not None:
            q, k = rotate(q, *rope), rotate(k, *rope)
        new = None
        if slots is not None:
            new = KVCache(k.astype(slots.cache.k.dtype), v.astype(slots.cache.v.dtype))
            k, v = slots.put(new)
        out = attend(q, k, v, mask, scale=config.attention_scale, softcap=config.attention_softcap)
        y = linear(names.o_proj, kept(out.reshape(*x.shape[:2], -1)))
        if config.post_norms:
            y = norm(names.attention_post_norm, y)
        if config.parallel_residual:
            return x + y + self._mlp(norm(names.mlp_norm, x), linear), new
        x = x + y
        y = self._mlp(norm(names.mlp_norm, x) if config.pre_norms else x, linear)
        if config.post_norms:
            y = norm(names.mlp_post_norm, y)
        return x + y, new

    def _heads(
        self, h: jax.Array, linear: Callable[[str, jax.Array], jax.Array]
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Queries, keys and values [B, T, heads, head_dim] before their rotation."""
        config, names = self.config, self.config.names
        head = (*h.shape[:2], -1, config.head_dim)
        if config.fused_qkv == "interleaved":
            qkv = linear(names.qkv_proj, h).reshape(*h.shape[:2], -1, 3, config.head_dim)
            q, k, v = (qkv[..., i, :] for i in range(3))
        elif config.fused_qkv:
            query = config.num_heads * config.head_dim
            ends = query, query + config.num_kv_heads * config.head_dim
            q, k, v = jnp.split(linear(names.qkv_proj, h), ends, axis=-1)
        else:
            q, k, v = (linear(path, h) for path in (names.q_proj, names.k_proj, names.v_proj))
        if config.qk_norm == "head":
            q, k = q.reshape(head), k.reshape(head)
        if config.qk_norm:
            q, k = (
                getattr(self, _attribute(path))(x)
                for path, x in ((names.q_norm, q), (names.k_norm, k))
            )
        return q.reshape(head), k.reshape(head), v.reshape(head)

    def _mlp(self, h: jax.Array, linear: Callable[[str, jax.Array], jax.Array]) -> jax.Array:
        config, names = self.config, self.config.names
        act = ACTIVATIONS[config.activation]
        if config.fused_gate_up:
            gate, up = jnp.split(linear(names.gate_up_proj, h), 2, axis=-1)
            return linear(names.down_proj, act(gate) * up)
        if config.gated:
            gate = linear(names.gate_proj, h)
            return linear(names.down_proj, act(gate) * linear(names.up_proj, h))
        return linear(names.down_proj, act(linear(names.up_proj, h)))


def _attribute(path: str) -> str:
    return path.rpartition(".")[2]
