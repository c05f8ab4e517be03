"""The command `qlora-jax plan`: memory by the ledger and by the compiler, for one or more GPUs."""

import argparse
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qlora_jax import config as configs
from qlora_jax.commands import time_notice
from qlora_jax.commands.common import CHANGED, config_of, say
from qlora_jax.config import Config, MeshConfig
from qlora_jax.models.config import DecoderConfig
from qlora_jax.runtime import gpu_memory
from qlora_jax.runtime.errors import UserError

GIB = 2**30
ALL = "all"
SEARCH = 12
"""Usual number of compilations in a search for the largest batch and the longest sequence."""

BEYOND = 2**20
"""Longest sequence, in tokens, that a search with --beyond-positions tries."""

NOT_RUN = "Compiled for these GPUs, not run on one."
ESTIMATE = (
    "Estimate: the ledger alone. For the compiler's own figures install the compile-only GPU "
    "packages: `make install EXTRA=gpu-check` in a clone of the repository, or "
    "`pip install 'qlora-jax[gpu-check]'` beside the installed package"
)


TEXT = "Compute the memory that a run needs on a GPU, without the GPU: XLA compiles for it."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `plan` to its parser."""
    parser.usage = (
        "qlora-jax plan (CONFIG | --model NAME) [--gpu NAMES] [--rank N] [--seq N] [--mesh AXES] "
        "[--no-search] [--beyond-positions] [--plot FILE] [--json] [--debug] "
        "[--section.key=value ...]"
    )
    parser.epilog = CHANGED
    parser.set_defaults(settings=True)
    parser.add_argument("config", nargs="?", metavar="CONFIG", help="YAML file, or a run directory")
    parser.add_argument(
        "--model", metavar="NAME", help="published shapes, no weights: llama-7b, qwen2.5-7b, …"
    )
    parser.add_argument("--rank", type=int, metavar="N", help="lora.rank")
    parser.add_argument("--seq", type=int, metavar="N", help="data.sequence_length")
    parser.add_argument(
        "--mesh", metavar="AXES", help="none, fsdp=8 or data=2,fsdp=4: mesh of equal GPUs"
    )
    parser.add_argument(
        "--gpu",
        default=ALL,
        metavar="NAMES",
        help="names t4, rtx4090, … or files *.txtpb, separated by commas; default all",
    )
    parser.add_argument(
        "--no-search",
        action="store_true",
        help="with one GPU: do not search the largest batch and sequence that fit",
    )
    parser.add_argument(
        "--beyond-positions",
        action="store_true",
        help=f"search sequences of up to {BEYOND:,} tokens, even if the model has fewer positions",
    )
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw a PNG")


def short_forms(options: argparse.Namespace) -> dict[str, str]:
    """Returns the settings that `--rank`, `--seq` and `--mesh` set.

    Raises:
      UserError: the value of `--mesh` is not a mesh.
    """
    short = {"lora.rank": options.rank, "data.sequence_length": options.seq}
    given = {key: str(value) for key, value in short.items() if value is not None}
    return given if options.mesh is None else given | mesh_settings(options.mesh)


def mesh_settings(text: str) -> dict[str, str]:
    """Returns the settings for a value of `--mesh`, such as `none` or `data=2,fsdp=4`.

    Raises:
      UserError: the value is not a mesh.
    """
    if text == "none":
        return {"mesh": text}
    axes = dict(part.partition("=")[::2] for part in text.split(","))
    known = [field.name for field in dataclasses.fields(MeshConfig)]
    if not axes.keys() <= set(known):
        raise UserError(
            f"--mesh {text}: must be none, or sizes of {' and '.join(known)} such as fsdp=8 or "
            "data=2,fsdp=4"
        )
    return {f"mesh.{axis}": size for axis, size in axes.items()}


def of_model(name: str, overrides: dict[str, str]) -> Config:
    """Returns the config of a QLoRA run for a model name, with one row per step and device.

    Raises:
      UserError: a setting is not allowed.
    """
    config = configs.from_tree(
        {
            "model": {"path": name},
            "data": {"source": "none"},
            "output": "none",
            "lora": {"rank": 64, "alpha": 16},
            "train": {"batch_size": 1},
        },
        "--model",
    )
    config = configs.changed(config, overrides)
    if "train.batch_size" in overrides:
        return config
    return configs.changed(config, {"train.batch_size": str(config.mesh.devices)})


def run(options: argparse.Namespace, settings: Sequence[str], command: str) -> None:
    """Computes the plan for each GPU, prints it, and draws it.

    Raises:
      UserError: a GPU or the model is unknown, settings contradict each other, or the run fits on
        none of the GPUs; the last is raised after everything was printed.
      RunFailed: the process of a compiler died.
    """
    if (options.config is None) == (options.model is None):
        raise UserError("give either a CONFIG, or --model NAME for published shapes")
    given = configs.parse_overrides(settings) | short_forms(options)
    if options.model is not None:
        config = of_model(options.model, given)
    else:
        config = configs.changed(config_of(options.config, []), given)
    from qlora_jax.gpu.compile import has_plugin
    from qlora_jax.gpu.described import GPUS, read_gpu
    from qlora_jax.models.shapes import find
    from qlora_jax.plan.plan import SEARCHES, planned
    from qlora_jax.train.initial_values import resolved
    from qlora_jax.train.mesh import check_rows

    config = resolved(config)
    check_rows(config)
    model = find(config.model.path) if options.model else shapes(config)
    names = list(GPUS) if options.gpu == ALL else options.gpu.split(",")
    for name in names:
        read_gpu(name)
    names.sort(key=lambda name: read_gpu(name).memory)
    search = SEARCHES if len(names) == 1 and not options.no_search else ()
    if has_plugin():
        time_notice.tell_expected_time("plan", compilations=SEARCH if search else len(names))
    rows = []
    for name in names:
        own = config if options.config else suited(config, read_gpu(name).capability)
        if not has_plugin():
            rows.append(describe(model, own, name, None))
            continue
        positions = BEYOND if options.beyond_positions else None
        answer = planned(own, model, name, say, search, positions)
        rows.append(describe(model, own, name, answer))
    if options.plot is not None:
        from qlora_jax.plan import picture

        picture.save(rows, options.plot)
    if options.json:
        print(json.dumps(rows, indent=1))
    else:
        print(text(model, config, rows))
    if not any(row["fits"] for row in rows):
        over = rows[-1]["device_gib"] - rows[-1]["limit_gib"]
        raise UserError(
            f"{title(config)}: does not fit; the largest GPU given, {rows[-1]['gpu']}, lacks "
            f"{over:.2f} GiB{' per device' if config.mesh.devices > 1 else ''}; give a larger "
            "--gpu, or a smaller batch, sequence length or rank"
        )


def shapes(config: Config) -> DecoderConfig:
    """Returns the shapes of a model: from `pretrain`, the published shapes, or the model's files.

    Raises:
      UserError: the name has no published shapes, and the model has no files.
    """
    from qlora_jax.formats import fresh
    from qlora_jax.formats.source import open_checkpoint
    from qlora_jax.models.shapes import HUB, SHAPES, find

    if config.model.path == fresh.NAME:
        return fresh.shapes(config.pretrain)
    if config.model.path in SHAPES or config.model.path in HUB:
        return find(config.model.path)
    return open_checkpoint(config.model).config


def suited(config: Config, capability: tuple[int, int]) -> Config:
    """Returns the config, with float16 for GPUs without bfloat16 (compute capability below 8.0)."""
    from qlora_jax.kernels.target import half_dtype

    if half_dtype(capability) == "bfloat16":
        return config
    half = ("model.compute_dtype", "model.storage_dtype")
    return configs.changed(config, dict.fromkeys(half, "float16"))


def describe(
    model: DecoderConfig, config: Config, gpu: str, answer: dict[str, Any] | None
) -> dict[str, Any]:
    """Returns the plan for one GPU as JSON values.

    Args:
      model: shapes of the model.
      config: config of the run.
      gpu: name of the GPU.
      answer: result of `plan.planned`; None uses only the ledger.
    """
    from qlora_jax.gpu.described import read_gpu
    from qlora_jax.plan import traffic_text
    from qlora_jax.plan.advice import changes
    from qlora_jax.plan.ledger import ledger, total

    limit = gpu_memory.usable(read_gpu(gpu).memory)
    plan = answer["plan"] if answer else None
    offload, remat = (plan.offload, plan.remat) if plan else _by_ledger(model, config, limit)
    config = configs.changed(config, {"optimizer.offload": offload, "model.remat": remat})
    parts = ledger(model, config)
    device = plan.device if plan else total(parts)
    host = plan.host if plan else total(parts, "host")
    row: dict[str, Any] = {
        "gpu": gpu,
        "title": title(config),
        "device_gib": device / GIB,
        "host_gib": host / GIB,
        "limit_gib": limit / GIB,
        "fits": device <= limit,
        "compiled": plan is not None,
        "offload": offload,
        "remat": remat,
        "components": {name: part._asdict() for name, part in parts.items()},
    }
    exact = {name: part.nbytes for name, part in parts.items() if part.exact}
    row["stack"] = _stack(exact, device)
    if plan:
        row["programs"] = [{**p._asdict(), "device": p.device} for p in plan.programs]
        row["temporaries"] = [t._asdict() for t in plan.temporaries]
        row |= traffic_text.described(plan)
    if answer:
        row |= {key: value for key, value in answer.items() if key != "plan"}
    if not row["fits"]:
        made, missing = changes(model, config, device - limit)
        row["changes"] = [change._asdict() for change in made]
        row["missing_after_changes_gib"] = max(missing, 0) / GIB
    return row


def title(config: Config) -> str:
    """Returns a short description of the run."""
    parts = [f"{config.model.path}, {config.method}"]
    if config.method != "full":
        parts.append(f"rank {config.lora.rank}")
    parts.append(f"{config.train.batch_size} x {config.data.sequence_length} tokens")
    if config.mesh.devices > 1:
        parts.append(f"mesh data {config.mesh.data} x fsdp {config.mesh.fsdp}")
    return ", ".join(parts)


def text(model: DecoderConfig, config: Config, rows: Sequence[dict[str, Any]]) -> str:
    """Returns the text to print."""
    from qlora_jax.plan import ledger as ledgers
    from qlora_jax.plan import paper_claims, traffic_text

    lines = [title(config), NOT_RUN if rows[0]["compiled"] else ESTIMATE, ""]
    if config.mesh.devices > 1:
        lines += [f"The figures are for each of the {config.mesh.devices} GPUs.", ""]
    lines.append("gpu      device GiB  may use  host GiB  moments  remat  verdict")
    for row in rows:
        margin = row["limit_gib"] - row["device_gib"]
        verdict = f"fits, {margin:.2f} to spare" if row["fits"] else f"lacks {-margin:.2f}"
        lines.append(
            f"{row['gpu']:8} {row['device_gib']:10.2f} {row['limit_gib']:8.2f} "
            f"{row['host_gib']:9.2f}  {row['offload']:7}  {row['remat']:5}  {verdict}"
        )
    shown = rows[0] if len(rows) == 1 else next((r for r in rows if r["fits"]), rows[-1])
    lines += ["", f"on {shown['gpu']}, by the ledger:"]
    for name, part in shown["components"].items():
        kind = "" if part["exact"] else "  (estimate)"
        where = "  (host)" if part["place"] == "host" else ""
        lines.append(f"  {name:28} {ledgers.text(part['nbytes'])}{where}{kind}")
    if shown["compiled"]:
        lines += ["", "by the compiler, GiB: arguments + outputs - alias + temp + elsewhere"]
        for program in shown["programs"]:
            keys = ("arguments", "outputs", "alias", "temp", "elsewhere", "device")
            figures = "  ".join(f"{program[key] / GIB:7.3f}" for key in keys)
            lines.append(f"  {program['name']:32} {figures}")
        lines += ["", "largest temporaries:"]
        for row in shown["temporaries"]:
            place = row["source"] or row["operation"]
            lines.append(f"  {row['bytes'] / 2**20:8.1f} MiB  {row['shape']:28} {place}")
    if "traffic" in shown:
        lines += ["", *traffic_text.lines(shown)]
    if "largest_batch" in shown:
        lines += [
            "",
            f"largest batch at {config.data.sequence_length} tokens: {shown['largest_batch']}",
            f"longest sequence at batch {config.train.batch_size}: {shown['largest_sequence']}",
        ]
    if not shown["fits"]:
        lines += ["", "to fit:"]
        lines += [
            f"  {change['setting']}  saves {change['saved'] / GIB:.2f} GiB"
            for change in shown["changes"]
        ]
        if shown["missing_after_changes_gib"]:
            lines.append(f"  still missing: {shown['missing_after_changes_gib']:.2f} GiB")
    full = paper_claims.full_fine_tuning(ledgers.parameters(model))
    lines += ["", f"full fine-tuning, for contrast: {ledgers.text(full)}"]
    return "\n".join(lines)


def _by_ledger(model: DecoderConfig, config: Config, limit: int) -> tuple[str, str]:
    """Returns `optimizer.offload` and `model.remat`; the ledger decides a value `auto`."""
    from qlora_jax.plan.choose import POLICIES
    from qlora_jax.plan.ledger import ledger, total

    asked, remat = config.optimizer.offload, config.model.remat
    tried = [
        (offload, policy)
        for policy in (POLICIES if remat == "auto" else (remat,))
        for offload in (("device", "host") if asked == "auto" else (asked,))
    ]
    for offload, policy in tried:
        set_ = configs.changed(config, {"optimizer.offload": offload, "model.remat": policy})
        if total(ledger(model, set_)) <= limit:
            return offload, policy
    return tried[-1]


def _stack(exact: dict[str, int], device: int) -> dict[str, int]:
    names = {
        "adapters": ("adapters", "adapter scales"),
        "gradients": ("gradients",),
        "moments": ("moments",),
    }
    stack = {name: sum(exact.get(part, 0) for part in parts) for name, parts in names.items()}
    small = ("counters", "batch", "moments on the host")
    known = {part for parts in names.values() for part in parts} | set(small)
    stack["frozen weights"] = sum(size for name, size in exact.items() if name not in known)
    stack["temporaries"] = max(device - sum(stack.values()), 0)
    return stack
