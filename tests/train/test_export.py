import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from qlora_jax import config as configs
from qlora_jax.formats.huggingface import open_folder
from qlora_jax.formats.load import load_model
from qlora_jax.formats.peft import read_adapter
from qlora_jax.lora import choose_adapters
from qlora_jax.models.decoder import attach
from qlora_jax.runtime.errors import UserError
from qlora_jax.train.export import adapters, export_adapter

pytestmark = pytest.mark.quick

MIXED = {"layers.1.self_attn.q_proj": 2, "layers.0.mlp.down_proj": 6}
TARGETS = r"model\.layers\.\d\.(self_attn\.q_proj|mlp\.down_proj)|model\.layers\.2\.mlp\.up_proj"


@pytest.fixture
def make(tiny_model):
    """Makes a config and its model with random adapters; the padding of smaller ranks is zero."""

    def make(**lora):
        tree = {
            "model": {"path": str(tiny_model)},
            "data": {"source": "d"},
            "output": "run",
            "lora": {"rank": 4, "alpha": 8, "target_modules": TARGETS} | lora,
        }
        config = configs.from_tree(tree, "test")
        model = load_model(open_folder(tiny_model), quant=None, dtype="float32")
        attach(model, choose_adapters(config.lora, model.linears()), jax.random.key(0))
        random = np.random.default_rng(0)
        for linear in model.runs[0].linears().values():
            if linear.adapter:
                b = np.array(linear.adapter.b.get_value())
                for i, spec in enumerate(linear.adapter.specs):
                    if spec:
                        b[i, : spec.rank] = random.normal(size=(spec.rank, b.shape[-1]))
                linear.adapter.b.set_value(jnp.asarray(b))
        return config, model

    return make


@pytest.mark.parametrize(
    ("scaling", "rule"),
    [
        ("alpha/r", lambda alpha, r: alpha / r),
        ("alpha/sqrt(r)", lambda alpha, r: alpha / math.sqrt(r)),
        ("constant", lambda alpha, r: alpha),
    ],
)
def test_what_is_read_back_is_the_models_update(make, tmp_path, scaling, rule):
    config, model = make(scaling=scaling, rank_pattern=MIXED, alpha_pattern={"up_proj": 3.0})
    export_adapter(config, model, tmp_path / "adapter")
    read = read_adapter(tmp_path / "adapter")
    assert len(read.adapters) == 7
    for path, linear, i in model.walk():
        spec = linear.adapter.specs[i] if linear.adapter else None
        if spec is None:
            assert path not in read.adapters
            continue
        rank = next((r for key, r in MIXED.items() if path.endswith(key)), 4)
        alpha = 3.0 if path.endswith("up_proj") else 8.0
        found = read.adapters[path]
        assert found.rank == rank
        assert found.a.shape[1] == found.b.shape[0] == rank
        a, b = linear.adapter.a.get_value()[i], linear.adapter.b.get_value()[i]
        np.testing.assert_array_equal(found.a, a[:, :rank])
        np.testing.assert_array_equal(found.b, b[:rank])
        assert found.scale == pytest.approx(rule(alpha, rank))
        assert float(linear.adapter.scale.get_value()[i]) == pytest.approx(rule(alpha, rank))


def test_the_files_are_those_of_peft(make, tmp_path):
    config, model = make(rank_pattern=MIXED, dropout=0.1)
    export_adapter(config, model, tmp_path / "adapter")
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    shapes = {name.removeprefix("base_model.model.model."): t.shape for name, t in tensors.items()}
    assert len(shapes) == 14
    assert shapes["layers.1.self_attn.q_proj.lora_A.weight"] == (2, 64)
    assert shapes["layers.1.self_attn.q_proj.lora_B.weight"] == (64, 2)
    assert shapes["layers.0.mlp.down_proj.lora_A.weight"] == (6, 128)
    assert shapes["layers.2.mlp.up_proj.lora_B.weight"] == (128, 4)
    written = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert written["base_model_name_or_path"] == config.model.path
    assert (written["peft_type"], written["r"], written["lora_alpha"]) == ("LORA", 4, 8)
    assert written["lora_dropout"] == 0.1


def test_every_targeted_layer_is_named(make):
    _, model = make()
    assert sorted(adapters(model)) == sorted(
        [
            f"model.layers.{i}.{name}"
            for i in range(3)
            for name in ("self_attn.q_proj", "mlp.down_proj")
        ]
        + ["model.layers.2.mlp.up_proj"]
    )


def test_a_folder_of_other_things_is_refused(make, tmp_path):
    (tmp_path / "notes").write_text("x")
    with pytest.raises(UserError, match=f"^{tmp_path}"):
        export_adapter(*make(), tmp_path)
