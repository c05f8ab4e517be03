"""A fine-tuning run from its config to its report."""

import contextlib
import dataclasses
import hashlib
import resource
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from qlora_jax.config import Config, QuantConfig
from qlora_jax.data.loader import Loader, held_out_batches
from qlora_jax.data.prompts import Question
from qlora_jax.formats import fresh, peft
from qlora_jax.kernels.select import choose_kernel
from qlora_jax.models import fingerprint, trees
from qlora_jax.models.config import DecoderConfig
from qlora_jax.models.decoder import Decoder
from qlora_jax.models.generate import generate
from qlora_jax.quant.codebooks import codebook
from qlora_jax.runtime import manifest, paths
from qlora_jax.runtime.device import describe_devices
from qlora_jax.runtime.errors import RunFailed
from qlora_jax.text.tokenizer import Tokenizer
from qlora_jax.train import export, metrics, rundir, start
from qlora_jax.train import step as steps
from qlora_jax.train.checkpoint import Checkpoints
from qlora_jax.train.display import progress
from qlora_jax.train.identity import check_identity, starts_as_base
from qlora_jax.train.loop import Progress, evaluate, loop
from qlora_jax.train.metrics import MetricsLog, read_metrics
from qlora_jax.train.offload import ON_DEVICE, Placement
from qlora_jax.train.optimizer import adamw, schedule
from qlora_jax.train.report import Sample, Summary, write_report
from qlora_jax.train.setup import (
    Data,
    describe_quantization,
    held_quantization,
    load_model,
    open_model,
    read_data,
)


def train(
    config: Config,
    *,
    say: Callable[[str], None],
    command: str,
    resume: bool = False,
    overwrite: bool = False,
    place: Callable[[DecoderConfig], Placement] = lambda decoder: ON_DEVICE,
) -> Summary:
    """Fine-tunes, and leaves a run directory with the adapter, checkpoints and a report.

    Args:
      config: of the run.
      say: called with lines for the user.
      command: what reproduces the run, for the report and the manifest.
      resume: go on where the directory's run stopped.
      overwrite: delete the run that the directory holds.
      place: where the optimizer's state lives, given the model's shapes; asked before weights are
        read, it may refuse the run.

    Raises:
      UserError: the input is at fault; nothing is left half-written.
      RunFailed: the loss is not finite, or the frozen base changed.
      Stopped: by a signal, with the state saved.
    """
    with contextlib.ExitStack() as held:
        return _train(config, say, command, resume, overwrite, place, held)


def _train(
    config: Config,
    say: Callable[[str], None],
    command: str,
    resume: bool,
    overwrite: bool,
    place: Callable[[DecoderConfig], Placement],
    held: contextlib.ExitStack,
) -> Summary:
    """`train`; `held` keeps the run directory this run's until it is closed."""
    started = time.perf_counter()
    config = start.resolved(config)
    rundir.check(config, resume=resume, overwrite=overwrite)
    choose_kernel(config, jax.devices()[0])  # refuses before anything is loaded
    checkpoint, text = open_model(config, say)
    moments = place(checkpoint.config)
    data = read_data(config, text, checkpoint.config.max_positions)
    device = str(describe_devices())
    say(f"{config.method} of {config.model.path} ({checkpoint.description}) on {device}")
    say(describe_data(data))
    model, specs = load_model(config, checkpoint, say)
    trained_count, total_count = trees.parameter_counts(model, config.method)
    say(f"trainable: {trained_count:,} of {total_count:,} ({trained_count / total_count:.3%})")
    if config.method == "qlora":
        bits, bytes_ = trees.quantized_size(model)
        say(f"quantized linears: {bits:.3f} bits per parameter, {bytes_ / 2**20:.1f} MiB")
    if scales := sorted({round(spec.scale, 6) for spec in specs.values()}):
        say(f"adapter scale ({config.lora.scaling}): {', '.join(map(str, scales))}")

    base_hash = fingerprint.base_hash(model, config.method)
    base_changed = _base_changed(model, config) if resume else None
    graph, trained, frozen = trees.split(model, config.method)
    del model
    if specs and starts_as_base(config):
        check_identity(graph, trained, frozen, config)
    optimizer = adamw(config.optimizer, config.train.steps)
    state = steps.init(trained, optimizer, config.model.compute_dtype == "float16", moments)
    del trained  # a resumed run replaces it, and must not hold both
    program = steps.build(
        graph,
        optimizer,
        compute_dtype=jnp.dtype(config.model.compute_dtype),
        remat=config.model.remat,
        clip_norm=config.optimizer.clip_norm,
        train_head=config.method == "full",
        moments=moments,
    )
    loader = Loader(
        data.train,
        config.data,
        batch_size=config.train.batch_size,
        gradient_accumulation=config.train.gradient_accumulation,
        seed=config.train.seed,
        pad_id=text.pad_id,
    )
    rows = config.train.eval_rows
    held_out = (
        held_out_batches(data.held_out, config.data, config.train.batch_size, rows, text.pad_id)
        if data.held_out
        else []
    )
    # All that the input can be at fault for is behind: only now is anything written.
    quant = held_quantization(config, checkpoint)
    facts = {
        "base_hash": base_hash,
        "codebook_sha256": _codebook_hash(quant),
        "quantization": dataclasses.asdict(quant) if quant else None,
    }
    if config.lora.from_adapter is not None and specs:
        facts["from_adapter_sha256"] = peft.sha256(Path(config.lora.from_adapter))
    described = manifest.build(config, command, facts)
    goes_on = resume and rundir.holds_run(config.output)
    claim = rundir.claim(config, described, resume=resume, overwrite=overwrite)
    owned = held.enter_context(claim)
    run_dir = owned.folder
    checkpoints = Checkpoints(run_dir, config.train.keep, owned.check)
    counters = Progress()
    if resumed := resume and checkpoints.latest() is not None:
        state, extra = checkpoints.restore(state, say=say)
        loader.restore(extra["loader"])
        counters = Progress(**extra["progress"])
        if base_changed:
            say(base_changed)
        say(f"resumed from step {int(state.step)}")
    earlier_s = counters.seconds

    def answers(description: str) -> list[str]:
        return answer(
            config, nnx.merge(graph, state.trained, frozen), text, data.questions, description
        )

    with MetricsLog(run_dir, start_step=int(state.step)) as log:
        if log.lost:
            say(
                f"warning: {log.path}: damaged: {len(log.lost)} of the {int(state.step)} steps "
                f"resumed from have no line, the first is step {log.lost[0]}; the report lacks them"
            )
        if goes_on:  # and what is there can be read
            manifest.write(run_dir, described, resumed=True)
        if not resumed:
            if held_out:
                counters.eval_before, _ = _evaluate(program, state, frozen, held_out, log, 0)
                say(f"held-out loss before training: {counters.eval_before:.4f}")
            counters.answers_before = answers("answering samples before training")
        rate = schedule(config.optimizer, config.train.steps)
        state = loop(
            config,
            program,
            state,
            frozen,
            loader,
            held_out,
            checkpoints,
            log,
            counters,
            rate,
            moves=moments is not ON_DEVICE,
        )
        checkpoints.close()
        eval_after, eval_tokens = None, 0
        if held_out:
            eval_after, eval_tokens = _evaluate(
                program, state, frozen, held_out, log, int(state.step)
            )
    owned.check()  # what follows would make a deleted folder anew
    if specs:
        adapted = nnx.merge(graph, state.trained, frozen)
        if fingerprint.base_hash(adapted, config.method) != base_hash:
            raise RunFailed("the frozen base changed in training; this is a bug, please report it")
        say(f"base unchanged: hash {base_hash} before and after")
        export.export_adapter(config, adapted, run_dir / export.FOLDER)
    if config.model.path == fresh.NAME:
        export.export_model(
            config, nnx.merge(graph, state.trained, frozen), text, run_dir / export.MODEL
        )
    after = answers("answering samples after training")
    summary = Summary(
        model=config.model.path,
        method=config.method,
        quantization=describe_quantization(quant),
        rank=config.lora.rank if specs else None,
        trainable=trained_count,
        total=total_count,
        device=device,
        base_hash=base_hash if specs else "",
        steps=int(state.step),
        skipped=counters.skipped,
        wall_s=earlier_s + time.perf_counter() - started,
        tokens=counters.tokens,
        tokens_per_s=_median_rate(run_dir),
        peak_rss_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        peak_device_bytes=_peak_device_bytes(),
        eval_before=counters.eval_before,
        eval_after=eval_after,
        eval_tokens=eval_tokens,
        samples=[
            Sample(q.prompt, q.answer, before, now)
            for q, before, now in zip(data.questions, counters.answers_before, after)
        ],
        command=command,
        run_dir=str(run_dir),
    )
    write_report(summary)
    results = {k: v for k, v in dataclasses.asdict(summary).items() if k != "samples"}
    manifest.finish(run_dir, {"results": results})
    return summary


def answer(
    config: Config,
    model: Decoder,
    text: Tokenizer,
    questions: Sequence[Question],
    description: str,
) -> list[str]:
    """The model's greedy answers, decoded."""
    if not questions:
        return []
    with progress(description, len(questions)) as advance:
        rows = generate(
            model,
            [q.ids for q in questions],
            max_new_tokens=config.train.sample_tokens,
            stop_ids=text.stop_ids,
            pad_id=text.pad_id,
            dtype=jnp.dtype(config.model.compute_dtype),
        )
        advance(len(questions))
    return [text.decode(row) for row in rows]


def describe_data(data: Data) -> str:
    """One line on what is trained on, and what was left out."""
    stats = data.stats
    parts = [
        f"{stats.examples:,} examples, {stats.tokens:,} tokens of which {stats.target_tokens:,} "
        f"carry loss; {len(data.held_out):,} held out"
    ]
    if stats.truncated:
        parts.append(f"{stats.truncated:,} cut at the sequence length")
    parts += [f"{count:,} left out: {reason}" for reason, count in data.dropped.items()]
    return "; ".join(parts)


def _evaluate(
    program: steps.Program,
    state: steps.State,
    frozen: Any,
    held_out: Sequence[dict[str, np.ndarray]],
    log: MetricsLog,
    step: int,
) -> tuple[float, int]:
    with progress("evaluating", None):
        loss, tokens = evaluate(program, state.trained, frozen, held_out)
    log.write(step, {"eval/loss": loss, "eval/perplexity": float(np.exp(loss))})
    return loss, tokens


def _median_rate(run_dir: Path) -> float:
    rows = read_metrics(run_dir / metrics.NAME)
    name = "train/tokens_per_s"
    return float(np.median([row[name] for row in rows if name in row]))


def _base_changed(model: Decoder, config: Config) -> str | None:
    """A warning where the run to be resumed began with other weights."""
    folder = Path(config.output)
    if not paths.exists(folder / manifest.NAME):
        return None
    before = manifest.base_hash(manifest.read(folder))
    found = fingerprint.like(before, model, config.method)
    if found == before:
        return None
    return (
        f"warning: the model's weights are not those the run began with (hash {found}, "
        f"then {before}): the files, the device or a version changed"
    )


def _codebook_hash(quant: QuantConfig | None) -> str | None:
    if quant is None:
        return None
    values = codebook(quant.codebook, quant.block_size)
    return hashlib.sha256(values.tobytes()).hexdigest()


def _peak_device_bytes() -> int | None:
    stats = jax.devices()[0].memory_stats()
    return stats.get("peak_bytes_in_use") if stats else None
