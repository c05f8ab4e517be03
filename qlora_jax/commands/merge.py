"""The command `qlora-jax merge`."""

import argparse
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

from qlora_jax.commands import time_notice
from qlora_jax.commands.common import count, say, show, start_jax
from qlora_jax.commands.plan import shapes
from qlora_jax.runtime.errors import UserError
from qlora_jax.train import rundir

TEXT = "Merge a run's adapter into its model; writes a folder for transformers."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `merge` to its parser."""
    parser.add_argument("path", metavar="RUN_DIR")
    parser.add_argument("out", metavar="OUT", help="a new or an empty folder")
    parser.add_argument(
        "--base",
        choices=("dequantized", "original"),
        default="dequantized",
        help="weights to which the adapter is added: the dequantized 4-bit weights of the training "
        "(default), or the weights of the original checkpoint",
    )
    parser.add_argument(
        "--to",
        choices=("bfloat16", "float16", "float32", "nf4"),
        default="bfloat16",
        help="dtype of the files; default bfloat16. nf4 quantizes again, and writes a report",
    )
    parser.add_argument(
        "--report",
        action="store_true",
        help="compare the ways to merge; writes OUT/merge_report.md",
    )
    parser.add_argument(
        "--rows",
        type=count,
        default=64,
        metavar="N",
        help="held-out rows for the report; default 64",
    )


def run(options: argparse.Namespace, settings: Sequence[str], command: str) -> None:
    """Merges the adapter, writes the model, and prints a summary."""
    config = rundir.open_run(options.path)
    start_jax()
    from rich.console import Console
    from rich.table import Table

    from qlora_jax.evaluate import merging
    from qlora_jax.formats.folder import check_new
    from qlora_jax.formats.merged import MergedCheckpoint
    from qlora_jax.formats.write import write_model
    from qlora_jax.runtime.display import counted
    from qlora_jax.train.quantization import held_quantization
    from qlora_jax.train.restore import check_base, restore

    out, quantized = Path(options.out), options.to == "nf4"
    check_new(out)
    original = options.base == "original"
    if original and config.method == "full":
        raise UserError("--base original: method full trains every weight; leave it out")
    model = shapes(config)
    time_notice.tell_expected_time(
        "merge",
        *(["merge report"] if quantized or options.report else []),
        parameters=time_notice.parameters(model),
        tokens=options.rows * config.data.sequence_length,
        ways=len(merging.ROUTES),
        linears=time_notice.matrices(model),
    )
    restored = restore(options.path, base=False, warn=say)
    checkpoint = restored.checkpoint
    if original and checkpoint.quantization is not None:
        raise UserError("--base original: the checkpoint has 4-bit weights only; leave it out")
    check_base(options.path, restored)
    dtype = config.model.compute_dtype if quantized else options.to
    held = held_quantization(config, checkpoint) or config.quant
    quant = dataclasses.replace(
        held, codebook="nf4", block_size=max(64, held.block_size), nested_block=256
    )
    source = MergedCheckpoint(restored.model, checkpoint, original)
    report = None
    if quantized or options.report:
        report = merging.compare(
            options.path, restored, checkpoint, quant, dtype, options.rows, counted
        )

    def add(folder: Path) -> None:
        if report:
            merging.write_report(report, folder)

    with counted(f"merging {options.path}", len(source.names())) as advance:
        size = write_model(source, out, quant if quantized else None, dtype, advance, add=add)
    if options.json:
        shown = dataclasses.asdict(report) if report else None
        print(json.dumps({"out": options.out, "bytes": size, "report": shown}))
        return
    for title, columns, rows in merging.tables(report) if report else ():
        table = Table(*columns, title=title)
        for row in rows:
            table.add_row(*row)
        Console().print(table)
    show(f"{options.out}: {config.method} of {config.model.path}, {options.to}, {size:,} bytes")
