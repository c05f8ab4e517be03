"""The table of shapes against published parameter counts and rules; finding a shape by name."""

import math

import pytest

from qlora_jax.formats.names import expected_shapes
from qlora_jax.models.shapes import HUB, SHAPES, find
from qlora_jax.runtime.errors import UserError

PARAMETERS = {
    "llama-7b": 6_738_415_616,
    "llama-13b": 13_015_864_320,
    "llama-33b": 32_528_943_616,
    "llama-65b": 65_285_660_672,
    "llama2-70b": 68_976_648_192,
    "llama3-8b": 8_030_261_248,
    "llama3-70b": 70_553_706_496,
    "mistral-7b": 7_241_732_096,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen2.5-3b": 3_085_938_688,
    "qwen2.5-7b": 7_615_616_512,
    "qwen2.5-14b": 14_770_033_664,
    "qwen2.5-32b": 32_763_876_352,
    "qwen2.5-72b": 72_706_203_648,
    "smollm2-135m": 134_515_008,
    "smollm2-360m": 361_821_120,
    "smollm2-1.7b": 1_711_376_384,
    "tinyllama-1.1b": 1_100_048_384,
}
"""Parameter counts that the hub shows beside the weights."""


@pytest.mark.parametrize("name", SHAPES)
def test_parameters_are_the_published_number(name: str) -> None:
    shapes = expected_shapes(SHAPES[name]).values()
    assert sum(math.prod(shape) for shape in shapes) == PARAMETERS[name]


@pytest.mark.parametrize("name", SHAPES)
def test_shapes_agree_with_themselves(name: str) -> None:
    config = SHAPES[name]
    assert config.num_heads * config.head_dim == config.hidden_size
    assert config.num_heads % config.num_kv_heads == 0
    assert config.head_dim in (64, 128)
    assert config.qkv_bias == (config.family == "qwen2")
    assert config.windows == ((4096 if name == "mistral-7b" else None,) * config.num_layers)


@pytest.mark.parametrize("size", ["7b", "13b", "33b", "65b"])
def test_the_first_llamas_round_their_mlp_up(size: str) -> None:
    config = SHAPES[f"llama-{size}"]
    assert config.intermediate_size == 256 * math.ceil(config.hidden_size * 8 // 3 / 256)
    assert config.head_dim == 128


def test_hub_ids() -> None:
    assert set(HUB.values()) == set(SHAPES)
    assert find("llama-33b") is find("huggyllama/llama-30b")
    assert find("Qwen/Qwen2.5-7B-Instruct") is find("Qwen/Qwen2.5-7B") is find("qwen2.5-7b")


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("llama-30b", "llama-33b"),
        ("huggyllama/llama-66b", "huggyllama/llama-65b"),
        ("Qwen/Qwen2.5-8B", "Qwen/Qwen2.5-7B"),
        ("tinylama", "tinyllama-1.1b"),
    ],
)
def test_the_nearest_name_is_named(name: str, nearest: str) -> None:
    message = f"^{name}: no published shape by that name; the nearest known one is {nearest}$"
    with pytest.raises(UserError, match=message):
        find(name)
