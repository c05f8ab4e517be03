"""Exchanges adapters with PEFT in both directions: the same modules, scales and logits."""

import numpy as np
import pytest
from pairs import (
    REASON,
    adapt,
    our_logits,
    ours,
    read_adapter,
    save,
    their_logits,
    theirs,
    tokens,
    torch,
)

from qlora_jax.config import LoraConfig
from qlora_jax.formats.peft import write_adapter
from qlora_jax.lora import choose_adapters
from qlora_jax.train.export import adapters

peft = pytest.importorskip("peft", reason=REASON)
pytestmark = pytest.mark.parity

SOME = r".*\.(1|2)\.(self_attn\.[qv]_proj|mlp\.down_proj)"
CONFIGS = {
    "all-linear": {"rank": 8, "alpha": 16},
    "names": {"rank": 4, "alpha": 10, "target_modules": ["q_proj", "mlp.down_proj"]},
    "expression": {"rank": 4, "alpha": 10, "target_modules": SOME},
    "rslora": {"rank": 6, "alpha": 5, "scaling": "alpha/sqrt(r)"},
    "patterns": {
        "rank": 8,
        "alpha": 16,
        "rank_pattern": {"layers.1.self_attn.q_proj": 4, "q_proj": 2, r".*\.mlp\..*_proj": 3},
        "alpha_pattern": {r"layers\.0\..*": 40, "v_proj": 6.5},
    },
    "rslora-patterns": {
        "rank": 8,
        "alpha": 16,
        "scaling": "alpha/sqrt(r)",
        "rank_pattern": {"o_proj": 5},
        "alpha_pattern": {r".*\.2\.mlp\.up_proj": 7},
    },
}
FAMILIES = ("llama", "qwen2", "mistral-window")
each_config = pytest.mark.parametrize("name", CONFIGS)
each_family = pytest.mark.parametrize("family", FAMILIES)


def peft_config(config: LoraConfig):
    """Returns the same settings as a PEFT config."""
    return peft.LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        use_rslora=config.scaling == "alpha/sqrt(r)",
        target_modules=config.target_modules,
        rank_pattern=dict(config.rank_pattern),
        alpha_pattern=dict(config.alpha_pattern),
        task_type="CAUSAL_LM",
    )


def resolved(model) -> dict[str, tuple[int, float]]:
    """Returns rank and scale of every module that PEFT adapted, by its path in the base."""
    return {
        path.removeprefix("base_model.model."): (module.r["default"], module.scaling["default"])
        for path, module in model.named_modules()
        if isinstance(module, peft.tuners.lora.LoraLayer)
    }


@each_config
@each_family
def test_modules_ranks_and_factors_resolve_alike(tmp_path, name, family):
    folder = save(tmp_path / "model", family, seed=4)
    config = LoraConfig(**CONFIGS[name])
    expected = resolved(peft.get_peft_model(theirs(folder), peft_config(config)))
    specs = choose_adapters(config, ours(folder).linears())
    assert {path: spec.rank for path, spec in specs.items()} == {
        path: rank for path, (rank, _) in expected.items()
    }
    for path, (_, factor) in expected.items():
        assert specs[path].scale == pytest.approx(factor), path


@each_config
@each_family
def test_peft_reads_what_we_write(tmp_path, name, family):
    folder = save(tmp_path / "model", family, seed=5)
    model, config = ours(folder), LoraConfig(**CONFIGS[name])
    adapt(model, config, seed=5)
    out = tmp_path / "adapter"
    write_adapter(out, adapters(model), base_name=str(folder), scaling=config.scaling)
    check_peft_reads(model, folder, out)


@pytest.mark.parametrize("family", ["phi3", "gpt_neox", "opt"])
def test_modules_of_fused_and_renamed_linears_resolve_alike(tmp_path, family):
    folder = save(tmp_path / "model", family, seed=4)
    config = LoraConfig(rank=4, alpha=8)
    expected = resolved(peft.get_peft_model(theirs(folder), peft_config(config)))
    specs = choose_adapters(config, ours(folder).linears())
    assert {path: (spec.rank, spec.scale) for path, spec in specs.items()} == expected


def test_peft_reads_a_constant_factor(tmp_path):
    folder = save(tmp_path / "model", "llama", seed=6)
    config = LoraConfig(rank=4, alpha=0.5, scaling="constant", rank_pattern={"up_proj": 7})
    model = ours(folder)
    adapt(model, config, seed=6)
    out = tmp_path / "adapter"
    write_adapter(out, adapters(model), base_name=str(folder), scaling="constant")
    check_peft_reads(model, folder, out)


def check_peft_reads(model, folder, out) -> None:
    base = theirs(folder)
    ids = tokens(model, seed=5)
    without = their_logits(base, ids)
    peer = peft.PeftModel(base, peft.LoraConfig.from_pretrained(out))
    result = peer.load_adapter(out, "default")
    assert not result.missing_keys
    assert not result.unexpected_keys
    expected = their_logits(peer.eval(), ids)
    assert np.abs(expected - without).max() > 1e-2
    np.testing.assert_allclose(our_logits(model, ids), expected, atol=1e-4, rtol=0)


@each_config
@each_family
def test_we_read_what_peft_writes(tmp_path, name, family):
    folder = save(tmp_path / "model", family, seed=7)
    peer = peft.get_peft_model(theirs(folder), peft_config(LoraConfig(**CONFIGS[name])))
    random = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for key, parameter in peer.named_parameters():
            if "lora_B" in key:
                parameter.copy_(0.05 * torch.randn(parameter.shape, generator=random))
    peer.save_pretrained(tmp_path / "adapter")
    model = ours(folder)
    ids = tokens(model, seed=7)
    without = our_logits(model, ids)
    read_adapter(model, tmp_path / "adapter")
    expected = their_logits(peer.eval(), ids)
    assert np.abs(expected - without).max() > 1e-2
    np.testing.assert_allclose(our_logits(model, ids), expected, atol=1e-4, rtol=0)
