"""`qlora-jax generate`."""

import argparse
import json
from collections.abc import Sequence

from qlora_jax.commands.common import count, say, seed, share, temperature, warn_if_gpu_idle
from qlora_jax.errors import UserError
from qlora_jax.train import rundir

TEXT = "Answer prompts with a run's model."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `generate`."""
    parser.add_argument("path", metavar="RUN_DIR")
    parser.add_argument("--prompt", action="append", metavar="TEXT", help="may be repeated")
    parser.add_argument("--base", action="store_true", help="without the adapter")
    parser.add_argument("--max-new-tokens", type=count, default=128, metavar="N")
    parser.add_argument(
        "--temperature", type=temperature, default=0.0, metavar="T", help="0, the default: greedy"
    )
    parser.add_argument(
        "--top-p", type=share, default=1.0, metavar="P", help="sample from this share; default 1"
    )
    parser.add_argument("--seed", type=seed, default=0, metavar="N", help="of the sampling")


def run(options: argparse.Namespace, settings: Sequence[str], command: str) -> None:
    """Generates and prints."""
    if not options.prompt:
        raise UserError('--prompt is missing; give --prompt "..."')
    rundir.open_run(options.path)
    warn_if_gpu_idle()
    import jax.numpy as jnp

    from qlora_jax.data.prompts import ask
    from qlora_jax.models.generate import generate
    from qlora_jax.train.restore import restore

    restored = restore(options.path, base=options.base, warn=say)
    text, data = restored.tokenizer, restored.config.data
    questions = [
        ask(p, text, system_prompt=data.system_prompt, template=data.template)
        for p in options.prompt
    ]
    rows = generate(
        restored.model,
        [q.ids for q in questions],
        max_new_tokens=options.max_new_tokens,
        stop_ids=text.stop_ids,
        pad_id=text.pad_id,
        dtype=jnp.dtype(restored.config.model.compute_dtype),
        temperature=options.temperature,
        top_p=options.top_p,
        seed=options.seed,
    )
    answers = [text.decode(row) for row in rows]
    if options.json:
        print(json.dumps([{"prompt": q.prompt, "answer": a} for q, a in zip(questions, answers)]))
        return
    print("\n\n".join(answers))
