"""Tries uses of this library and qwix on tunix's Gemma 3, and records the error of each failure."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

import qlora_jax as qj
from experiments.benchmarks.qwix_sides import ALPHA, BLOCK, RANK, gemma3, sizes_of, stored
from experiments.other_models import tunix
from experiments.other_models.cases import drawn

WHERE = r"layers(\.\d+)?\.(attn\.(q|kv)_einsum\.w|mlp\.\w+_proj\.kernel)"
PATHS = ".*q_einsum|.*kv_einsum|.*gate_proj|.*down_proj|.*up_proj"
EMBEDDING, OUTPUT = r"embedder\.input_embedding", r"layers\.\d+\.attn\.attn_vec_einsum\.w"
LONGEST = 120


class Unmet(Exception):
    """A call that raises no error, but whose result is not the one that the trial wants."""


class Trial(NamedTuple):
    """A use that a user may want; each side's function raises if the side does not support it."""

    what: str
    ours: Callable[[], Any]
    qwix: Callable[[], Any]


def small(**changes: Any) -> Any:
    return gemma3("tiny", "float32", **changes)


def remat(name: str) -> Any:
    from tunix.models.gemma3 import model as gemma

    return small(remat_config=gemma.RematConfig[name])


class Scanned(nnx.Module):
    """A Gemma 3 whose layers, which are tunix's, are one stack in `nnx.scan`."""

    def __init__(self, axes: Any):
        from tunix.models.gemma3 import model as gemma

        config = gemma.ModelConfig(**sizes_of("tiny", "float32"))
        rngs = nnx.Rngs(0)
        dtype = config.param_dtype
        self.embedder = gemma.Embedder(
            config.num_embed, config.embed_dim, rngs=rngs, param_dtype=dtype
        )
        self.axes = axes

        @nnx.split_rngs(splits=config.num_layers)
        @nnx.vmap(in_axes=(0,), out_axes=0)
        def stack(rngs: nnx.Rngs) -> Any:
            return gemma.DecoderLayer(config, gemma.AttentionType.GLOBAL, rngs=rngs)

        self.layers = stack(rngs)

    def __call__(self, tokens: Any, positions: Any, cache: None, mask: Any) -> Any:
        @nnx.scan(in_axes=(self.axes, nnx.Carry), out_axes=nnx.Carry)
        def scan(layer: Any, x: jax.Array) -> jax.Array:
            return layer(x, positions, None, mask)[1]

        return self.embedder.decode(scan(self.layers, self.embedder.encode(tokens))), cache


def scanned(axes: Any) -> Any:
    return drawn(Scanned(axes), 0)


_AXES: dict[Any, Any] = {nnx.RngState: None, ...: 0}
KEYS_SHARED = nnx.StateAxes(_AXES)


def ours(model: Any, weights: str = WHERE, adapted: str = WHERE, **settings: Any) -> Any:
    """Quantizes and adapts a model with this library and takes a gradient; returns the model."""
    qj.discover(model, *tunix.example())
    qj.quantize_model(model, weights, **settings)
    return differentiated(qj.add_lora(model, adapted, rank=RANK, alpha=ALPHA, rngs=nnx.Rngs(1)))


def qwix_rule(paths: str = PATHS, **settings: Any) -> Any:
    import qwix

    own = {"weight_qtype": "nf4", "tile_size": BLOCK, "rank": RANK, "alpha": ALPHA}
    return qwix.LoraRule(module_path=paths, **{**own, **settings})


def with_qwix(model: Any, *rules: Any, in_jit: bool = False) -> Any:
    """Quantizes and adapts a model with qwix and takes a gradient; returns the model."""
    import qwix

    provider = qwix.LoraProvider(rules or [qwix_rule()])

    def apply(model: Any) -> Any:
        return qwix.apply_lora_to_model(model, provider, *tunix.example(), rngs=nnx.Rngs(1))

    return differentiated((nnx.jit(apply) if in_jit else apply)(model))


def differentiated(model: Any) -> Any:
    """Computes the gradient of A and B in a compiled program, and returns the model."""
    graph, *states = nnx.split(model, nnx.LoRAParam, ...)

    def loss(adapters: Any, rest: Any) -> jax.Array:
        return jnp.mean(nnx.merge(graph, adapters, rest, copy=True)(*tunix.example())[0] ** 2)

    jax.block_until_ready(jax.jit(jax.grad(loss))(*states))
    return model


def adapters(model: Any) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of A and B by dotted path."""
    state = nnx.to_flat_state(nnx.state(model, nnx.LoRAParam))
    return {".".join(map(str, path)): variable.shape for path, variable in state}


def in_4_bits(model: Any, path: str) -> None:
    if path not in stored(model):
        raise Unmet("no error, and the weight stays as it was")


def on_embedding(model: Any) -> None:
    """Checks that an adapter of the embedding changes the head and the rows that are looked up."""
    state = nnx.state(model, nnx.LoRAParam)
    if "embedder" not in state:
        raise Unmet("no error, and no adapter is there")
    before = hidden(model)
    nnx.update(model, jax.tree.map(lambda x: x + 0.1, {"embedder": state["embedder"]}))
    if jnp.array_equal(before, hidden(model)):
        raise Unmet("an adapter of the head alone, not of rows looked up")


def hidden(model: Any) -> jax.Array:
    """Returns the hidden states before the head, which only the embedding's adapter changes."""
    model(*tunix.example(), output_hidden_states=True)
    return jax.tree.leaves(nnx.pop(model, nnx.Intermediate))[0]


def one_block(model: Any) -> None:
    """Checks that each scale of the output projections belongs to BLOCK weights."""
    for path, q in stored(model).items():
        if "attn_vec" in path and (q.block != BLOCK):
            raise Unmet(f"a block is {q.block} numbers, {BLOCK} would be one")


def own_a(model: Any) -> None:
    """Checks that K and V each have their own A."""
    shapes = [s for p, s in adapters(model).items() if "kv_einsum" in p and p[-1] == "a"]
    inputs = sizes_of("tiny", "float32")["embed_dim"]
    if shapes[0] == (inputs, RANK):
        raise Unmet(f"one A {list(shapes[0])} for both")


def trials() -> Iterator[Trial]:
    """Yields the trials."""
    narrow = {"hidden_dim": 96}
    yield Trial(
        "double quantization",
        lambda: ours(small(), double_quant=True),
        lambda: with_qwix(small(), qwix_rule(double_quant=True)),
    )
    yield Trial(
        "a product over 96 numbers in blocks of 64",
        lambda: ours(small(**narrow)),
        lambda: with_qwix(small(**narrow)),
    )
    yield Trial(
        "blocks of 64 in a product over two axes, heads and features",
        lambda: one_block(ours(small(head_dim=64), OUTPUT, OUTPUT)),
        lambda: one_block(with_qwix(small(head_dim=64), qwix_rule(".*attn_vec_einsum"))),
    )
    yield Trial(
        "the same, tile_size of qwix divided by the 4 heads",
        lambda: one_block(ours(small(head_dim=64), OUTPUT, OUTPUT)),
        lambda: one_block(
            with_qwix(small(head_dim=64), qwix_rule(".*attn_vec_einsum", tile_size=BLOCK // 4))
        ),
    )
    whole, none = "embedder.input_embedding", {"weight_qtype": None, "tile_size": None}
    for where, in_jit in (("", False), (", qwix inside `nnx.jit`", True)):
        yield Trial(
            f"the embedding, which is the head, in 4 bits{where}",
            lambda: in_4_bits(ours(small(), f"{WHERE}|{EMBEDDING}", embeddings=True), whole),
            lambda jit=in_jit: in_4_bits(  # type: ignore[misc]
                with_qwix(small(), qwix_rule(f"{PATHS}|.*embedder"), in_jit=jit), whole
            ),
        )
        yield Trial(
            f"an adapter on the embedding{where}",
            lambda: on_embedding(ours(small(), WHERE, f"{WHERE}|{EMBEDDING}")),
            lambda jit=in_jit: on_embedding(  # type: ignore[misc]
                with_qwix(small(), qwix_rule(), qwix_rule(".*embedder", **none), in_jit=jit)
            ),
        )
    for name in ("BLOCK", "DECODER"):
        yield Trial(
            f"RematConfig.{name}",
            lambda name=name: ours(remat(name)),  # type: ignore[misc]
            lambda name=name: with_qwix(remat(name)),  # type: ignore[misc]
        )
    yield Trial(
        "layers in `nnx.scan`",
        lambda: ours(scanned(0)),
        lambda: with_qwix(scanned(0)),
    )
    yield Trial(
        "layers in `nnx.scan` that does not scan keys",
        lambda: ours(scanned(KEYS_SHARED)),
        lambda: with_qwix(scanned(KEYS_SHARED)),
    )
    yield Trial(
        "an A for each of K and V, which are one stacked kernel",
        lambda: own_a(ours(small())),
        lambda: own_a(with_qwix(small())),
    )
    yield Trial(
        "weights in 8 bits",
        lambda: ours(small(), codebook="int8"),
        lambda: with_qwix(small(), qwix_rule(weight_qtype="int8")),
    )
    yield Trial(
        "activations in 8 bits",
        lambda: ours(small(), act_qtype="int8"),
        lambda: with_qwix(small(), qwix_rule(weight_qtype="int8", act_qtype="int8")),
    )


def outcome(call: Callable[[], Any]) -> str:
    """Returns "yes", or "no: " and the first line of the error that the call raises."""
    try:
        call()
    except Unmet as e:
        return f"no: {e}"
    except Exception as e:  # a library may refuse with any exception
        line = (str(e).splitlines() or [""])[0].replace("|", "\\|")
        return f"no: `{type(e).__name__}: {line[:LONGEST]}`"
    return "yes"


def tried() -> list[tuple[str, str, str]]:
    """Runs the trials; returns the name, our outcome and qwix's outcome of each."""
    return [(t.what, outcome(t.ours), outcome(t.qwix)) for t in trials()]
