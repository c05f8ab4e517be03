"""Compares DoRA and PiSSA with PEFT's: gradients, losses, initial values, conversion."""

import jax
import numpy as np
import pytest
from pairs import REASON, our_logits, ours, save, their_logits, theirs, tokens, torch
from test_live_training import batches, compare, our_losses, their_losses

from qlora_jax import config as configs
from qlora_jax.config import LoraConfig, OptimizerConfig
from qlora_jax.formats.huggingface import open_folder
from qlora_jax.formats.peft import read_adapter, write_adapter
from qlora_jax.lora import choose_adapters
from qlora_jax.models import trees
from qlora_jax.models.decoder import attach
from qlora_jax.train import step as steps
from qlora_jax.train.export import adapters, export_adapter
from qlora_jax.train.optimizer import adamw
from qlora_jax.train.setup import load_run_model
from qlora_jax.train.state import init_state

peft = pytest.importorskip("peft", reason=REASON)
pytestmark = pytest.mark.parity

FAMILIES = ("llama", "qwen2")


def dora(folder, out, *, freeze_a=False):
    """Returns our model with DoRA and a nonzero B, and PEFT's trainable model with that adapter."""
    model = ours(folder)
    lora = LoraConfig(rank=4, alpha=6, rank_pattern={"q_proj": 2})
    specs = choose_adapters(lora, model.linears())
    attach(model, specs, jax.random.key(1), variant="dora", freeze_a=freeze_a)
    random = np.random.default_rng(1)
    for run in model.runs:
        for linear in run.linears().values():
            b, m = linear.adapter.b, linear.adapter.magnitude
            fresh = 0.05 * random.standard_normal(b.get_value().shape, np.float32)
            ranks = np.array([spec.rank for spec in linear.adapter.specs])
            kept = np.arange(fresh.shape[1])[None, :, None] < ranks[:, None, None]
            b.set_value(jax.numpy.asarray(fresh * kept))
            m.set_value(m.get_value() * random.uniform(0.8, 1.2, m.get_value().shape))
    write_adapter(out, adapters(model), base_name=str(folder))
    return model, peft.PeftModel.from_pretrained(theirs(folder), out, is_trainable=True)


@pytest.mark.parametrize("family", FAMILIES)
def test_doras_gradients_are_pefts(tmp_path, family):
    model, peer = dora(save(tmp_path / "model", family, seed=3), tmp_path / "adapter")
    inputs, targets, mask = batches(model, seed=3)[0]
    labels = torch.from_numpy(np.where(mask, targets, -100)).long()
    peer(
        input_ids=torch.from_numpy(inputs).long(), labels=labels, shift_labels=labels
    ).loss.backward()
    graph, trained, frozen = trees.split(model, "lora")
    optimizer = adamw(OptimizerConfig(), 1)
    program = steps.build(
        graph,
        optimizer,
        compute_dtype=jax.numpy.float32,
        remat="dots",
        clip_norm=0.0,
        method="qlora",
    )
    batch = {
        "tokens": inputs,
        "targets": targets,
        "mask": mask,
        "segments": np.ones_like(inputs),
        "positions": np.broadcast_to(np.arange(inputs.shape[1], dtype=np.int32), inputs.shape),
    }
    state = init_state(trained, optimizer, False)
    grads, _ = program.gradient(state, frozen, {n: v[None] for n, v in batch.items()}, None)
    found = trees.flatten(grads)
    names = {"a": "lora_A.default.weight", "b": "lora_B.default.weight"}
    names["magnitude"] = "lora_magnitude_vector.default.weight"
    expected = {n.removeprefix("base_model.model."): p.grad for n, p in peer.named_parameters()}
    largest = {}
    for path, linear, i in model.walk():
        spec = linear.adapter.specs[i]
        for part, name in names.items():
            theirs_ = expected[f"{path}.{name}"].numpy()
            ours_ = np.asarray(found[f"runs.0.{path.rpartition('.')[2]}.adapter.{part}"][i])
            if part == "a":
                ours_ = ours_[:, : spec.rank].T
            elif part == "b":
                ours_ = ours_[: spec.rank].T
            assert np.abs(theirs_).max() > 1e-6
            off = np.abs(ours_ - theirs_).max() / np.abs(theirs_).max()
            largest[part] = max(largest.get(part, 0.0), off)
    print(largest)
    assert max(largest.values()) < 1e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_doras_losses_are_pefts(tmp_path, family):
    model, peer = dora(save(tmp_path / "model", family, seed=4), tmp_path / "adapter")
    optimizer = OptimizerConfig(learning_rate=0.01, weight_decay=0.1, epsilon=1e-6)
    data = batches(model, seed=4)
    compare(our_losses(model, "lora", optimizer, data), their_losses(peer, optimizer, data))


def pissa_config(folder, **lora):
    tree = {
        "model": {"path": str(folder), "storage_dtype": "float32"},
        "data": {"source": "d"},
        "output": "o",
        "method": "lora",
        "lora": {"rank": 4, "alpha": 6, "init": "pissa"} | lora,
    }
    return configs.from_tree(tree, "test")


@pytest.mark.parametrize("scaling", ["alpha/r", "alpha/sqrt(r)"])
def test_pissa_starts_as_pefts_and_converts_to_the_same_adapter(tmp_path, scaling):
    folder = save(tmp_path / "model", "llama", seed=5)
    config = pissa_config(folder, scaling=scaling)
    model, _ = load_run_model(config, open_folder(folder), lambda line: None)
    peer = peft.get_peft_model(
        theirs(folder),
        peft.LoraConfig(
            r=4,
            lora_alpha=6,
            use_rslora=scaling == "alpha/sqrt(r)",
            init_lora_weights="pissa",
            target_modules="all-linear",
            task_type="CAUSAL_LM",
        ),
    )
    peer.peft_config["default"].init_lora_weights = True
    peer.save_pretrained(tmp_path / "start")
    modules = dict(peer.named_modules())
    for path, linear, i in model.walk():
        module = modules[f"base_model.model.{path}"]
        a, b = (np.asarray(v.get_value()[i]) for v in (linear.adapter.a, linear.adapter.b))
        theirs_ = (module.lora_B["default"].weight @ module.lora_A["default"].weight).detach()
        np.testing.assert_allclose((a @ b).T, theirs_.numpy(), atol=1e-5)
        base = module.base_layer.weight.detach().numpy()
        np.testing.assert_allclose(np.asarray(linear.weight.get_value()[i]).T, base, atol=1e-5)
        # Stands in for training: scaling B is the same change on both sides, although the signs
        # of singular vectors may differ.
        linear.adapter.b.set_value(linear.adapter.b.get_value().at[i].multiply(1.3))
        with torch.no_grad():
            module.lora_B["default"].weight.mul_(1.3)
    ids = tokens(model, seed=5)
    expected = their_logits(peer.eval(), ids)
    np.testing.assert_allclose(our_logits(model, ids), expected, atol=1e-4, rtol=0)
    peer.peft_config["default"].init_lora_weights = "pissa"
    peer.save_pretrained(
        tmp_path / "theirs", path_initial_model_for_weight_conversion=str(tmp_path / "start")
    )
    export_adapter(config, model, tmp_path / "ours")
    for name in ("theirs", "ours"):
        assert {a.rank for a in read_adapter(tmp_path / name).adapters.values()} == {8}
        plain = peft.PeftModel.from_pretrained(theirs(folder), tmp_path / name).eval()
        np.testing.assert_allclose(their_logits(plain, ids), expected, atol=1e-4, rtol=0)
