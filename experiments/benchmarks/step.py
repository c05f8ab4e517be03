"""One training step of qlora-jax on random tokens: speed and memory.

Command: python experiments/benchmarks/step.py MODEL [--method qlora|lora|full] [--json]
  MODEL is a Hugging Face folder, a .gguf file or a built-in name.
Cost: a minute at SmolLM2-135M's shape on 2 CPU cores.
Step: forward, loss, backward, clipping and AdamW; NF4 with double quantization under qlora.
"""

import measure
from measure import PeakMemory

from qlora_jax import hugepages


def main() -> None:
    hugepages.restart()
    parser = measure.step_arguments(__doc__, ["dots", "none", "full"])
    options = parser.parse_args()
    memory = PeakMemory()

    import time

    import jax
    import jax.numpy as jnp
    import numpy as np

    from qlora_jax.config import from_tree
    from qlora_jax.formats.source import open_checkpoint
    from qlora_jax.manifest import git_state
    from qlora_jax.models import trees
    from qlora_jax.train import step as steps
    from qlora_jax.train.optimizer import adamw
    from qlora_jax.train.setup import load_model

    jax.devices()
    imported = time.perf_counter()
    config = from_tree(
        {
            "model": {
                "path": options.model,
                "compute_dtype": options.dtype,
                "storage_dtype": options.dtype,
                "remat": options.remat,
            },
            "data": {"source": "random tokens"},
            "output": "none",
            "method": options.method,
            "lora": {"rank": options.rank, "alpha": 2 * options.rank},
            "train": {"seed": options.seed, "steps": options.steps + 1},
        },
        "options",
    )
    checkpoint = open_checkpoint(config.model)
    model, _ = load_model(config, checkpoint, print)
    jax.block_until_ready(jax.tree.leaves(trees.split(model, config.method)[1:]))
    loaded = time.perf_counter()
    peak_load = memory.process()

    trained_count, total_count = trees.parameter_counts(model, config.method)
    graph, trained, frozen = trees.split(model, config.method)
    del model
    optimizer = adamw(config.optimizer, config.train.steps)
    program = steps.build(
        graph,
        optimizer,
        compute_dtype=jnp.dtype(options.dtype),
        remat=options.remat,
        clip_norm=config.optimizer.clip_norm,
        train_head=config.method == "full",
    )
    state = steps.init(trained, optimizer, dynamic_scale=False)
    del trained
    tokens, targets = measure.random_tokens(
        checkpoint.config.vocab_size, options.batch, options.seq, options.seed
    )
    batch = {
        "tokens": tokens,
        "targets": targets,
        "mask": np.ones_like(tokens, bool),
        "segments": np.ones_like(tokens),
        "positions": np.broadcast_to(np.arange(options.seq, dtype=np.int32), tokens.shape),
    }
    batch = {name: array[None] for name, array in batch.items()}
    memory.restart()
    after_load = memory.now()

    start = time.perf_counter()
    gradient = program.gradient.lower(state, frozen, batch, None).compile()
    grads, figures = jax.eval_shape(program.gradient, state, frozen, batch, None)
    update = program.update.lower(state, grads, figures.finite).compile()
    compiled = time.perf_counter() - start
    peak_compile = memory.phase()
    memory.restart()

    def step() -> float:
        nonlocal state
        grads, figures = gradient(state, frozen, batch, None)
        state = update(state, grads, figures.finite)
        jax.block_until_ready(state)
        return float(figures.loss)

    timed = measure.time_steps(step, options.steps)
    measure.show(
        {
            "tool": "qlora-jax",
            **vars(options),
            **timed.figures(options.batch * options.seq),
            "import_s": round(imported - measure.STARTED, 2),
            "load_s": round(loaded - imported, 2),
            "compile_s": round(compiled, 2),
            "peak_mib": memory.process(),
            "peak_load_mib": peak_load,
            "after_load_mib": after_load,
            "peak_compile_mib": peak_compile,
            "peak_train_mib": memory.phase(),
            "trainable": trained_count,
            "parameters": total_count,
            "git": git_state(),
            **measure.surroundings(["jax", "jaxlib", "flax", "optax"]),
        },
        options.json,
    )


if __name__ == "__main__":
    main()
