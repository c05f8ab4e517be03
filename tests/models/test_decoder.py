import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from qlora_jax.config import LoraConfig, QuantConfig
from qlora_jax.formats.huggingface import open_folder
from qlora_jax.lora import choose_adapters
from qlora_jax.models import trees
from qlora_jax.models.decoder import REMAT, Decoder, attach, empty_cache, use_attention
from qlora_jax.quant import dequantize, quantize

pytestmark = pytest.mark.quick

LINEARS = [f"self_attn.{n}_proj" for n in "qkvo"] + [
    f"mlp.{n}_proj" for n in ("gate", "up", "down")
]
NAMES = [
    "llama",
    "mistral",
    "qwen2",
    "llama_rope_llama3",
    "llama_rope_linear_biases",
    "mistral_window",
    "qwen2_window",
    "qwen3",
    "smollm3",
    "olmo2",
    "gemma",
    "gemma2",
    "gemma3",
    "phi3",
    "gpt_neox",
    "opt",
]


@functools.partial(jax.jit, static_argnums=0)
def logits(structure, weights, tokens, segments, positions):
    model = nnx.merge(structure, weights)
    return model.logits(model.hidden(tokens, segments, positions, dtype=jnp.float32))


@functools.partial(jax.jit, static_argnums=0)
def step(structure, weights, tokens, positions, cache):
    """Runs the tokens on a cache; returns the logits and the new cache."""
    model = nnx.merge(structure, weights)
    hidden, cache = model.cached(tokens, positions, cache, dtype=jnp.float32)
    return model.logits(hidden), cache


def compute(model, tokens, segments=None, positions=None):
    segments = np.ones_like(tokens) if segments is None else segments
    if positions is None:
        positions = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape)
    return np.asarray(logits(*nnx.split(model), tokens, segments, positions))


@pytest.mark.parametrize("name", NAMES)
def test_logits_are_transformers_packed_or_not(models, open_model, name):
    reference = np.load(models / name / "reference.npz")
    tokens, expected = reference["tokens"], reference["logits"]
    assert np.abs(expected).max() > 1
    model = open_model(name)
    np.testing.assert_allclose(compute(model, tokens), expected, rtol=1e-4, atol=1e-4)

    # row 0: the starts of both sequences and padding; row 1: the second sequence, then the first
    lengths = [[(0, 12), (1, 17)], [(1, 20), (0, 13)]]
    packed, segments, positions = (np.zeros_like(tokens) for _ in range(3))
    places = []
    for row, parts in enumerate(lengths):
        start = 0
        for segment, (sequence, length) in enumerate(parts, 1):
            here = slice(start, start + length)
            packed[row, here], segments[row, here] = tokens[sequence, :length], segment
            positions[row, here] = np.arange(length)
            places.append((row, here, sequence, length))
            start += length
    ours = compute(model, packed, segments, positions)
    for row, here, sequence, length in places:
        np.testing.assert_allclose(ours[row, here], expected[sequence, :length], atol=1e-4)


def test_logits_of_another_context_differ(models, open_model):
    """A changed first token changes later logits, but only as far as the windows reach."""
    tokens = np.load(models / "mistral_window" / "reference.npz")["tokens"]
    model = open_model("mistral_window")
    changed = tokens.copy()
    changed[:, 0] = (changed[:, 0] + 1) % 128
    before, after = compute(model, tokens), compute(model, changed)
    # two layers with window 8 carry a change over at most 14 positions
    assert np.abs(before - after)[:, 1:15].max() > 1e-3
    np.testing.assert_array_equal(before[:, 15:], after[:, 15:])


@pytest.mark.parametrize(
    "name", ["qwen2_window", "llama_rope_llama3", "gemma3", "gemma2", "phi3", "gpt_neox", "opt"]
)
def test_cached_is_uncached(models, open_model, name):
    reference = np.load(models / name / "reference.npz")
    tokens, expected = reference["tokens"], reference["logits"]
    structure, weights = nnx.split(open_model(name))

    cache = empty_cache(nnx.merge(structure, weights).config, 2, 40, jnp.float32)
    # the second row's prompt is shorter: attention must not see its padding in the cache
    start = np.array([20, 14])
    prompt = np.where(np.arange(20) < start[:, None], tokens[:, :20], 99)
    positions = np.broadcast_to(np.arange(20), prompt.shape)
    ours, cache = step(structure, weights, prompt, positions, cache)
    for row, length in enumerate(start):
        np.testing.assert_allclose(ours[row, :length], expected[row, :length], atol=1e-4)
    for i in range(13):
        at = (start + i)[:, None]
        ours, cache = step(structure, weights, np.take_along_axis(tokens, at, axis=1), at, cache)
        for row in range(2):
            np.testing.assert_allclose(ours[row, 0], expected[row, at[row, 0]], atol=1e-4)


def stacks(checkpoint):
    """Returns stacked layer weights by name within a layer: [L, in, out] or [L, features]."""
    names = [n for n in checkpoint.names() if n.startswith("model.layers.0.")]
    return {
        n.removeprefix("model.layers.0."): jnp.asarray(
            np.stack(
                [
                    checkpoint.read(n.replace(".0.", f".{i}.", 1)).T
                    for i in range(checkpoint.config.num_layers)
                ]
            )
        )
        for n in names
    }


def build(checkpoint, runs):
    read = checkpoint.read
    return Decoder(
        checkpoint.config,
        jnp.asarray(read("model.embed_tokens.weight")),
        runs,
        jnp.asarray(read("model.norm.weight")),
        jnp.asarray(read("lm_head.weight").T),
    )


def test_a_4_bit_layer_among_others_computes_with_its_decoded_weights(models):
    checkpoint = open_folder(models / "llama")
    reference = np.load(models / "llama" / "reference.npz")
    tokens = reference["tokens"]
    layers = stacks(checkpoint)
    first = {k: w[:1] for k, w in layers.items()}
    rest = {k: w[1:] for k, w in layers.items()}
    linears = [f"{path}.weight" for path in LINEARS]
    quantized = first | {k: quantize(first[k], block_size=32) for k in linears}
    decoded = quantized | {k: dequantize(quantized[k]) for k in linears}

    mixed = build(checkpoint, [quantized, rest])
    one = build(checkpoint, [{k: jnp.concatenate([decoded[k], rest[k]]) for k in layers}])
    assert mixed.linears() == one.linears()
    ours = compute(mixed, tokens)
    np.testing.assert_allclose(ours, compute(one, tokens), rtol=1e-5, atol=1e-5)
    assert np.abs(ours - reference["logits"]).max() > 1e-2

    cache = empty_cache(mixed.config, 2, 33, jnp.float32)
    positions = np.broadcast_to(np.arange(33), tokens.shape)
    through, cache = step(*nnx.split(mixed), tokens, positions, cache)
    np.testing.assert_allclose(through, ours, rtol=1e-4, atol=1e-4)
    assert np.asarray(cache.k).any(axis=(1, 2, 3, 4)).all()


def test_linears_have_hugging_face_names_and_shapes(models, open_model):
    checkpoint = open_folder(models / "llama")
    shapes = open_model("llama", QuantConfig()).linears()
    assert len(shapes) == 21
    for path, shape in shapes.items():
        assert shape == checkpoint.shape(f"{path}.weight")[::-1]


@pytest.fixture(scope="module")
def deep(models):
    """Twelve 4-bit layers with adapters: (structure, trained, frozen)."""
    checkpoint = open_folder(models / "llama")
    layers = {k: jnp.concatenate([w] * 4) for k, w in stacks(checkpoint).items()}
    layers |= {f"{path}.weight": quantize(layers[f"{path}.weight"]) for path in LINEARS}
    model = build(checkpoint, [layers])
    model.config = dataclasses.replace(checkpoint.config, num_layers=12, windows=(None,) * 12)
    config = LoraConfig(rank=4, target_modules=["q_proj"])
    attach(model, choose_adapters(config, model.linears()), jax.random.key(0), dropout=0.1)
    b = model.runs[0].q_proj.adapter.b
    b.set_value(0.02 * jax.random.normal(jax.random.key(1), b.get_value().shape))
    return trees.split(model, "qlora")


def gradient(deep, remat):
    structure, trained, frozen = deep
    tokens = jnp.arange(128).reshape(1, 128) % 251
    positions = jnp.arange(128)[None]

    def loss(trained, frozen):
        model = nnx.merge(structure, trained, frozen)
        hidden = model.hidden(
            tokens,
            jnp.ones_like(tokens),
            positions,
            dtype=jnp.float32,
            remat=remat,
            key=jax.random.key(3),
        )
        return jnp.mean(hidden**2 * jnp.cos(jnp.arange(hidden.shape[-1])))

    return jax.grad(loss), (trained, frozen)


@pytest.mark.slow
def test_remat_changes_memory_and_not_the_gradient(deep):
    gradients, memory = {}, {}
    for remat in REMAT:
        function, arguments = gradient(deep, remat)
        compiled = jax.jit(function).lower(*arguments).compile()
        gradients[remat] = trees.flatten(compiled(*arguments))
        memory[remat] = compiled.memory_analysis().temp_size_in_bytes
    for path, expected in gradients["none"].items():
        size = np.abs(expected).max()
        assert size > 0
        for remat in ("dots", "full", "host"):
            np.testing.assert_allclose(
                gradients[remat][path], expected, rtol=1e-4, atol=1e-4 * size
            )
    assert memory["full"] < memory["dots"] < memory["none"]
    assert memory["full"] < memory["none"] / 3


@pytest.mark.parametrize("remat", REMAT)
def test_the_forward_pass_copies_no_codes_for_the_backward_pass(deep, remat):
    function, arguments = gradient(deep, remat)
    equations = jax.make_jaxpr(function)(*arguments).jaxpr.eqns
    stored = [v.aval for e in equations if e.primitive.name == "scan" for v in e.outvars]
    assert stored
    assert not [a for a in stored if a.dtype == jnp.uint8]
    weights = [(12, *shape) for shape in ((64, 64), (64, 32), (64, 128), (128, 64))]
    assert not [a for a in stored if a.shape in weights]


@pytest.mark.parametrize("implementation", ["xla", "triton"])
def test_layers_attend_by_the_implementation_that_they_are_given(open_model, implementation):
    model = open_model("llama")
    use_attention(model, implementation)
    tokens = jnp.zeros((1, 5), jnp.int32)
    program = jax.make_jaxpr(
        lambda tokens: model.hidden(tokens, tokens, jnp.arange(5)[None], dtype=jnp.float32)
    )(tokens)
    assert ("pallas_call" in str(program)) == (implementation == "triton")
