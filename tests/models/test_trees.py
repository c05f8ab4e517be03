import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from qlora_jax.config import LoraConfig, QuantConfig
from qlora_jax.formats.names import expected_shapes
from qlora_jax.lora import choose_adapters
from qlora_jax.models import trees
from qlora_jax.models.config import DecoderConfig, Rope
from qlora_jax.models.decoder import Decoder, attach
from qlora_jax.quant import quantize


@pytest.fixture
def adapted(open_model):
    model = open_model("llama", QuantConfig())
    config = LoraConfig(
        rank=8,
        rank_pattern={"layers.1.self_attn.q_proj": 2, "v_proj": 3},
        target_modules=["q_proj", "v_proj", "down_proj"],
    )
    attach(model, choose_adapters(config, model.linears()), jax.random.key(0))
    return model


@pytest.mark.parametrize("method", ["qlora", "full"])
@pytest.mark.quick
def test_split_and_merge_round_trip(adapted, method):
    structure, trained, frozen = trees.split(adapted, method)
    again = nnx.merge(structure, trained, frozen)
    before, after = (trees.flatten(nnx.state(m)) for m in (adapted, again))
    assert list(before) == list(after)
    for path in before:
        np.testing.assert_array_equal(before[path], after[path])
    assert not trees.flatten(trained).keys() & trees.flatten(frozen).keys()
    assert trees.flatten(trained).keys() | trees.flatten(frozen).keys() == before.keys()


def test_trained_are_the_adapters_alone_or_every_weight(open_model, adapted):
    trained = trees.flatten(trees.split(adapted, "lora")[1])
    assert sorted(trained) == [
        f"runs.0.{name}.adapter.{side}"
        for name in ("down_proj", "q_proj", "v_proj")
        for side in "ab"
    ]
    model = open_model("llama")
    _, trained, frozen = trees.split(model, "full")
    assert not trees.flatten(frozen)
    assert set(trees.flatten(trained)) == {
        "embed",
        "head",
        "norm.weight",
        *(f"runs.0.{name}_proj.weight" for name in ("q", "k", "v", "o", "gate", "up", "down")),
        "runs.0.input_layernorm.weight",
        "runs.0.post_attention_layernorm.weight",
    }


def test_a_4_bit_weights_leaves_have_names(adapted):
    names = trees.flatten(trees.split(adapted, "qlora")[2])
    for part in ("codes", "scales", "nested", "offset", "codebook"):
        assert f"runs.0.q_proj.weight.{part}" in names


def test_sha256_tells_one_bit_a_name_a_shape_and_a_dtype():
    w = np.random.default_rng(0).normal(size=(64, 8)).astype(np.float32)
    tree = {"a": jnp.asarray(w), "q": quantize(w), "c": jnp.float32(1), "h": jnp.bfloat16(2)}
    digest = trees.sha256(tree)
    assert trees.sha256({k: tree[k] for k in "hcqa"}) == digest
    bits = w.view(np.uint32).copy()
    bits[63, 7] ^= 1
    zero = np.zeros(4, np.float32)
    others = [
        tree | {"a": jnp.asarray(bits.view(np.float32))},
        tree | {"q": quantize(-w)},
        tree | {"a": jnp.asarray(w.reshape(8, 64))},
        {k.replace("a", "b"): v for k, v in tree.items()},
        tree | {"c": jnp.float32(1 + 2**-23)},
        {"a": zero},
        {"a": zero.astype(np.int32)},
        {"a": -zero},
    ]
    assert len({digest, *map(trees.sha256, others)}) == len(others) + 1


def abstract(config):
    """Returns a decoder whose leaves are shapes without data."""
    shapes = expected_shapes(config)

    def leaf(*shape):
        return jax.ShapeDtypeStruct(shape, jnp.bfloat16)

    layer = {
        name.removeprefix("model.layers.0."): leaf(config.num_layers, *shape[::-1])
        for name, shape in shapes.items()
        if name.startswith("model.layers.0.")
    }
    outer = {
        name: leaf(*shape) for name, shape in shapes.items() if not name.startswith("model.layers.")
    }
    head = outer.get("lm_head.weight")
    return Decoder(
        config, outer["model.embed_tokens.weight"], [layer], outer["model.norm.weight"], head
    )


SMOLLM2 = DecoderConfig(
    family="llama",
    vocab_size=49152,
    hidden_size=576,
    intermediate_size=1536,
    num_layers=30,
    num_heads=9,
    num_kv_heads=3,
    head_dim=64,
    max_positions=8192,
    norm_eps=1e-5,
    rope=Rope(theta=100000.0),
    tie_embeddings=True,
    qkv_bias=False,
    output_bias=False,
    mlp_bias=False,
    windows=(None,) * 30,
)


def test_parameter_counts_of_smollm2():
    assert trees.parameter_counts(abstract(SMOLLM2), "full") == (134_515_008, 134_515_008)
    assert trees.parameter_counts(abstract(SMOLLM2), "qlora") == (0, 134_515_008)


def test_parameter_counts_leave_padding_out_and_count_4_bit_weights_whole(open_model, adapted):
    base = 2 * 256 * 64 + 64 + 3 * (2 * 64 + 64 * (64 + 32 + 32 + 64) + 3 * 64 * 128)
    q_proj = (8 + 2 + 8) * (64 + 64)
    v_proj = 3 * 3 * (64 + 32)
    down_proj = 3 * 8 * (128 + 64)
    adapters = q_proj + v_proj + down_proj
    assert trees.parameter_counts(adapted, "qlora") == (adapters, base + adapters)
    assert trees.parameter_counts(open_model("llama"), "full") == (base, base)


def test_quantized_size_is_codes_scales_nested_scales_and_codebooks(open_model):
    model = open_model("llama", QuantConfig())
    expected = count = 0
    for k, n in model.linears().values():
        scales = -(-k // 64) * n
        expected += -(-k // 64) * 32 * n + scales + 4 * -(-scales // 256) + 4 + 64
        count += k * n
    bits, size = trees.quantized_size(model)
    assert size == expected
    assert bits == 8 * expected / count
