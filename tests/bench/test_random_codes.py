"""Tests models of random codes: statistics of the decoded weights, and memory to make them."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from selection import mostly_slow

from qlora_jax import config as configs
from qlora_jax.bench import measure, random_codes
from qlora_jax.config import Config
from qlora_jax.models import trees
from qlora_jax.models.config import from_hugging_face
from qlora_jax.plan.abstract import abstract_model
from qlora_jax.quant import QTensor, dequantize, quantize
from qlora_jax.quant.codebooks import CODEBOOKS, codebook
from qlora_jax.runtime.errors import UserError
from qlora_jax.train import step as steps
from qlora_jax.train.optimizer import adamw

TINY = {
    "model_type": "llama",
    "hidden_size": 160,
    "intermediate_size": 192,
    "num_hidden_layers": 3,
    "num_attention_heads": 5,
    "num_key_value_heads": 5,
    "vocab_size": 512,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e4,
    "tie_word_embeddings": False,
}
DECODER = from_hugging_face(TINY, "tiny")


def config(**more: Any) -> Config:
    tree = {"model": {"path": "tiny"}, "data": {"source": "none"}, "output": "none"}
    return configs.from_tree(tree | more, "test")


def leaves(made: Any) -> dict[str, Any]:
    def is_leaf(x: Any) -> bool:
        return isinstance(x, QTensor)

    return trees.flatten(made.trained, is_leaf) | trees.flatten(made.frozen, is_leaf)


def shapes(k: int, n: int, name: str, double: bool, block_size: int = 64) -> QTensor:
    weights = jax.ShapeDtypeStruct((4, k, n), jnp.bfloat16)
    return jax.eval_shape(lambda w: quantize(w, name, block_size, double), weights)


def stack(k: int, n: int, name: str, double: bool, block_size: int = 64) -> QTensor:
    tree = {"weight": shapes(k, n, name, double, block_size)}
    quant = {"codebook": name, "block_size": block_size, "double_quant": double}
    return random_codes.fill(tree, config(quant=quant), 0)["weight"]


def on_host(k: int, n: int, name: str, double: bool, block_size: int = 64) -> QTensor:
    source = random_codes.OnHost(np.random.default_rng(0))
    return random_codes.quantized(shapes(k, n, name, double, block_size), name, source)


@pytest.mark.parametrize("draw", [stack, on_host])
@pytest.mark.parametrize("double", mostly_slow([True, False], True))
@pytest.mark.parametrize("name", mostly_slow(CODEBOOKS, "nf4"))
def test_decoded_weights_have_the_spread_of_an_initialized_model(
    name: str, double: bool, draw: Callable[..., QTensor]
) -> None:
    q = draw(512, 512, name, double)
    w = np.asarray(dequantize(q), np.float64)
    np.testing.assert_array_equal(q.codebook, np.tile(codebook(name), (4, 1)))
    # A million values: the standard error of the mean is 2e-5, and the scales add as much.
    assert w.std() == pytest.approx(0.02, rel=0.01)
    book = codebook(name).astype(np.float64)
    assert w.mean() == pytest.approx(0.02 * book.mean() / book.std(), abs=2e-4)
    counts = np.bincount(np.asarray(q.codes).ravel() & 15, minlength=16)
    assert np.abs(counts / counts.sum() * 16 - 1).max() < 0.02


@pytest.mark.parametrize("draw", [stack, on_host])
@pytest.mark.parametrize(
    ("k", "block_size"),
    mostly_slow([(160, 64), (96, 32), (130, 128)], (130, 128)),
)
@pytest.mark.quick
def test_rows_beyond_the_weight_hold_the_code_of_zero(
    k: int, block_size: int, draw: Callable[..., QTensor]
) -> None:
    for name in CODEBOOKS:
        q = draw(k, 32, name, True, block_size)
        zero = np.asarray(quantize(np.zeros((k, 32), np.float32), name, block_size).codes)
        codes = np.asarray(q.codes).reshape(4, -1, 32, 32)
        halves = np.stack([codes & 15, codes >> 4], axis=2).reshape(4, -1, 32)
        assert (halves[:, k:] == (zero.ravel()[-1] >> 4)).all()
        assert len(np.unique(halves[:, k - 1])) > 8


def test_every_axis_changes_the_values() -> None:
    codes = np.asarray(stack(512, 512, "nf4", True).codes, np.float64) - 127.5
    flat = codes.reshape(4, -1)
    # Correlations of independent values have a standard deviation of 1 / sqrt(count).
    layers = np.corrcoef(flat) - np.eye(4)
    assert np.abs(layers).max() < 5 / math.sqrt(flat.shape[1])
    for shift in ((1, 0), (0, 1), (1, 1), (32, 0), (0, 128)):
        moved = np.roll(codes, shift, (1, 2)).ravel()
        assert abs(np.corrcoef(codes.ravel(), moved)[0, 1]) < 5 / math.sqrt(codes.size)


def test_a_leaf_of_more_elements_than_32_bits_count() -> None:
    """A layer has 2**32 elements: a flat 32-bit index would repeat the values in every layer."""
    corner = jax.jit(lambda: random_codes._noise(jnp.uint32(1), (3, 2**16, 2**16))[:, -9:, -9:])
    program = corner.lower().compile()
    found: Any = program.memory_analysis()
    assert found.temp_size_in_bytes < 2**24  # only the corner is computed
    assert len(np.unique(program())) == 3 * 9 * 9


@pytest.mark.parametrize("method", mostly_slow(["qlora", "lora", "full"], "qlora"))
@pytest.mark.quick
def test_a_model_is_what_a_run_would_train(method: str) -> None:
    chosen = config(method=method, lora={"rank": 4, "alpha": 16})
    made = random_codes.random_model(chosen, DECODER, None)
    abstract = abstract_model(chosen, DECODER, None)
    for own, wanted in ((made.trained, abstract.trained), (made.frozen, abstract.frozen)):
        assert jax.tree.structure(own) == jax.tree.structure(wanted)
        for a, b in zip(jax.tree.leaves(own), jax.tree.leaves(wanted)):
            assert (a.shape, a.dtype) == (b.shape, b.dtype)
    for path, leaf in leaves(made).items():
        values = np.asarray(dequantize(leaf) if isinstance(leaf, QTensor) else leaf, np.float64)
        name = path.rpartition(".")[2]
        if name == "scale":
            assert (values == 4).all()
        elif name == "b":
            assert (values == 0).all()
        elif "norm" in path:
            assert (values == 1).all()
        elif name == "a":  # kaiming: uniform up to 1 / sqrt(inputs)
            assert np.abs(values).max() <= values.shape[1] ** -0.5
            assert values.std() == pytest.approx((3 * values.shape[1]) ** -0.5, rel=0.1)
        else:
            assert values.std() == pytest.approx(0.02, rel=0.03), path


def test_biases_are_zero() -> None:
    decoder = from_hugging_face(TINY | {"model_type": "qwen2"}, "tiny")
    made = leaves(random_codes.random_model(config(), decoder, None))
    assert "runs.0.q_proj.bias" in made
    assert not made["runs.0.q_proj.bias"].any()


def test_gaussian_adapters_have_its_deviation() -> None:
    chosen = config(lora={"rank": 4, "init": "gaussian"})
    a = leaves(random_codes.random_model(chosen, DECODER, None))["runs.0.q_proj.adapter.a"]
    assert float(a.std()) == pytest.approx(1 / 4, rel=0.1)


@pytest.mark.quick
def test_the_seed_decides() -> None:
    def model(seed: int) -> list[np.ndarray]:
        made = random_codes.random_model(config(train={"seed": seed}), DECODER, None)
        return [np.asarray(x) for x in jax.tree.leaves(made[1:])]

    first, again, other = model(0), model(0), model(1)
    assert all((a == b).all() for a, b in zip(first, again))
    assert sum((a != b).any() for a, b in zip(first, other)) > len(first) / 3


@pytest.mark.parametrize("method", ["qlora", "lora"])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.quick
def test_the_loss_of_a_random_model_is_finite_and_that_of_chance(method: str, family: str) -> None:
    chosen = config(method=method)
    decoder = from_hugging_face(TINY | {"model_type": family}, "tiny")
    graph, trained, frozen = random_codes.random_model(chosen, decoder, None)
    tokens, targets = measure.inputs_and_targets(512, 2, 32, 0)
    batch = {
        "tokens": tokens,
        "targets": targets,
        "mask": np.ones_like(tokens, bool),
        "segments": np.ones_like(tokens),
        "positions": np.broadcast_to(np.arange(32, dtype=np.int32), tokens.shape),
    }
    program = steps.build(
        graph,
        adamw(chosen.optimizer, 2),
        compute_dtype=jnp.float32,
        remat="none",
        clip_norm=1.0,
        method="qlora",
    )
    total, count = program.evaluate(trained, frozen, batch)
    # log(vocab) plus half the logits' variance; their deviation is 0.02 * sqrt(160).
    assert float(total / count) == pytest.approx(math.log(512) + 0.02**2 * 160 / 2, abs=0.15)


@pytest.mark.parametrize("shape", [(8, 96, 512), (4096, 512)])
def test_making_a_leaf_takes_no_memory_beside_it(shape: tuple[int, ...]) -> None:
    salt = jax.ShapeDtypeStruct((), jnp.uint32)
    made = [
        random_codes._codes.lower(salt, shape, 2 * shape[-2] - 20, 7),
        random_codes._bytes.lower(salt, shape),
        random_codes._uniform.lower(salt, shape, jnp.dtype(jnp.bfloat16), 0.0, 1.0),
    ]
    for lowered in made:
        found: Any = lowered.compile().memory_analysis()
        assert found.temp_size_in_bytes < math.prod(shape) / 64


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ({"init": "pissa"}, "set lora.init to kaiming-uniform or gaussian"),
        ({"rank_pattern": {"q_proj": 2}}, "remove lora.rank_pattern"),
        ({"target_modules": r".*\.1\.self_attn\.q_proj"}, "name whole modules"),
    ],
)
def test_adapters_that_random_weights_cannot_have(lora: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        random_codes.random_model(config(lora=lora), DECODER, None)
