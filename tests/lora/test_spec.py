import json
import math

import pytest

from qlora_jax.config import LoraConfig
from qlora_jax.lora import AdapterSpec, choose_adapters, ranks_above_full
from qlora_jax.runtime.errors import UserError

SHAPES = {"q_proj": (64, 64), "k_proj": (64, 32), "v_proj": (64, 32), "o_proj": (64, 64)}
MLP = {"gate_proj": (64, 128), "up_proj": (64, 128), "down_proj": (128, 64)}
LINEARS = {
    f"model.layers.{i}.{part}.{name}": shape
    for i in range(11)
    for part, names in (("self_attn", SHAPES), ("mlp", MLP))
    for name, shape in names.items()
}


def chosen(target):
    return list(choose_adapters(LoraConfig(target_modules=target), LINEARS))


@pytest.mark.parametrize(
    ("target", "count"),
    [
        ("all-linear", 77),
        (["q_proj", "v_proj"], 22),
        (["mlp.down_proj"], 11),
        (["layers.1.self_attn.q_proj"], 1),
        (["model.layers.3.mlp.up_proj", "o_proj"], 12),
        (r".*\.(q|v)_proj", 22),
        (r"model\.layers\.[0-4]\.mlp\..*", 15),
        (r"model\.layers\.10\..*", 7),
    ],
)
def test_targets(target, count):
    assert len(chosen(target)) == count


def test_what_is_chosen_is_what_was_asked_for_in_the_models_order():
    assert chosen(["v_proj", "q_proj"]) == [p for p in LINEARS if p.endswith(("q_proj", "v_proj"))]
    assert chosen("model.layers.0.mlp.up_proj") == ["model.layers.0.mlp.up_proj"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"target_modules": ["qproj"]},
            r"'qproj'.* matches no linear; name some of: down_proj, gate",
        ),
        ({"target_modules": ["q_proj", "proj"]}, "'proj' matches no linear"),
        ({"target_modules": []}, "matches no linear"),
        ({"target_modules": ["(q_proj"]}, r"'\(q_proj'.* matches no linear"),
        ({"target_modules": ["q_proj", "*_proj"]}, r"'\*_proj' matches no linear"),
        ({"target_modules": "q_proj"}, "'q_proj' matches no linear"),
        ({"target_modules": "lm_head"}, "'lm_head' matches no linear"),
        ({"target_modules": "(q_proj"}, "is not a regular expression"),
        ({"rank_pattern": {"w_proj": 4}}, "lora.rank_pattern: 'w_proj' matches no linear"),
        ({"alpha_pattern": {"w_proj": 4}}, "lora.alpha_pattern: 'w_proj' matches no linear"),
        ({"rank_pattern": {"*q": 4}}, r"lora.rank_pattern: '\*q' is not a regular expression"),
    ],
)
def test_errors(changes, message):
    with pytest.raises(UserError, match=message):
        choose_adapters(LoraConfig(**changes), LINEARS)


@pytest.mark.parametrize(
    ("scaling", "scale"),
    [("alpha/r", 32 / 16), ("alpha/sqrt(r)", 32 / math.sqrt(16)), ("constant", 32.0)],
)
def test_scaling(scaling, scale):
    specs = choose_adapters(LoraConfig(rank=16, alpha=32, scaling=scaling), LINEARS)
    assert set(specs.values()) == {AdapterSpec(16, 32.0, scale)}


def test_scaling_is_by_each_modules_own_rank_and_alpha():
    config = LoraConfig(
        rank=16,
        alpha=32,
        scaling="alpha/sqrt(r)",
        rank_pattern={"q_proj": 4},
        alpha_pattern={"q_proj": 10.0, "layers.1.self_attn.v_proj": 8.0},
    )
    specs = choose_adapters(config, LINEARS)
    assert specs["model.layers.5.self_attn.q_proj"] == AdapterSpec(4, 10.0, 10 / 2)
    assert specs["model.layers.1.self_attn.v_proj"] == AdapterSpec(16, 8.0, 8 / 4)
    assert specs["model.layers.10.self_attn.v_proj"] == AdapterSpec(16, 32.0, 8.0)


def test_patterns_mean_what_they_mean_in_peft(models):
    """Expects the rank and the scale that PEFT gave each module of llama/peft_patterns."""
    config = json.loads((models / "llama" / "peft_patterns" / "adapter_config.json").read_text())
    specs = choose_adapters(
        LoraConfig(
            rank=config["r"],
            alpha=config["lora_alpha"],
            target_modules=config["target_modules"],
            rank_pattern=config["rank_pattern"],
            alpha_pattern=config["alpha_pattern"],
        ),
        {path: shape for path, shape in LINEARS.items() if int(path.split(".")[2]) < 3},
    )
    found = {p.removeprefix("model.layers."): (s.rank, s.scale) for p, s in specs.items()}
    assert found == {
        "0.self_attn.q_proj": (8, 5.0),
        "0.self_attn.v_proj": (8, 5.0),
        "0.mlp.down_proj": (2, 20.0),
        "1.self_attn.q_proj": (4, 4.0),
        "1.self_attn.v_proj": (8, 0.75),
        "1.mlp.down_proj": (2, 8.0),
        "2.self_attn.q_proj": (8, 2.0),
        "2.self_attn.v_proj": (3, 2.0),
        "2.mlp.down_proj": (2, 8.0),
    }


def test_a_rank_no_matrix_needs_is_named():
    specs = choose_adapters(LoraConfig(rank=64, target_modules=["k_proj", "o_proj"]), LINEARS)
    assert ranks_above_full(specs, LINEARS) == [p for p in LINEARS if p.endswith("k_proj")]
    assert ranks_above_full(choose_adapters(LoraConfig(rank=32), LINEARS), LINEARS) == []
