"""Compares the losses of a few training steps with PEFT's: same adapters, same data."""

import jax.numpy as jnp
import numpy as np
import pytest
from pairs import REASON, adapt, ours, save, theirs, tokens, torch, transformers

from qlora_jax.config import LoraConfig, OptimizerConfig, QuantConfig
from qlora_jax.formats.peft import write_adapter
from qlora_jax.models import trees
from qlora_jax.train import step as steps
from qlora_jax.train.export import adapters
from qlora_jax.train.optimizer import adamw
from qlora_jax.train.state import init_state

peft = pytest.importorskip("peft", reason=REASON)
pytest.importorskip("bitsandbytes", reason=REASON)
pytestmark = pytest.mark.parity

STEPS = 5
RUNS = {
    "plain": (LoraConfig(rank=8, alpha=16), OptimizerConfig(learning_rate=0.01)),
    "decay-rslora": (
        LoraConfig(rank=4, alpha=6, scaling="alpha/sqrt(r)", rank_pattern={"q_proj": 2}),
        # Adam divides a gradient by its own size. With epsilon 1e-8, a gradient of 1e-8, which is
        # rounding noise, can move a weight by a large part of the learning rate.
        OptimizerConfig(
            learning_rate=0.02, weight_decay=0.1, clip_norm=0.2, beta2=0.95, epsilon=1e-6
        ),
    ),
}


def batches(model, seed: int) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Returns inputs, targets and loss mask of each step; every step has another batch."""
    ids = tokens(model, seed, rows=STEPS * 3, length=33).reshape(STEPS, 3, 33)
    counted = np.random.default_rng(seed).random((STEPS, 3, 32)) < 0.6
    return list(zip(ids[..., :-1], ids[..., 1:], counted))


def our_losses(model, method: str, optimizer: OptimizerConfig, data) -> list[float]:
    graph, trained, frozen = trees.split(model, method)
    transformation = adamw(optimizer, STEPS)
    program = steps.build(
        graph,
        transformation,
        compute_dtype=jnp.dtype("float32"),
        remat="none",
        clip_norm=optimizer.clip_norm,
        method=method,
    )
    state = init_state(trained, transformation, dynamic_scale=False)
    losses = []
    for inputs, targets, mask in data:
        batch = {
            "tokens": inputs,
            "targets": targets,
            "mask": mask,
            "segments": np.ones_like(inputs),
            "positions": np.broadcast_to(np.arange(inputs.shape[1], dtype=np.int32), inputs.shape),
        }
        batch = {name: value[None] for name, value in batch.items()}
        grads, figures = program.gradient(state, frozen, batch, None)
        state = program.update(state, grads, figures.finite)
        losses.append(float(figures.loss))
    return losses


def their_losses(peer, config: OptimizerConfig, data) -> list[float]:
    peer.train()
    trained = [p for p in peer.parameters() if p.requires_grad]
    matrices = [p for p in trained if p.ndim == 2]
    vectors = [p for p in trained if p.ndim != 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}],
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        eps=config.epsilon,
        weight_decay=config.weight_decay,
    )
    losses = []
    for inputs, targets, mask in data:
        labels = torch.from_numpy(np.where(mask, targets, -100)).long()
        ids = torch.from_numpy(inputs).long()
        loss = peer(input_ids=ids, labels=labels, shift_labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, config.clip_norm)
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def four_bit():
    """Returns settings for NF4 without double quantization; such weights are bit-equal to ours."""
    config = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    )
    return {"quantization_config": config, "device_map": {"": "cpu"}}


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("method", ["lora", "qlora"])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_adapter_losses_agree(tmp_path, family, method, name):
    lora, optimizer = RUNS[name]
    folder = save(tmp_path / "model", family, seed=8)
    quantized = method == "qlora"
    model = ours(folder, QuantConfig(double_quant=False) if quantized else None)
    adapt(model, lora, seed=8, zero_b=True)
    write_adapter(
        tmp_path / "adapter", adapters(model), base_name=str(folder), scaling=lora.scaling
    )
    base = theirs(folder, **(four_bit() if quantized else {}))
    peer = peft.PeftModel.from_pretrained(base, tmp_path / "adapter", is_trainable=True)
    data = batches(model, seed=8)
    compare(our_losses(model, method, optimizer, data), their_losses(peer, optimizer, data))


def test_full_fine_tuning_losses_agree(tmp_path):
    """All weights train, including the embedding, which is tied to the head."""
    folder = save(tmp_path / "model", "qwen2", seed=9)
    optimizer = OptimizerConfig(learning_rate=0.003, weight_decay=0.1)
    model = ours(folder)
    data = batches(model, seed=9)
    expected = their_losses(theirs(folder), optimizer, data)
    compare(our_losses(model, "full", optimizer, data), expected)


def compare(ours: list[float], theirs: list[float]) -> None:
    assert np.ptp(theirs) > 1e-2
    np.testing.assert_allclose(ours, theirs, atol=1e-4, rtol=0)
