"""The command `qlora-jax generate`."""

import argparse
import dataclasses
import functools
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from qlora_jax.commands.common import (
    add_adapter_options,
    add_sampling_options,
    by_name,
    say,
    show,
    start_jax,
)
from qlora_jax.runtime.errors import UserError

if TYPE_CHECKING:
    from qlora_jax.lora import LoraSet
    from qlora_jax.serve.base import Base

TEXT = "Answer prompts with a run's model, a plain model, or several adapters for comparison."

EPILOG = """With --adapter, each adapter answers every prompt, and with --base also the base; all
answers are one batch. The run's own adapter answers only if it is one of them. If an adapter
changes the embedding or the head, the adapters answer one after another."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `generate` to its parser."""
    parser.epilog = EPILOG
    parser.add_argument(
        "path",
        metavar="MODEL_OR_RUN",
        help="a run directory, or a model as in model.path",
    )
    parser.add_argument("--prompt", action="append", metavar="TEXT", help="may be repeated")
    parser.add_argument("--base", action="store_true", help="answer without the adapter")
    add_sampling_options(parser, most=128)
    add_adapter_options(parser)


def run(options: argparse.Namespace, settings: Sequence[str], command: str) -> None:
    """Generates the answers and prints them."""
    if not options.prompt:
        raise UserError('--prompt is missing; give --prompt "..."')
    if options.adapter:
        _compare(options, by_name(options.adapter))
        return
    start_jax()
    from qlora_jax.serve.base import open_trained

    own = open_trained(
        options.path, base=options.base, bits=options.bits, dtype=options.dtype, warn=say
    )
    answers = _answers(options, own)
    if options.json:
        print(json.dumps([{"prompt": p, "answer": a} for p, a in zip(options.prompt, answers)]))
        return
    show("\n\n".join(answers))


def _compare(options: argparse.Namespace, adapters: Mapping[str, str]) -> None:
    """Answers every prompt with every adapter, and shows the answers."""
    start_jax()
    from qlora_jax.models.weight_shapes import outer_modules
    from qlora_jax.serve.base import is_run, open_base, read_named

    named = read_named(adapters)
    first = named[0]
    open_one = functools.partial(
        open_base, options.path, bits=options.bits, dtype=options.dtype, warn=say
    )
    alone = len(named) == 1 and not options.base and not is_run(options.path)
    if alone and first.stored.beyond_lora:
        base = open_one(adapter=first.folder)
        answers = _answers(options, base)
        _show_answers(options, [first.name], [[answer] for answer in answers])
        return
    base = open_one()
    worn: list[LoraSet] = [own.on(base.model) for own in named]
    worn += [{}] if options.base else []
    together = not any(own.keys() & outer_modules(base.model.config).keys() for own in worn)
    names = [*(own.name for own in named), *([None] if options.base else [])]
    _show_answers(options, names, (_side_by_side if together else _in_turn)(options, base, worn))


def _show_answers(
    options: argparse.Namespace, names: Sequence[str | None], answers: Sequence[Sequence[str]]
) -> None:
    """Shows the answers to each prompt, in the order of `names`; the name None is the base."""
    rows = [
        {"prompt": prompt, "adapter": name, "answer": answer}
        for prompt, own in zip(options.prompt, answers)
        for name, answer in zip(names, own)
    ]
    if options.json:
        print(json.dumps(rows))
        return
    for row in rows:
        where = f" | {row['prompt']}" if len(options.prompt) > 1 else ""
        show(f"[{row['adapter'] or 'base'}{where}]\n{row['answer']}\n")


def _side_by_side(
    options: argparse.Namespace, base: "Base", adapters: "Sequence[LoraSet]"
) -> list[list[str]]:
    """Returns each prompt's answers, one per adapter, in one batch; an empty adapter: the base."""
    from qlora_jax.lora.weights import largest_rank
    from qlora_jax.models.adapters import attach_bank, put_adapter

    attach_bank(
        base.model,
        slots=len(adapters),
        rank=max(map(largest_rank, adapters)),
        dtype=base.dtype,
    )
    for slot, own in enumerate(adapters):
        put_adapter(base.model, slot, own)
    slots = range(len(adapters))
    answers = iter(_answers(options, base, slots))
    return [[next(answers) for _ in slots] for _ in options.prompt]


def _in_turn(
    options: argparse.Namespace, base: "Base", adapters: "Sequence[LoraSet]"
) -> list[list[str]]:
    """Returns the same from one batch per adapter; banks have no adapters of embedding and head."""
    from qlora_jax.models.adapters import set_adapter

    found = []
    for own in adapters:
        set_adapter(base.model, own)
        found.append(_answers(options, base))
    return [list(answers) for answers in zip(*found)]


def _answers(
    options: argparse.Namespace, base: "Base", slots: Sequence[int] | None = None
) -> list[str]:
    """Returns one answer per prompt, or one per prompt and slot if `slots` are given."""
    from qlora_jax.serve.answers import answers

    asking = base.asking
    if options.system is not None:
        asking = dataclasses.replace(asking, system_prompt=options.system)
    return answers(
        base.model,
        base.tokenizer,
        options.prompt,
        asking=asking,
        dtype=base.dtype,
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        top_p=options.top_p,
        seed=options.seed,
        slots=slots,
    )
