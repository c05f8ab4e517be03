"""The command `qlora-jax evaluate`."""

import argparse
import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from qlora_jax import config as configs
from qlora_jax.commands.common import CHANGED, config_of, count, say, start_jax
from qlora_jax.runtime import paths
from qlora_jax.runtime.errors import UserError
from qlora_jax.train import rundir

if TYPE_CHECKING:
    from qlora_jax.evaluate.heldout import EvaluationData, HeldOut
    from qlora_jax.evaluate.multiple_choice import Accuracy, Result
    from qlora_jax.evaluate.questions import Question
    from qlora_jax.train.restore import Restored

TEXT = "Compute held-out loss or multiple-choice accuracy of a run, or of a config's base model."
CHOICE_ONLY = ("shots", "split", "examples", "name", "by")
"""Options that are only valid with `--multiple-choice`."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `evaluate` to its parser."""
    parser.epilog = (
        f"{CHANGED} For a run directory, only settings of data are valid; --data.source=FILE "
        "evaluates all of FILE."
    )
    parser.set_defaults(settings=True)
    parser.add_argument("path", metavar="RUN_DIR|CONFIG")
    parser.add_argument("--base", action="store_true", help="evaluate the model before training")
    parser.add_argument(
        "--multiple-choice",
        metavar="DATA",
        help="compute the accuracy on questions in MMLU's format: a .csv, .jsonl or .parquet file, "
        "the folder of MMLU, or a hub id",
    )
    parser.add_argument(
        "--shots",
        type=int,
        choices=range(6),
        metavar="N",
        help="number of solved examples, 0 to 5; default 0",
    )
    parser.add_argument("--split", metavar="NAME", help="split of a folder or hub id; default test")
    parser.add_argument(
        "--examples", metavar="DATA", help="data of the solved examples; default: split dev of DATA"
    )
    parser.add_argument("--name", metavar="NAME", help="configuration of a hub id")
    parser.add_argument(
        "--by",
        choices=("letter", "text"),
        help="compare letters (default) or the texts of the choices",
    )
    parser.add_argument("--batch-size", type=count, metavar="N", help="rows per batch; default 8")


def run(options: argparse.Namespace, settings: Sequence[str], command: str) -> None:
    """Evaluates the model and prints the result."""
    is_run = paths.is_dir(options.path)
    if options.multiple_choice is None and (given := _given(options)):
        raise UserError(f"--{given[0]} is only valid with --multiple-choice; remove it")
    config = rundir.open_run(options.path) if is_run else config_of(options.path, settings)
    other = _other(options, config, settings) if is_run and settings else None
    asked = None if options.multiple_choice is None else _questions(options)
    start_jax()
    from qlora_jax.train.restore import from_config, restore

    if is_run:
        restored = restore(options.path, base=options.base, warn=say)
    else:
        restored = from_config(config, say)
    if asked is not None:
        _show_choices(_choose(options, restored, *asked), options.json)
        return
    from qlora_jax.evaluate.heldout import held_out_loss

    _show_losses(held_out_loss(restored, other, say), options.json)


def _other(
    options: argparse.Namespace, config: configs.Config, settings: Sequence[str]
) -> "EvaluationData":
    """Returns the data on which the run is evaluated instead of its held-out data.

    Raises:
      UserError: a setting is not allowed.
    """
    from qlora_jax.evaluate.heldout import other_data

    other = other_data(config, configs.parse_overrides(settings))
    if options.multiple_choice is not None:
        raise UserError(f"{settings[0]}: not valid with --multiple-choice; remove it")
    return other


def _show_losses(found: Mapping[str, "HeldOut"], as_json: bool) -> None:
    """Prints the result of each held-out set; JSON has the first result, and all under `sets`."""
    named = {name: dataclasses.asdict(result) for name, result in found.items() if name}
    if as_json:
        first = dataclasses.asdict(next(iter(found.values())))
        print(json.dumps({**first, "sets": named}))
        return
    for name, result in found.items():
        what = f"{name} ({result.split})" if name else result.split
        print(
            f"step {result.step}, {what}: loss {result.loss:.4f}, "
            f"perplexity {result.perplexity:.3f} over {result.tokens:,} tokens"
        )


def _given(options: argparse.Namespace) -> list[str]:
    return [n for n in (*CHOICE_ONLY, "batch_size") if getattr(options, n) is not None]


def _questions(options: argparse.Namespace) -> tuple[list["Question"], list["Question"], str]:
    """Returns the questions, the solved examples, and the name of the metric.

    Raises:
      UserError: the data cannot be read, or DATA is one file and `--examples` is missing.
    """
    from qlora_jax.evaluate import questions

    data, split = options.multiple_choice, options.split or "test"
    single = questions.is_file(data)
    if single and options.split is None:
        split = questions.split_of(data)
    asked = questions.read(data, split, options.name)
    examples: list[Question] = []
    if options.shots:
        if single and options.examples is None:
            raise UserError(f"--shots {options.shots}: {data} is one file; give --examples DATA")
        examples = questions.read(options.examples or data, "dev", options.name)
    return asked, examples, f"{questions.title(data)}/{split}/accuracy"


def _choose(
    options: argparse.Namespace,
    restored: "Restored",
    asked: list["Question"],
    examples: list["Question"],
    metric: str,
) -> "Result":
    import jax.numpy as jnp

    from qlora_jax.evaluate import multiple_choice, questions
    from qlora_jax.runtime.display import progress

    with progress("answering", sum(len(q.choices) for q in asked)) as advance:
        return multiple_choice.evaluate(
            restored.model,
            restored.tokenizer,
            asked,
            questions.by_subject(examples),
            metric=metric,
            shots=options.shots or 0,
            by=options.by or "letter",
            dtype=jnp.dtype(restored.config.model.compute_dtype),
            batch_size=options.batch_size or 8,
            advance=advance,
        )


def _show_choices(result: "Result", as_json: bool) -> None:
    if as_json:
        print(json.dumps(dataclasses.asdict(result)))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{result.metric}, {result.shots}-shot, by {result.by}")
    for name in ("subject", "questions", "accuracy", "95% interval"):
        table.add_column(name, justify="left" if name == "subject" else "right")
    for name, own in result.subjects.items():
        table.add_row(name or "-", *_cells(own))
    table.add_section()
    table.add_row("all questions", *_cells(result.total))
    table.add_row("mean of subjects", "", f"{result.macro:.1%}", "")
    Console().print(table)
    for number, what in (
        (result.shortened, "had fewer solved examples than --shots"),
        (result.cut, "were cut at their beginning"),
    ):
        if number:
            say(f"{number:,} questions {what}, because the model has too few positions")


def _cells(own: "Accuracy") -> tuple[str, str, str]:
    return f"{own.count:,}", f"{own.accuracy:.1%}", f"{own.low:.1%} to {own.high:.1%}"
