"""The command `qlora-jax bench`."""

import argparse
import contextlib
import dataclasses
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from qlora_jax.bench.options import (
    BENCHMARKS,
    DTYPES,
    KERNELS,
    METHODS,
    OFFLOAD,
    OPERATIONS,
    REMAT,
    GenerateOptions,
    KernelOptions,
    Options,
    StepOptions,
)
from qlora_jax.commands import gpu_report, time_notice
from qlora_jax.commands.common import count as _count
from qlora_jax.commands.common import say
from qlora_jax.runtime import paths
from qlora_jax.runtime.errors import UserError

MODEL = "random-smollm2-135m"
MODEL_HELP = (
    "a Hugging Face folder, a .gguf file, a hub id, a built-in model, or random weights of a real "
    f"shape: random-smollm2-135m, random-tinyllama-1.1b; default: {MODEL}"
)
PUBLISHED_HELP = "; or a published name of `qlora-jax plan --model`: random weights, no files"
WHAT = {
    "kernels": "quantizing, decoding, and products with 4-bit weights, forward and backward",
    "step": "a training step: tokens/s and peak memory",
    "load": "loading a checkpoint into NF4: seconds and peak memory",
    "generate": "greedy generation: prefill, decode and peak memory",
}


GPU = "gpu"
"""Name of the benchmark with options in `gpu_report`; it checks and reports everything."""

TEXT = "Measure this machine, and installed peers for comparison."


def add_arguments(parser: Any) -> None:
    """Adds the benchmarks and their options to the parser of `bench`."""
    benchmarks = parser.add_subparsers(
        dest="what", required=True, metavar="WHAT", title="benchmarks"
    )
    for what, text in WHAT.items():
        own = benchmarks.add_parser(
            what, help=text, description=f"Measure {text}.", allow_abbrev=False
        )
        _ADD[what](own)
        own.add_argument(
            "--peer",
            action="append",
            default=[],
            metavar="PYTHON",
            help="Python interpreter with bitsandbytes (and PEFT, transformers) or, for kernels, "
            "qwix, to measure in alternation with this package; may be repeated",
        )
        own.add_argument(
            "--rounds", type=_count, metavar="N", help="runs per tool; default 1, or 3 with peers"
        )
        own.add_argument("--plot", type=Path, metavar="FILE", help="PNG file to draw")
        _add_common(own, "print the summary and every run as JSON")
    own = benchmarks.add_parser(
        GPU,
        help=gpu_report.TEXT,
        description=gpu_report.DESCRIPTION,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    gpu_report.add_arguments(own)
    _add_common(own, "print the report as JSON")


def _add_common(parser: argparse.ArgumentParser, json_help: str) -> None:
    # SUPPRESS: the default must not overwrite an option that was given before WHAT
    for flag, text in {"--json": json_help, "--debug": "show the traceback of an error"}.items():
        parser.add_argument(flag, action="store_true", default=argparse.SUPPRESS, help=text)


def run(options: argparse.Namespace, settings: Sequence[str], command: str) -> None:
    """Runs the benchmark and prints the results.

    Raises:
      UserError: a peer, the model or a file cannot be used.
      RunFailed: a run failed.
    """
    if options.what == GPU:
        gpu_report.run(options, command)
        return
    from qlora_jax.bench import compare, plot, tools
    from qlora_jax.bench.table import remarks, table

    what = options.what
    chosen = options_of(options)
    sides = [tools.ours(), *(tool for python in options.peer for tool in tools.peers(python, what))]
    chosen = with_model(chosen, len(sides) > 1, say)
    count = options.rounds or (3 if len(sides) > 1 else 1)
    time_notice.tell_expected_time(f"bench {what}", runs=count * len(sides), **_amounts(chosen))
    rounds = []
    for i in range(count):
        if count > 1:
            say(f"round {i + 1} of {count}: {', '.join(side.name for side in sides)}")
        rounds.append(compare.round_of(sides, what, chosen, say))
    summary = compare.summarize(rounds)
    if options.plot is not None:
        plot.save({what: summary}, options.plot)
    if options.json:
        print(json.dumps({"what": what, "summary": summary, "rounds": rounds}))
        return
    print(table(summary))
    print("\n" + "\n".join(remarks(rounds)))


def _amounts(options: Options) -> dict[str, float]:
    """Returns the amounts of work in one run of a benchmark, for `runtime.time_estimates`.

    Raises:
      UserError: the model cannot be opened, or has fewer positions than a row.
    """
    from qlora_jax.bench.cases import cases, settle
    from qlora_jax.commands.plan import of_model, shapes

    if isinstance(options, KernelOptions):
        return {"calls": options.samples * len(list(cases(settle(options, "cpu"))))}
    decoder = shapes(of_model(options.model, {}))
    found: dict[str, float] = {"parameters": time_notice.parameters(decoder)}
    if isinstance(options, StepOptions):
        from qlora_jax.bench.step import check_length

        check_length(options, decoder)
        found["tokens"] = (options.steps + 1) * options.batch * options.seq
    if isinstance(options, GenerateOptions):
        found["tokens"] = (options.samples + 1) * options.tokens
    return found


def with_model(options: Options, peers: bool, say: Callable[[str], None]) -> Options:
    """Returns the options, with the name of a random model replaced by its folder.

    Args:
      options: options of the benchmark.
      peers: whether peers are measured, too.
      say: function called with lines for the user.

    Raises:
      UserError: peers cannot read the model, or the cache cannot be written.
    """
    model = getattr(options, "model", None)
    if model is None:
        return options
    from qlora_jax.bench import random_models
    from qlora_jax.models.shapes import SHAPES

    if isinstance(options, StepOptions) and model in SHAPES:
        return options
    if model in random_models.SHAPES:
        return dataclasses.replace(options, model=str(random_models.folder(model, say)))  # type: ignore[arg-type]
    if peers and not paths.is_dir(model):
        raise UserError(
            f"{model}: peers can only read a Hugging Face folder; give one, or random weights: "
            f"{', '.join(random_models.SHAPES)}"
        )
    return options


def options_of(parsed: argparse.Namespace) -> Options:
    """Returns the options of a benchmark from parsed arguments."""
    kind = BENCHMARKS[parsed.what]
    return kind(**{f.name: getattr(parsed, f.name) for f in dataclasses.fields(kind)})


def _kernels(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--shapes",
        type=_list(_shape),
        default=(),
        metavar="KxN,...",
        help="shapes of the weights; default 4096x4096, on a GPU also 4096x11008 and 8192x28672",
    )
    parser.add_argument(
        "--rows",
        type=_list(_count),
        default=(),
        metavar="M,...",
        help="rows of the products; default 1,16,512,2048, on a GPU also 4, 64 and 8192",
    )
    parser.add_argument(
        "--dtypes",
        type=_list(_one_of(DTYPES)),
        default=(),
        metavar="DTYPE,...",
        help="dtypes of the products; default bfloat16,float32, on a GPU bfloat16",
    )
    parser.add_argument(
        "--operations",
        type=_list(_one_of(OPERATIONS)),
        default=OPERATIONS,
        metavar="NAME,...",
        help=f"operations to time; default {','.join(OPERATIONS)}",
    )
    _add_count(parser, "samples", 10, "timed calls of each case")
    parser.set_defaults(device="")


def step_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `bench step` to its parser."""
    _model(parser, PUBLISHED_HELP)
    parser.add_argument("--method", choices=METHODS, default="qlora", help="method; default qlora")
    _compute(parser)
    parser.add_argument(
        "--remat",
        choices=REMAT,
        default="dots",
        help="remat policy; default dots; peers have only none and full",
    )
    _add_count(parser, "batch", 2, "rows of a batch")
    _add_count(parser, "seq", 256, "tokens per row")
    _add_count(parser, "rank", 16, "rank of the adapters")
    _add_count(parser, "steps", 6, "timed steps")
    parser.add_argument(
        "--alpha", type=_positive, metavar="X", help="alpha of the adapters; default twice the rank"
    )
    parser.add_argument(
        "--target-modules",
        type=_list(str),
        default=(),
        metavar="NAME,...",
        help="linears with an adapter, such as q_proj,v_proj; default all",
    )
    parser.add_argument(
        "--offload",
        choices=OFFLOAD,
        default="device",
        help="place of the moments; for peers, host is a paged optimizer; default device",
    )
    _kernel(parser)
    parser.add_argument(
        "--no-prepare",
        dest="prepare",
        action="store_false",
        help="for peers: do not call peft.prepare_model_for_kbit_training",
    )
    parser.set_defaults(seed=0, shape=None)


def _load(parser: argparse.ArgumentParser) -> None:
    _model(parser)


def _generate(parser: argparse.ArgumentParser) -> None:
    _model(parser)
    _compute(parser)
    _add_count(parser, "prompt", 34, "tokens of the prompt")
    _add_count(parser, "tokens", 64, "tokens to generate")
    _add_count(parser, "rows", 1, "answers generated together")
    _kernel(parser)
    _add_count(parser, "samples", 5, "timed answers")
    parser.set_defaults(seed=0)


_ADD: dict[str, Callable[[argparse.ArgumentParser], None]] = {
    "kernels": _kernels,
    "step": step_arguments,
    "load": _load,
    "generate": _generate,
}


def _model(parser: argparse.ArgumentParser, more: str = "") -> None:
    parser.add_argument("model", nargs="?", default=MODEL, metavar="MODEL", help=MODEL_HELP + more)


def _compute(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--dtype", choices=DTYPES, default="bfloat16", help="compute dtype; default bfloat16"
    )


def _kernel(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--kernel",
        choices=KERNELS,
        help="for this package: implementation of every product with 4-bit weights; default by "
        "device, dtype and rows",
    )


def _add_count(parser: argparse.ArgumentParser, name: str, default: int, text: str) -> None:
    help = f"{text}; default {default}"
    parser.add_argument(f"--{name}", type=_count, default=default, metavar="N", help=help)


def _positive(text: str) -> float:
    with contextlib.suppress(ValueError):
        if 0 < (value := float(text)) < math.inf:
            return value
    raise argparse.ArgumentTypeError(f"must be a number above 0, not {text!r}")


def _list(kind: Callable[[str], Any]) -> Callable[[str], tuple[Any, ...]]:
    return lambda text: tuple(kind(part.strip()) for part in text.split(","))


def _shape(text: str) -> tuple[int, int]:
    sides: Sequence[str] = text.split("x")
    if len(sides) != 2:
        raise argparse.ArgumentTypeError(f"a shape is IN x OUT such as 4096x4096, not {text!r}")
    return _count(sides[0]), _count(sides[1])


def _one_of(names: Sequence[str]) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text in names:
            return text
        raise argparse.ArgumentTypeError(f"{text!r} is not one of {', '.join(names)}")

    return parse
