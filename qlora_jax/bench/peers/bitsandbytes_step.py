"""Measures speed and memory of a training step of bitsandbytes + PEFT + transformers.

Weights that are not quantized have the compute dtype. With method full and bfloat16, this side
trains bfloat16 weights, and qlora-jax trains float32 weights.
"""

import time
from typing import Any

import bitsandbytes
import torch
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training

from qlora_jax.bench import measure
from qlora_jax.bench.measure import OtherProcesses, PeakMemory, figure
from qlora_jax.bench.options import StepOptions, to_tree
from qlora_jax.bench.peers.torch_model import (
    DEVICE,
    device_memory,
    load_base,
    random_base,
    synchronize,
)
from qlora_jax.runtime.errors import UserError, first_line

CHECKPOINTING = {"use_reentrant": False}

UPDATES = 3
"""Largest number of updates that are timed alone."""


def run(options: StepOptions) -> dict[str, Any]:
    """Loads the model or makes a random one, and runs the step.

    Raises:
      UserError: the model or an option cannot be used, or the device has too little memory.
    """
    try:
        return _measured(options)
    except torch.OutOfMemoryError as e:
        raise UserError(
            f"{options.model}: does not fit on the peer's {DEVICE} ({first_line(e)}); give "
            "--offload host, --remat full, or smaller values of --batch, --seq and --rank"
        ) from None


def _measured(options: StepOptions) -> dict[str, Any]:
    memory = PeakMemory()
    torch.manual_seed(options.seed)
    start = time.perf_counter()
    model = _model(options)
    synchronize()
    loaded = time.perf_counter()

    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = _optimizer(options, trained)
    tokens, targets = (
        torch.from_numpy(ids).long().to(DEVICE)
        for ids in measure.inputs_and_targets(
            model.config.vocab_size, options.batch, options.seq, options.seed
        )
    )
    memory.restart()
    losses = []

    def gradient() -> torch.Tensor:
        loss = model(input_ids=tokens, labels=targets, shift_labels=targets).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        return loss.detach()

    def step() -> float:
        start = time.perf_counter()
        loss = gradient()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(float(loss))
        synchronize()
        return time.perf_counter() - start

    def update() -> float:
        gradient()
        synchronize()
        start = time.perf_counter()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        synchronize()
        return time.perf_counter() - start

    with OtherProcesses() as neighbours:
        seconds = measure.take(step, options.steps)
        updates = [update() for _ in range(min(options.steps, UPDATES))]
    figures = measure.step_figures(seconds, options.batch * options.seq)
    figures |= {
        "update": measure.median_ms(updates),
        "peak memory, training": figure("MiB", memory.phase()),
        "peak memory": figure("MiB", memory.process()),
        "moments": figure("MiB", _moments(optimizer) / 2**20),
        "load" if options.shape is None else "make": figure("s", loaded - start),
        **device_memory(),
    }
    return measure.report(
        "bitsandbytes + PEFT",
        ["torch", "bitsandbytes", "peft", "transformers"],
        to_tree(options),
        figures,
        losses=losses,
        trainable=sum(p.numel() for p in trained),
        notes=_notes(options),
        others_cores=neighbours.cores,
    )


def _optimizer(options: StepOptions, trained: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    settings = {"lr": 2e-4, "weight_decay": 0.0}
    if options.offload == "device":
        return torch.optim.AdamW(trained, **settings)
    if DEVICE == "cpu":
        raise UserError("--offload host: bitsandbytes' paged optimizer needs a GPU; leave it out")
    return bitsandbytes.optim.PagedAdamW(trained, **settings)


def _moments(optimizer: torch.optim.Optimizer) -> int:
    """Returns the bytes of the optimizer state."""
    values = (value for state in optimizer.state.values() for value in state.values())
    return sum(v.numel() * v.element_size() for v in values if isinstance(v, torch.Tensor))


def _notes(options: StepOptions) -> list[str]:
    notes = []
    if options.remat == "dots":
        notes.append("the peer has no remat dots and keeps everything")
    if options.shape is not None:
        notes.append("each side draws its own random weights: losses are similar, not equal")
    return notes


def _model(options: StepOptions) -> Any:
    quantized, recompute = options.method == "qlora", options.remat == "full"
    dtype = getattr(torch, options.dtype)
    model: Any = (
        load_base(options.model, dtype, quantized=quantized)
        if options.shape is None
        else random_base(options.shape, dtype, quantized=quantized)
    )
    model.config.use_cache = False
    if quantized and options.prepare:
        model = prepare_model_for_kbit_training(
            model,
            use_gradient_checkpointing=recompute,
            gradient_checkpointing_kwargs=CHECKPOINTING,
        )
    elif recompute:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=CHECKPOINTING)
        model.enable_input_require_grads()
    if options.method != "full":
        config = LoraConfig(
            r=options.rank,
            lora_alpha=options.lora_alpha,
            target_modules=list(options.target_modules) or "all-linear",
            task_type="CAUSAL_LM",
        )
        model = get_peft_model(model, config)
    return model.train()
