"""The end of a run: exports the result as files for other tools, and writes the report."""

import dataclasses
import resource
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from qlora_jax.config import Config
from qlora_jax.formats import fresh
from qlora_jax.models import fingerprint
from qlora_jax.runtime import manifest, paths, processes
from qlora_jax.runtime.errors import RunFailed
from qlora_jax.train import examples, export, metrics, resume, rundir
from qlora_jax.train.fit import Begun, Fitted
from qlora_jax.train.metrics import read_metrics
from qlora_jax.train.prepare import Opened, PrepareRequest
from qlora_jax.train.quantization import describe_quantization
from qlora_jax.train.report import (
    RunSummary,
    Sample,
    SetLoss,
    describe_early,
    read_summary,
    write_report,
)
from qlora_jax.train.samples import answer


def existing_outputs(config: Config) -> list[str]:
    """Returns the names of the results for users in the directory of a finished run."""
    own = {export.FOLDER: config.method != "full", export.MODEL: config.model.path == fresh.NAME}
    return ["report.md", *(name for name, there in own.items() if there), "checkpoints"]


def finished(config: Config) -> RunSummary | None:
    """Returns the summary of a run that has nothing left to do; None if steps or files are missing.

    Args:
      config: config of the run to resume.

    Raises:
      UserError: the run directory cannot be read, or belongs to another config.
    """
    if not rundir.holds_run(config.output):
        return None
    rundir.check(config, resume=True, overwrite=False)
    folder = Path(config.output)
    if not resume.is_same(rundir.open_run(folder), config):
        return None
    found = _results(folder, existing_outputs(config))
    return None if found is None else read_summary(found, config.output)


def _results(folder: Path, made: Sequence[str]) -> dict[str, Any] | None:
    """Returns the results in the manifest of a finished run; None if the run is not finished.

    A run is not finished if its newest checkpoint is from another step than the results, or if an
    exported file is missing. Resuming such a run finishes it again.

    Args:
      folder: run directory.
      made: names that must exist in the directory of a finished run.

    Raises:
      UserError: the manifest cannot be read.
    """
    if not paths.exists(folder / manifest.NAME):
        return None
    told = manifest.read(folder)
    found = told.get("results")
    if not told.get("finished") or not isinstance(found, dict):
        return None
    if found.get("steps") != resume.steps_done(folder):
        return None
    return found if all(paths.exists(folder / name) for name in made) else None


def describe_finished(config: Config, summary: RunSummary) -> str:
    """Returns a line that a run is finished, with the option that continues it."""
    remedy = "--train.steps=M" if config.train.epochs is None else "--train.epochs=E"
    early = describe_early(summary)
    if early:
        remedy = "a larger --train.patience, or 0,"
    return f"{config.output}: finished at step {summary.steps:,}{early}; give {remedy} to go on"


def finish(asked: PrepareRequest, opened: Opened, begun: Begun, fitted: Fitted) -> RunSummary:
    """Exports the trained weights, answers the sample prompts again and writes the report.

    Raises:
      UserError: the run directory cannot be written to.
      RunFailed: the frozen base changed.
    """
    begun.owned.check()  # or the export would create a deleted folder again
    _export(asked, opened, begun, fitted)
    after = answer(
        asked.config,
        fitted.training.model(),
        opened.tokenizer,
        opened.data.questions,
        "answering samples after training",
        opened.mesh,
    )
    summary = _summary(asked, opened, begun, fitted, after)
    if warning := describe_no_gain(summary):
        asked.say(warning)
    processes.by_first(lambda: _report(summary))
    return summary


def _report(summary: RunSummary) -> None:
    write_report(summary)
    results = {k: v for k, v in dataclasses.asdict(summary).items() if k != "samples"}
    manifest.finish(summary.run_dir, {"results": results})


def describe_no_gain(summary: RunSummary) -> str | None:
    """Returns a warning if the lowest held-out loss is not below the loss before training."""
    before, after = summary.eval_before, summary.eval_after
    if not summary.keep_best or before is None or after is None or after < before:
        return None
    return (
        f"warning: the lowest held-out loss, {after:.4f} at step {summary.exported_step}, is not "
        f"below that before training, {before:.4f}"
    )


def _export(asked: PrepareRequest, opened: Opened, begun: Begun, fitted: Fitted) -> None:
    """Writes the adapter, or the model that was trained from scratch.

    Raises:
      UserError: the run directory cannot be written to.
      RunFailed: the frozen base changed.
    """
    config, folder, facts = asked.config, begun.owned.folder, begun.built.facts
    from_scratch = config.model.path == fresh.NAME
    if not facts.adapted and not from_scratch:
        return
    model = fitted.training.gathered()
    if facts.adapted:
        if fingerprint.base_hash(model, config.method) != facts.base_hash:
            raise RunFailed("the frozen base changed in training; this is a bug, please report it")
        asked.say(f"base unchanged: hash {facts.base_hash} before and after")
        processes.by_first(lambda: export.export_adapter(config, model, folder / export.FOLDER))
    if from_scratch:
        path = folder / export.MODEL
        processes.by_first(lambda: export.export_model(config, model, opened.tokenizer, path))


def _summary(
    asked: PrepareRequest, opened: Opened, begun: Begun, fitted: Fitted, answers: Sequence[str]
) -> RunSummary:
    config, facts, counters = opened.config, begun.built.facts, begun.counters
    before, after = counters.before, fitted.after
    targets = {name: examples.targets(x) for name, x in begun.built.held_out.items()}
    return RunSummary(
        model=config.model.path,
        method=config.method,
        quantization=describe_quantization(facts.quantization),
        rank=config.lora.rank if facts.adapted else None,
        trainable=facts.trained,
        total=facts.total,
        device=opened.device,
        base_hash=facts.base_hash if facts.adapted else "",
        steps=fitted.steps,
        planned_steps=config.train.step_count,
        exported_step=int(fitted.training.state.step),
        keep_best=config.train.keep_best,
        patience=config.train.patience,
        skipped=counters.skipped,
        wall_s=begun.earlier_s + time.perf_counter() - asked.started,
        tokens=counters.tokens,
        tokens_per_s=_median_rate(begun.owned.folder),
        peak_rss_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        peak_device_bytes=_peak_device_bytes(),
        eval_before=before.loss if before else None,
        eval_after=after.loss if after else None,
        eval_tokens=next(iter(targets.values()), 0),
        eval_sets={
            name: SetLoss(before=before.sets[name], after=after.sets[name], tokens=targets[name])
            for name in targets
            if name and before and after
        },
        samples=[
            Sample(q.prompt, q.answer, before, after)
            for q, before, after in zip(opened.data.questions, counters.answers_before, answers)
        ],
        command=asked.command,
        run_dir=str(begun.owned.folder),
    )


def _median_rate(folder: Path) -> float:
    """Returns the median over steps of the tokens per second."""
    name = "train/tokens_per_s"
    return float(
        np.median([row[name] for row in read_metrics(folder / metrics.NAME) if name in row])
    )


def _peak_device_bytes() -> int | None:
    stats = jax.local_devices()[0].memory_stats()
    return stats.get("peak_bytes_in_use") if stats else None
