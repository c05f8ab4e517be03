"""A decoder layer and its norms as modules. Their weights are one layer's, or stacks of layers."""

import functools
from collections.abc import Callable, Mapping
from typing import cast

import jax
import jax.numpy as jnp
from flax import nnx

from qlora_jax.kernels.attention import attend
from qlora_jax.lora import dropout
from qlora_jax.lora.linear import LoraLinear, side_by_side
from qlora_jax.lora.variables import Vector
from qlora_jax.models.config import DecoderConfig
from qlora_jax.models.inputs import KVCache, LayerInputs, SharedInputs, Slots
from qlora_jax.models.rope import rotate
from qlora_jax.models.weight_shapes import linears, norms
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
"""Activation functions by their name in config.json; the keys equal `config.ACTIVATIONS`."""


Products = Callable[..., list[jax.Array]]
"""Function of (input x, *paths of linears). It returns the list of the products of x with them."""

MLP_BYTES = 2**28
"""Largest size in bytes of one array inside the MLP. A smaller limit gives more parts, and the
weights are decoded once for each part, which then takes noticeable time."""


class Norm(nnx.Module):
    """Normalization over the last axis in float32, by root mean square or as LayerNorm.

    Attributes:
      weight: weight, [..., features].
      bias: bias, [..., features], or None.
      kind: value of `DecoderConfig.norm`.
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
    """One decoder layer, or a stack of layers, with a leading axis on every weight.

    The linears and norms are attributes, named by the last part of their Hugging Face path, such
    as q_proj or input_layernorm.

    Attributes:
      attention: name of the implementation of `attend`; None: `attend` picks one.

    Args:
      config: shapes and switches of the decoder.
      weights: Hugging Face name in the layer to stack of the layers' weights; linears are
        [L, in, out].
    """

    def __init__(self, config: DecoderConfig, weights: Mapping[str, jax.Array | QTensor]):
        self.config = config
        self.attention: str | None = None
        for path in linears(config):
            bias = cast(jax.Array | None, weights.get(f"{path}.bias"))
            setattr(self, _attribute(path), LoraLinear(weights[f"{path}.weight"], bias))
        for path in norms(config):
            weight = cast(jax.Array, weights[f"{path}.weight"])
            bias = cast(jax.Array | None, weights.get(f"{path}.bias"))
            setattr(self, _attribute(path), Norm(config, weight, bias))

    def linears(self) -> dict[str, LoraLinear]:
        """Returns the linears by their path in the layer, such as self_attn.q_proj."""
        return {path: getattr(self, _attribute(path)) for path in linears(self.config)}

    def norms(self) -> dict[str, Norm]:
        """Returns the norms by their path in the layer, such as input_layernorm."""
        return {path: getattr(self, _attribute(path)) for path in norms(self.config)}

    def __call__(
        self,
        x: jax.Array,
        shared: SharedInputs,
        own: LayerInputs,
        slots: Slots | None = None,
        recompute: bool = False,
    ) -> tuple[jax.Array, KVCache | None]:
        """Computes one layer.

        Args:
          x: input, [B, T, hidden].
          shared: inputs that all layers share.
          own: inputs of this layer.
          slots: this layer's part of the KV cache, whose keys attention sees too; None: no cache.
          recompute: whether the backward pass recomputes the activations inside the MLP, one part
            of the rows at a time. False keeps them. Applies only if `mlp_parts` is above 1.

        Returns:
          Output [B, T, hidden]; the new keys and values [B, T, kv_heads, head_dim] for the cache,
          None without a cache.
        """
        config, names = self.config, self.config.names
        products = self._products(own.key)

        def norm(path: str, x: jax.Array) -> jax.Array:
            return getattr(self, _attribute(path))(x)

        h = norm(names.attention_norm, x) if config.pre_norms else x
        q, k, v = self._heads(h, products)
        if (turns := own.turns(shared)) is not None:
            q, k = rotate(q, *turns), rotate(k, *turns)
        new = None
        if slots is not None:
            new = KVCache(k.astype(slots.cache.k.dtype), v.astype(slots.cache.v.dtype))
            k, v = slots.put(new)
        scale, softcap = config.attention_scale, config.attention_softcap
        out = attend(
            *(q, k, v, *own.keys(shared)),
            scale=scale,
            softcap=softcap,
            implementation=self.attention,
        )
        (y,) = products(out, names.o_proj)
        if config.post_norms:
            y = norm(names.attention_post_norm, y)
        if config.parallel_residual:
            return x + y + self._mlp(norm(names.mlp_norm, x), own.key, recompute), new
        x = x + y
        y = self._mlp(norm(names.mlp_norm, x) if config.pre_norms else x, own.key, recompute)
        if config.post_norms:
            y = norm(names.mlp_post_norm, y)
        return x + y, new

    def _products(self, key: jax.Array | None) -> Products:
        """Returns the function that multiplies by linears; each linear has its own dropout key."""
        paths = list(linears(self.config))
        keys = (
            dict.fromkeys(paths)
            if key is None
            else dict(zip(paths, dropout.split(key, len(paths))))
        )

        def products(x: jax.Array, *paths: str) -> list[jax.Array]:
            found = [getattr(self, _attribute(path)) for path in paths]
            return side_by_side(found, x, [keys[path] for path in paths])

        return products

    def _heads(self, h: jax.Array, products: Products) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Returns queries, keys and values, [B, T, heads, head_dim], before the rotation."""
        config, names = self.config, self.config.names
        head = (*h.shape[:2], -1, config.head_dim)
        if config.fused_qkv == "interleaved":
            (qkv,) = products(h, names.qkv_proj)
            qkv = qkv.reshape(*h.shape[:2], -1, 3, config.head_dim)
            q, k, v = (qkv[..., i, :] for i in range(3))
        elif config.fused_qkv:
            query = config.num_heads * config.head_dim
            ends = query, query + config.num_kv_heads * config.head_dim
            (qkv,) = products(h, names.qkv_proj)
            q, k, v = jnp.split(qkv, ends, axis=-1)
        else:
            q, k, v = products(h, names.q_proj, names.k_proj, names.v_proj)
        if config.qk_norm == "head":
            q, k = q.reshape(head), k.reshape(head)
        if config.qk_norm:
            q, k = (
                getattr(self, _attribute(path))(x)
                for path, x in ((names.q_norm, q), (names.k_norm, k))
            )
        return q.reshape(head), k.reshape(head), v.reshape(head)

    def _mlp(self, h: jax.Array, key: jax.Array | None, recompute: bool) -> jax.Array:
        """Computes the MLP of h[B, T, hidden], one part of the sequence at a time (`mlp_parts`)."""
        batch, length, width = h.shape
        parts = mlp_parts(batch, length, self.config.intermediate_size * h.dtype.itemsize)
        if parts == 1:
            return self._mlp_part(h, self._products(key))

        def part(xs: tuple[jax.Array, jax.Array]) -> jax.Array:
            h, i = xs
            own = None if key is None else dropout.fold_in(key, i)
            return self._mlp_part(h, self._products(own))

        split = jnp.moveaxis(h.reshape(batch, parts, length // parts, width), 1, 0)
        part = jax.checkpoint(part) if recompute else part
        y = jax.lax.map(part, (split, jnp.arange(parts)))
        return jnp.moveaxis(y, 0, 1).reshape(h.shape)

    def _mlp_part(self, h: jax.Array, products: Products) -> jax.Array:
        config, names = self.config, self.config.names
        act = ACTIVATIONS[config.activation]
        if config.fused_gate_up:
            (both,) = products(h, names.gate_up_proj)
            gate, up = jnp.split(both, 2, axis=-1)
            inside = act(gate) * up
        elif config.gated:
            gate, up = products(h, names.gate_proj, names.up_proj)
            inside = act(gate) * up
        else:
            (up,) = products(h, names.up_proj)
            inside = act(up)
        return products(inside, names.down_proj)[0]


def mlp_parts(batch: int, length: int, row_bytes: int) -> int:
    """Returns the number of equal parts into which the MLP divides a sequence.

    Args:
      batch: number of sequences.
      length: number of tokens in a sequence.
      row_bytes: bytes of one token's activations inside the MLP (one array).

    Returns:
      The smallest divisor n of `length` for which a part takes at most `MLP_BYTES`. 1 if no n
      below twice the needed number of parts divides `length`.
    """
    least = -(-batch * length * row_bytes // MLP_BYTES)
    return next((n for n in range(least, 2 * least) if length % n == 0), 1)


def _attribute(path: str) -> str:
    return path.rpartition(".")[2]
