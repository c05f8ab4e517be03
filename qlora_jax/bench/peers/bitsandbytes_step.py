"""Speed and memory of a training step of bitsandbytes + PEFT + transformers.

Weights that are not quantized are held in the compute dtype; under full, bfloat16 trains bfloat16
weights where qlora-jax keeps float32 ones.
"""

import time
from typing import Any

import torch
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training

from qlora_jax.bench import measure
from qlora_jax.bench.measure import Neighbours, PeakMemory, figure
from qlora_jax.bench.options import Step, to_tree
from qlora_jax.bench.peers.torch_model import DEVICE, device_memory, load_base, synchronize

CHECKPOINTING = {"use_reentrant": False}


def run(options: Step) -> dict[str, Any]:
    """Loads the model and runs the step."""
    memory = PeakMemory()
    torch.manual_seed(options.seed)
    start = time.perf_counter()
    model = _model(options)
    synchronize()
    loaded = time.perf_counter()

    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=2e-4, weight_decay=0.0)
    tokens, targets = (
        torch.from_numpy(ids).long().to(DEVICE)
        for ids in measure.inputs_and_targets(
            model.config.vocab_size, options.batch, options.seq, options.seed
        )
    )
    memory.restart()
    losses = []

    def step() -> float:
        start = time.perf_counter()
        loss = model(input_ids=tokens, labels=targets, shift_labels=targets).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(float(loss.detach()))
        synchronize()
        return time.perf_counter() - start

    with Neighbours() as neighbours:
        seconds = measure.take(step, options.steps)
    figures = measure.step_figures(seconds, options.batch * options.seq)
    figures |= {
        "peak memory, training": figure("MiB", memory.phase()),
        "peak memory": figure("MiB", memory.process()),
        "load": figure("s", loaded - start),
        **device_memory(),
    }
    return measure.report(
        "bitsandbytes + PEFT",
        ["torch", "bitsandbytes", "peft", "transformers"],
        to_tree(options),
        figures,
        losses=losses,
        trainable=sum(p.numel() for p in trained),
        notes=["the peer has no remat dots and keeps everything"]
        if options.remat == "dots"
        else [],
        others_cores=neighbours.cores,
    )


def _model(options: Step) -> Any:
    quantized, recompute = options.method == "qlora", options.remat == "full"
    model: Any = load_base(options.model, getattr(torch, options.dtype), quantized=quantized)
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
            lora_alpha=2 * options.rank,
            target_modules="all-linear",
            task_type="CAUSAL_LM",
        )
        model = get_peft_model(model, config)
    return model.train()
