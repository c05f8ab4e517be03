"""One training step of bitsandbytes + PEFT + transformers on random tokens: speed and memory.

The counterpart of step.py, with its options, tokens and figures; for an environment with the
`parity` extra.

Command: python experiments/benchmarks/peer_step.py MODEL [--method qlora|lora|full] [--json]
  MODEL is a Hugging Face folder. --remat full is gradient checkpointing.
Cost: a minute at SmolLM2-135M's shape on 2 CPU cores.
Step: forward, loss, backward, clipping and AdamW; NF4 with double quantization under qlora.
Weights that are not quantized are held in --dtype; under full, bfloat16 trains bfloat16 weights
where qlora-jax keeps float32 ones.
"""

import argparse
import os

import measure
from measure import PeakMemory


def main() -> None:
    parser = measure.step_arguments(__doc__, ["none", "full"])
    parser.add_argument(
        "--prepare",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="qlora: peft.prepare_model_for_kbit_training, which holds the embeddings, norms and "
        "head in float32",
    )
    options = parser.parse_args()
    memory = PeakMemory()
    os.environ["HF_HUB_OFFLINE"] = "1"

    import time

    import torch
    from peer_model import load_base
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    torch.manual_seed(options.seed)
    imported = time.perf_counter()
    model = load_base(
        options.model, getattr(torch, options.dtype), quantized=options.method == "qlora"
    )
    model.config.use_cache = False
    checkpointing = {"use_reentrant": False}
    if options.method == "qlora" and options.prepare:
        model = prepare_model_for_kbit_training(
            model,
            use_gradient_checkpointing=options.remat == "full",
            gradient_checkpointing_kwargs=checkpointing,
        )
    elif options.remat == "full":
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=checkpointing)
        model.enable_input_require_grads()
    if options.method != "full":
        config = LoraConfig(
            r=options.rank,
            lora_alpha=2 * options.rank,
            target_modules="all-linear",
            task_type="CAUSAL_LM",
        )
        model = get_peft_model(model, config)
    model.train()
    loaded = time.perf_counter()
    peak_load = memory.process()

    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=2e-4, weight_decay=0.0)
    tokens, targets = (
        torch.from_numpy(ids).long()
        for ids in measure.random_tokens(
            model.config.vocab_size, options.batch, options.seq, options.seed
        )
    )
    memory.restart()
    after_load = memory.now()

    def step() -> float:
        loss = model(input_ids=tokens, labels=targets, shift_labels=targets).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    timed = measure.time_steps(step, options.steps)
    measure.show(
        {
            "tool": "bitsandbytes + PEFT",
            **vars(options),
            **timed.figures(options.batch * options.seq),
            "import_s": round(imported - measure.STARTED, 2),
            "load_s": round(loaded - imported, 2),
            "compile_s": 0.0,
            "peak_mib": memory.process(),
            "peak_load_mib": peak_load,
            "after_load_mib": after_load,
            "peak_train_mib": memory.phase(),
            "trainable": sum(p.numel() for p in trained),
            **measure.surroundings(["torch", "bitsandbytes", "peft", "transformers"]),
        },
        options.json,
    )


if __name__ == "__main__":
    main()
