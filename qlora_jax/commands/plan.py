"""`qlora-jax plan`: the ledger beside the compiler's figures, for one GPU or for all."""

import argparse
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qlora_jax import config as configs
from qlora_jax.commands import ahead
from qlora_jax.commands.common import CHANGED, config_of, say
from qlora_jax.config import Config, MeshConfig
from qlora_jax.models.config import DecoderConfig
from qlora_jax.runtime import gpu_memory
from qlora_jax.runtime.errors import UserError

GIB = 2**30
ALL = "all"
SEARCH = 12
"""Compilations of a search for the largest batch and sequence, usually."""

BEYOND = 2**20
"""Tokens of the longest sequence that is looked for with --beyond-positions."""

NOT_RUN = "Compiled for these GPUs, not run on one."
ESTIMATE = (
    "Estimate: the ledger alone. For the compiler's own figures install the compile-only GPU "
    "packages: make install EXTRA=gpu-check"
)


TEXT = "What a run needs on a GPU, by that GPU's compiler, before it is rented."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `plan`."""
    parser.usage = (
        "qlora-jax plan (CONFIG | --model NAME) [--gpu NAMES] [--rank N] [--seq N] [--mesh AXES] "
        "[--no-search] [--beyond-positions] [--plot FILE] [--json] [--debug] "
        "[--section.key=value ...]"
    )
    parser.epilog = CHANGED
    parser.set_defaults(settings=True)
    parser.add_argument("config", nargs="?", metavar="CONFIG", help="YAML file, or a run directory")
    parser.add_argument(
        "--model", metavar="NAME", help="published shapes, without weights: llama-7b, qwen2.5-7b, …"
    )
    parser.add_argument("--rank", type=int, metavar="N", help="lora.rank")
    parser.add_argument("--seq", type=int, metavar="N", help="data.sequence_length")
    parser.add_argument(
        "--mesh", metavar="AXES", help="none, fsdp=8 or data=2,fsdp=4: so many GPUs of one kind"
    )
    parser.add_argument(
        "--gpu", default=ALL, metavar="NAMES", help="t4, rtx4090, …, or *.txtpb, with commas"
    )
    parser.add_argument(
        "--no-search",
        action="store_true",
        help="one GPU: not the largest batch and sequence that fit",
    )
    parser.add_argument(
        "--beyond-positions",
        action="store_true",
        help=f"look for sequences of up to {BEYOND:,} tokens, also where the model has less",
    )
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw a PNG")


def short_forms(options: argparse.Namespace) -> dict[str, str]:
    """The overrides that `--rank`, `--seq` and `--mesh` stand for.

    Raises:
      UserError: a mesh that is not one.
    """
    short = {"lora.rank": options.rank, "data.sequence_length": options.seq}
    given = {key: str(value) for key, value in short.items() if value is not None}
    return given if options.mesh is None else given | mesh_settings(options.mesh)


def mesh_settings(text: str) -> dict[str, str]:
    """The overrides that `--mesh none` or `--mesh data=2,fsdp=4` stands for.

    Raises:
      UserError: neither.
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
    """A QLoRA run of published shapes, one row a step on each device.

    Raises:
      UserError: a setting that is not allowed.
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
    """Plans, prints, draws.

    Raises:
      UserError: unknown GPU or model, settings that do not go together, or a run that fits on none
        of the GPUs, after all is printed.
      RunFailed: a compiler ended its process.
    """
    if (options.config is None) == (options.model is None):
        raise UserError("give a CONFIG, or --model NAME for published shapes; one of them")
    given = configs.parse_overrides(settings) | short_forms(options)
    if options.model is not None:
        config = of_model(options.model, given)
    else:
        config = configs.changed(config_of(options.config, []), given)
    from qlora_jax.gpu.compile import has_plugin
    from qlora_jax.gpu.described import GPUS, read_gpu
    from qlora_jax.models.shapes import find
    from qlora_jax.plan.plan import SEARCHES, planned
    from qlora_jax.train.mesh import check_rows
    from qlora_jax.train.start import resolved

    config = resolved(config)
    check_rows(config)
    model = find(config.model.path) if options.model else shapes(config)
    names = list(GPUS) if options.gpu == ALL else options.gpu.split(",")
    for name in names:
        read_gpu(name)
    names.sort(key=lambda name: read_gpu(name).memory)
    search = SEARCHES if len(names) == 1 and not options.no_search else ()
    if has_plugin():
        ahead.tell("plan", compilations=SEARCH if search else len(names))
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
            f"{title(config)}: does not fit; the roomiest GPU asked for, {rows[-1]['gpu']}, lacks "
            f"{over:.2f} GiB{' a device' if config.mesh.devices > 1 else ''}; give a roomier "
            "--gpu, or smaller batches, rows or ranks"
        )


def shapes(config: Config) -> DecoderConfig:
    """The model's shapes: those to pretrain, published ones by name, else from its files.

    Raises:
      UserError: no shapes by that name, and no files either.
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
    """With float16 where a GPU has no bfloat16 units (before compute capability 8.0)."""
    from qlora_jax.kernels.target import half_dtype

    if half_dtype(capability) == "bfloat16":
        return config
    half = ("model.compute_dtype", "model.storage_dtype")
    return configs.changed(config, dict.fromkeys(half, "float16"))


def describe(
    model: DecoderConfig, config: Config, gpu: str, answer: dict[str, Any] | None
) -> dict[str, Any]:
    """One GPU's plan as plain values.

    Args:
      model: shapes.
      config: of the run.
      gpu: name.
      answer: of `plan.planned`; None leaves the ledger alone.
    """
    from qlora_jax.gpu.described import read_gpu
    from qlora_jax.plan import exchanged
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
        row |= exchanged.described(plan)
    if answer:
        row |= {key: value for key, value in answer.items() if key != "plan"}
    if not row["fits"]:
        made, missing = changes(model, config, device - limit)
        row["changes"] = [change._asdict() for change in made]
        row["missing_after_changes_gib"] = max(missing, 0) / GIB
    return row


def title(config: Config) -> str:
    """The run in a few words."""
    parts = [f"{config.model.path}, {config.method}"]
    if config.method != "full":
        parts.append(f"rank {config.lora.rank}")
    parts.append(f"{config.train.batch_size} x {config.data.sequence_length} tokens")
    if config.mesh.devices > 1:
        parts.append(f"mesh data {config.mesh.data} x fsdp {config.mesh.fsdp}")
    return ", ".join(parts)


def text(model: DecoderConfig, config: Config, rows: Sequence[dict[str, Any]]) -> str:
    """What is printed."""
    from qlora_jax.plan import exchanged, paper_claims
    from qlora_jax.plan import ledger as ledgers

    lines = [title(config), NOT_RUN if rows[0]["compiled"] else ESTIMATE, ""]
    if config.mesh.devices > 1:
        lines += [f"Each of {config.mesh.devices} GPUs holds what is listed.", ""]
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
        lines += ["", *exchanged.lines(shown)]
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
    """Returns `optimizer.offload` and `model.remat`; auto is decided by the ledger."""
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
