"""The command line. Results go to stdout, everything else to stderr."""

import argparse
import contextlib
import dataclasses
import json
import os
import shlex
import sys
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path

from qlora_jax import config as configs
from qlora_jax.errors import RunFailed, UserError

DONE, FAILED, USER_ERROR, INTERRUPTED = 0, 1, 2, 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit code."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    options, rest = _parser().parse_known_args(arguments)
    with _exit_code(options.debug) as code:
        options.run(options, rest, shlex.join(["qlora-jax", *arguments]))
    return code.value


@dataclasses.dataclass
class _Code:
    value: int = DONE


@contextlib.contextmanager
def _exit_code(debug: bool) -> Iterator[_Code]:
    code = _Code()
    try:
        yield code
    except UserError as e:
        code.value = USER_ERROR
        _fail(str(e), debug)
    except RunFailed as e:
        code.value = FAILED
        _fail(str(e), debug)
    except KeyboardInterrupt:
        code.value = INTERRUPTED
        _fail("interrupted", debug)
    except BrokenPipeError:
        # The reader of stdout went away, as `| head` does; there is nobody to tell.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except Exception as e:
        if (number := getattr(e, "code", None)) is None:
            raise
        code.value = number
        _fail(str(e), debug)


def _fail(message: str, debug: bool) -> None:
    if debug:
        traceback.print_exc()
    print(f"qlora-jax: {' '.join(message.split())}", file=sys.stderr)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="qlora-jax", description="LoRA and QLoRA fine-tuning in JAX.", allow_abbrev=False
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--debug", action="store_true", help="show the traceback of an error")
    common.add_argument("--json", action="store_true", help="print the results as JSON")

    def command(name: str, run: object, text: str, **more: str) -> argparse.ArgumentParser:
        made = commands.add_parser(
            name,
            help=text,
            description=text,
            parents=[common],
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            **more,  # type: ignore[arg-type]
        )
        made.set_defaults(run=run)
        return made

    train = command(
        "train",
        _train,
        "Fine-tune a model; writes a run directory.",
        usage="qlora-jax train CONFIG [--resume | --overwrite] [--preview N] [--section.key=value ...]",
        epilog=_settings(),
    )
    train.add_argument("config", metavar="CONFIG", help="YAML file, or a run directory")
    train.add_argument("--resume", action="store_true", help="go on where the run stopped")
    train.add_argument("--overwrite", action="store_true", help="delete the run that is there")
    train.add_argument(
        "--preview", type=int, metavar="N", help="print N examples, loss marked, and stop"
    )

    evaluate = command(
        "evaluate", _evaluate, "Held-out loss and perplexity of a run, or of a config's base model."
    )
    evaluate.add_argument("path", metavar="RUN_DIR|CONFIG")
    evaluate.add_argument("--base", action="store_true", help="the model before training")

    generate = command("generate", _generate, "Answer prompts with a run's model.")
    generate.add_argument("path", metavar="RUN_DIR")
    generate.add_argument("--prompt", action="append", metavar="TEXT", help="may be repeated")
    generate.add_argument("--base", action="store_true", help="without the adapter")
    generate.add_argument("--max-new-tokens", type=int, default=128, metavar="N")
    generate.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (default)")
    generate.add_argument("--top-p", type=float, default=1.0)
    generate.add_argument("--seed", type=int, default=0)
    return parser


def _settings() -> str:
    lines = ["settings, each also as --section.key=value:"]
    for setting in configs.settings():
        lines.append(f"  {setting.key}: {setting.type} = {setting.default}")
        lines.append(f"      {setting.doc}")
    return "\n".join(lines)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _warn_if_gpu_idle() -> None:
    from qlora_jax.device import warn_if_gpu_idle

    if warning := warn_if_gpu_idle():
        _say(warning)


def _config(path: str, rest: Sequence[str]) -> configs.Config:
    from qlora_jax.train import rundir

    file = Path(path) / rundir.CONFIG
    return configs.load(file if file.is_file() else path, configs.parse_overrides(rest))


def _no_more(rest: Sequence[str]) -> None:
    if rest:
        raise UserError(f"unexpected argument {rest[0]!r}; see --help")


def _train(options: argparse.Namespace, rest: Sequence[str], command: str) -> None:
    config = _config(options.config, rest)
    if options.resume and options.overwrite:
        raise UserError("--resume and --overwrite exclude each other; give one")
    _warn_if_gpu_idle()
    from rich.console import Console

    from qlora_jax.train.report import print_samples
    from qlora_jax.train.run import describe_data, train
    from qlora_jax.train.setup import open_model, read_data

    if options.preview is not None:
        from qlora_jax.data.preview import preview

        text = open_model(config)[1]
        data = read_data(config, text)
        Console().print(preview(data.train, text, options.preview))
        _say(describe_data(data))
        return
    summary = train(
        config, say=_say, command=command, resume=options.resume, overwrite=options.overwrite
    )
    if options.json:
        print(json.dumps(dataclasses.asdict(summary)))
        return
    print_samples(Console(), summary.samples)
    if summary.eval_before is not None and summary.eval_after is not None:
        change = summary.eval_after / summary.eval_before - 1
        print(
            f"held-out loss: {summary.eval_before:.4f} before, {summary.eval_after:.4f} after "
            f"({change:+.1%})"
        )
    print(f"run directory: {summary.run_dir} (report.md, adapter/, checkpoints/)")


def _evaluate(options: argparse.Namespace, rest: Sequence[str], command: str) -> None:
    from qlora_jax.evaluate.heldout import held_out_loss
    from qlora_jax.train.restore import from_config, restore

    if Path(options.path).is_dir():
        _no_more(rest)
        _warn_if_gpu_idle()
        restored = restore(options.path, base=options.base, warn=_say)
    else:
        config = _config(options.path, rest)
        _warn_if_gpu_idle()
        restored = from_config(config, _say)
    result = held_out_loss(restored)
    if options.json:
        print(json.dumps(dataclasses.asdict(result)))
        return
    print(
        f"step {result.step}, {result.split}: loss {result.loss:.4f}, "
        f"perplexity {result.perplexity:.3f} over {result.tokens:,} tokens"
    )


def _generate(options: argparse.Namespace, rest: Sequence[str], command: str) -> None:
    _no_more(rest)
    if not options.prompt:
        raise UserError('--prompt is missing; give --prompt "..."')
    _warn_if_gpu_idle()
    import jax.numpy as jnp

    from qlora_jax.data.prompts import ask
    from qlora_jax.models.generate import generate
    from qlora_jax.train.restore import restore

    restored = restore(options.path, base=options.base, warn=_say)
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


if __name__ == "__main__":
    sys.exit(main())
