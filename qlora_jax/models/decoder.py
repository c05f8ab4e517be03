"""The decoder of all families: embedding, scanned layers, norm and head."""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from qlora_jax.kernels import KEPT
from qlora_jax.kernels.dense import product
from qlora_jax.lora import (
    Adapter,
    AdapterSpec,
    LoraLinear,
    LoraSet,
    LoraWeights,
    Weight,
    dropout,
    init_adapter,
    init_embedding,
)
from qlora_jax.lora.variants import VARIANTS
from qlora_jax.models.config import DecoderConfig
from qlora_jax.models.families import HEAD
from qlora_jax.models.inputs import (
    KVCache,
    LayerInputs,
    SharedInputs,
    Slots,
    own_inputs,
    shared_inputs,
)
from qlora_jax.models.layers import Layer, Norm
from qlora_jax.models.rope import segment_lengths
from qlora_jax.models.visible import in_segments, up_to
from qlora_jax.quant import QTensor, stack
from qlora_jax.quant.sharded import Sharded, looked_up, whole

INPUT = "layer input"
"""Name of a layer's input for the policies of `jax.checkpoint`."""

REMAT: Mapping[str, Callable[[Callable], Callable]] = {
    "none": lambda f: f,
    "dots": functools.partial(
        jax.checkpoint, policy=jax.checkpoint_policies.save_only_these_names(KEPT)
    ),
    "full": jax.checkpoint,
    "host": functools.partial(
        jax.checkpoint,
        policy=jax.checkpoint_policies.save_and_offload_only_these_names(
            names_which_can_be_saved=[],
            names_which_can_be_offloaded=[INPUT],
            offload_src="device",
            offload_dst="pinned_host",
        ),
    ),
}
"""Name of a remat policy to the function that wraps a layer.

The policy decides which values of the forward pass are saved for the backward pass."""

WHOLE_LAYERS = ("full", "host")
"""Keys of `REMAT` with which the backward pass recomputes whole layers."""


class Decoder(nnx.Module):
    """A causal language model over stacked weights.

    Attributes:
      embed: embedding, [vocab, hidden].
      runs: stacks of layers with identical structure, in order; usually one stack.
      norm: final norm.
      head: head, [hidden, vocab]; None: the head is the transpose of the embedding.
      positions: learned position table, [rows, hidden], or None.
      embed_adapter: adapter of the embedding, A [vocab, r] and B [r, hidden], or None. It does not
        change a head that is tied to the embedding.
      head_adapter: adapter of the head, A [hidden, r] and B [r, vocab], or None. It does not
        change an embedding that is tied to the head.
    """

    def __init__(
        self,
        config: DecoderConfig,
        embed: jax.Array,
        runs: Sequence[Mapping[str, jax.Array | QTensor]],
        norm: jax.Array,
        head: jax.Array | None,
        norm_bias: jax.Array | None = None,
        positions: jax.Array | None = None,
    ):
        self.config = config
        self.embed = Weight(embed)
        self.runs = nnx.List([Layer(config, weights) for weights in runs])
        self.norm = Norm(config, norm, norm_bias)
        self.head = None if head is None else Weight(head)
        self.positions = None if positions is None else Weight(positions)
        self.embed_adapter: Adapter | None = None
        self.head_adapter: Adapter | None = None

    def hidden(
        self,
        tokens: jax.Array,
        segments: jax.Array,
        positions: jax.Array,
        *,
        dtype: jax.typing.DTypeLike,
        remat: str = "none",
        key: jax.Array | None = None,
    ) -> jax.Array:
        """Returns the normalized output of the last layer.

        Args:
          tokens: token ids, int32[B, T].
          segments: segment numbers, int32[B, T]; a token sees only tokens of its segment.
          positions: positions, int32[B, T], from 0 in each segment.
          dtype: compute dtype.
          remat: a key of `REMAT`.
          key: dropout key, one for all rows or one for each row [B]; None: inference, no dropout.

        Returns:
          dtype[B, T, hidden].
        """
        x, shared, own = self.layer_inputs(tokens, segments, positions, dtype, key)
        for place, run in enumerate(self.runs):
            layer_at, weights = _layers(run)

            def body(x: jax.Array, xs: Any, layer_at: Any = layer_at) -> tuple[jax.Array, None]:
                weights, own = xs
                layer = layer_at(weights)
                x = checkpoint_name(x, INPUT)
                return layer(x, shared, own, recompute=remat in WHOLE_LAYERS)[0], None

            x, _ = jax.lax.scan(REMAT[remat](body), x, (weights, self.part(own, place)))
        return self.norm(x)

    def layer_inputs(
        self,
        tokens: jax.Array,
        segments: jax.Array,
        positions: jax.Array,
        dtype: jax.typing.DTypeLike,
        key: jax.Array | None,
    ) -> tuple[jax.Array, SharedInputs, LayerInputs]:
        """Returns the first layer's input, the inputs that all layers share, and each layer's own.

        The layers' inputs are one stack over all layers. The arguments are those of `hidden`.
        """
        lengths = segment_lengths(segments, positions) if self.config.varying_rope else None
        shared = shared_inputs(self.config, in_segments(segments), positions, lengths)
        return self.embed_tokens(tokens, positions, dtype), shared, own_inputs(self.config, key)

    def cached(
        self,
        tokens: jax.Array,
        positions: jax.Array,
        cache: KVCache,
        *,
        dtype: jax.typing.DTypeLike,
    ) -> tuple[jax.Array, KVCache]:
        """Returns the output of `hidden` and the updated KV cache [L, B, S, ...].

        Each row is one segment. A token at position p is written to slot p and sees slots 0 to p.
        The rope frequencies are those of a sequence of at most `config.longest_cached` tokens, so
        the caller must keep positions below this number.
        """
        x = self.embed_tokens(tokens, positions, dtype)
        shared = shared_inputs(self.config, up_to(positions), positions, None)
        everything = own_inputs(self.config, None), cache
        written = []
        for place, run in enumerate(self.runs):
            layer_at, weights = _layers(run)

            def body(x: jax.Array, xs: Any, layer_at: Any = layer_at) -> tuple[jax.Array, Any]:
                weights, (own, slots) = xs
                return layer_at(weights)(x, shared, own, Slots(slots, positions))

            x, new = jax.lax.scan(body, x, (weights, self.part(everything, place)))
            written.append(new)
        # Write the tokens of all layers at once: if each layer wrote, each would copy the cache.
        rows = jnp.arange(tokens.shape[0])[:, None], positions
        new = jax.tree.map(lambda *parts: jnp.concatenate(parts), *written)
        return self.norm(x), jax.tree.map(lambda all, x: all.at[:, *rows].set(x), cache, new)

    def embed_tokens(
        self, tokens: jax.Array, positions: jax.Array, dtype: jax.typing.DTypeLike
    ) -> jax.Array:
        """Returns the first layer's input, dtype[B, T, hidden]; arguments as in `hidden`."""
        config = self.config
        # The barrier ties the embedding to the tokens. Without it, XLA:CPU converts the whole
        # embedding before a loop over tokens and keeps the copy.
        embed, tokens = jax.lax.optimization_barrier((self.embed.get_value(), tokens))
        x = looked_up(embed, tokens).astype(dtype)
        if self.embed_adapter is not None:
            x = x + self.embed_adapter.looked_up(tokens, dtype)
        if config.scaled_embeddings:
            x = x * jnp.asarray(config.hidden_size**0.5, dtype)
        if self.positions is not None and config.positions_before is not None:
            x = x + self.positions.get_value()[positions + config.positions_before].astype(dtype)
        return x

    def part(self, stacks: Any, place: int) -> Any:
        """Cuts the layers of `runs[place]` out of stacks over all layers of the model."""
        start = self._starts()[place]
        end = start + run_length(self.runs[place])
        return jax.tree.map(lambda all: all[start:end], stacks)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Returns float32[..., vocab]: hidden @ head, soft-capped if the config has a cap."""
        stored, vocab_axis = self.stored_head()
        weight = whole(stored)
        logits = product(hidden, weight.astype(hidden.dtype), 1 - vocab_axis)
        if (update := self.head_delta(hidden, None)) is not None:
            low, b = update
            logits = logits + product(low, b.astype(low.dtype), 0)
        cap = self.config.final_softcap
        return logits if cap is None else cap * jnp.tanh(logits / cap)

    def stored_head(self) -> tuple[jax.Array | Sharded, int]:
        """Returns the stored head, which may be `Sharded`, and the index of its vocabulary axis."""
        stored, axis = (self.embed, 0) if self.head is None else (self.head, 1)
        return stored.get_value(), axis

    def head_delta(
        self, hidden: jax.Array, key: jax.Array | None
    ) -> tuple[jax.Array, jax.Array] | None:
        """Returns the two factors of the term that the head's adapter adds, or None without one.

        The logits become hidden @ head + low @ B, with low = scale · (hidden @ A).

        Args:
          hidden: normalized output of the last layer, float[..., hidden].
          key: dropout key, as for the method `hidden`.

        Returns:
          low [..., r] in hidden's dtype, and B [r, vocab].
        """
        if self.head_adapter is None:
            return None
        # the layers use the numbers 0 to num_layers - 1
        own = None if key is None else dropout.fold_in(key, self.config.num_layers)
        return self.head_adapter.project_down(hidden, own), self.head_adapter.b.get_value()

    def outer_adapters(self) -> dict[str, Adapter]:
        """Returns the adapters of the embedding and the head, by Hugging Face module path."""
        found = {self.config.names.embed: self.embed_adapter, HEAD: self.head_adapter}
        return {path: adapter for path, adapter in found.items() if adapter is not None}

    def linears(self) -> dict[str, tuple[int, int]]:
        """Returns the linears of all layers: Hugging Face path to (in_features, out_features)."""
        return {path: linear.weight.get_value().shape[-2:] for path, linear, _ in self.walk()}

    def walk(self) -> Iterator[tuple[str, LoraLinear, int]]:
        """Yields (Hugging Face path, stack, index in the stack) of every linear of every layer."""
        for run, start in zip(self.runs, self._starts()):
            for i in range(run_length(run)):
                for path, linear in run.linears().items():
                    yield f"{self.config.names.layers}.{start + i}.{path}", linear, i

    def _starts(self) -> list[int]:
        return [0, *np.cumsum([run_length(run) for run in self.runs])][:-1]


def _layers(run: Layer) -> tuple[Callable[[Any], Layer], Any]:
    """Returns a function that builds one layer from a slice of a tree, and the tree of stacks.

    The tree does not contain the QTensors: a layer refers to the whole stack of a QTensor by its
    index (`quant.QLayer`), so a scan does not copy the codes.
    """
    graph, weights = nnx.split(run)
    rest, stacks = stack.apart(weights)

    def layer_at(one: Any) -> Layer:
        rest, place = one
        return nnx.merge(graph, stack.joined(rest, stacks, place))

    return layer_at, (rest, jnp.arange(run_length(run)))


def run_length(run: Layer) -> int:
    """Returns the number of layers in a stack."""
    return next(iter(run.linears().values())).weight.get_value().shape[0]


def empty_cache(
    config: DecoderConfig, batch: int, slots: int, dtype: jax.typing.DTypeLike
) -> KVCache:
    """Returns a KV cache of zeros, [layers, batch, slots, kv_heads, head_dim]."""
    shape = (config.num_layers, batch, slots, config.num_kv_heads, config.head_dim)
    return KVCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))


def attach(
    model: Decoder,
    specs: Mapping[str, AdapterSpec],
    key: jax.Array,
    *,
    init: str = "kaiming-uniform",
    dropout: float = 0.0,
    dtype: jax.typing.DTypeLike = jnp.float32,
    variant: str = "lora",
    freeze_a: bool = False,
    values: LoraSet | None = None,
) -> None:
    """Gives every module named in `specs` an adapter, in place.

    The adapter of the embedding is initialized as in PEFT, with A = 0, and has no dropout.

    Args:
      model: model without adapters; changed in place.
      specs: Hugging Face module path to rank, alpha and scale of its adapter.
      key: random key of the initial values.
      init: a key of `lora.initializers.random_init.INITS`. For any other name, A is zero until
        `values` fills it.
      dropout: dropout rate on the input of A, in training.
      dtype: dtype of A and B.
      variant: a key of `VARIANTS`; the embedding and the head always get plain LoRA.
      freeze_a: whether A is not trained; the adapter of the embedding ignores it.
      values: path to the values that an adapter gets instead of random initial values.
    """
    values = values or {}
    for run, start in zip(model.runs, model._starts()):
        for path, linear in run.linears().items():
            prefix = f"{model.config.names.layers}"
            paths = [f"{prefix}.{start + i}.{path}" for i in range(run_length(run))]
            layers, given = [specs.get(p) for p in paths], [values.get(p) for p in paths]
            key, own = jax.random.split(key)
            if not any(layers):
                continue
            weight = linear.weight.get_value()
            k, n = weight.shape[-2:]
            adapter = init_adapter(own, layers, k, n, init, dropout, dtype, freeze_a)
            if any(given):
                adapter.fill(given)
            adapter = VARIANTS[variant](adapter, weight)
            if any(given):
                adapter.fill_own(given)
            linear.adapter = nnx.data(adapter)
    config = model.config
    vocabulary, hidden = config.vocab_size, config.hidden_size
    key, own = jax.random.split(key)
    if spec := specs.get(config.names.embed):
        adapter = init_embedding(own, spec, vocabulary, hidden, dtype)
        model.embed_adapter = _single(adapter, values.get(config.names.embed))
    if spec := specs.get(HEAD):
        adapter = init_adapter(key, [spec], hidden, vocabulary, init, dropout, dtype, freeze_a)
        model.head_adapter = _single(adapter, values.get(HEAD))


def _single(adapter: Adapter, value: LoraWeights | None) -> Adapter:
    """Fills a stack of one adapter with `value`, if given, and removes the stack axis."""
    if value is not None:
        adapter.fill([value])
    adapter.unstack()
    return nnx.data(adapter)


def detach(model: Decoder) -> None:
    """Removes every adapter, in place."""
    for run in model.runs:
        for linear in run.linears().values():
            linear.adapter = None
    model.embed_adapter = model.head_adapter = None


def use_kernel(model: Decoder, implementation: str | None) -> None:
    """Sets the implementation of `matmul` for every linear, in place; None: `matmul` picks one."""
    for run in model.runs:
        for linear in run.linears().values():
            linear.implementation = implementation


def use_attention(model: Decoder, implementation: str | None) -> None:
    """Sets the implementation of `attend` for every layer, in place; None: `attend` picks one."""
    for run in model.runs:
        run.attention = implementation
