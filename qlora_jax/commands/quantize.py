"""The command `qlora-jax quantize`."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from qlora_jax.commands import time_notice
from qlora_jax.commands.common import count, say, show, start_jax
from qlora_jax.config import ModelConfig, QuantConfig

TEXT = "Quantize a model to the 4-bit format of bitsandbytes; writes a folder for transformers."
DTYPES = ("bfloat16", "float16", "float32")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `quantize` to its parser."""
    parser.add_argument(
        "model", metavar="MODEL", help="a folder, .gguf file, built-in model or hub id"
    )
    parser.add_argument("out", metavar="OUT", help="a new or an empty folder")
    default = QuantConfig()
    parser.add_argument("--codebook", default=default.codebook, help="nf4 (default) or fp4_bnb")
    parser.add_argument(
        "--block-size", type=count, default=default.block_size, metavar="N", help="64 to 4096"
    )
    parser.add_argument(
        "--double-quant",
        action=argparse.BooleanOptionalAction,
        default=default.double_quant,
        help="store the absmax values in 8 bits (default)",
    )
    parser.add_argument(
        "--compute-dtype",
        choices=DTYPES,
        default=DTYPES[0],
        help="compute dtype, and dtype of all tensors that are not quantized; default bfloat16",
    )


def run(options: argparse.Namespace, settings: Sequence[str], command: str) -> None:
    """Quantizes the model, writes it, and prints a summary."""
    quant = QuantConfig(
        codebook=options.codebook,
        block_size=options.block_size,
        double_quant=options.double_quant,
    )
    start_jax()
    from qlora_jax.formats.folder import check_new
    from qlora_jax.formats.source import open_checkpoint
    from qlora_jax.formats.write import write_model
    from qlora_jax.runtime.display import counted
    from qlora_jax.train.quantization import describe_quantization

    out = Path(options.out)
    check_new(out)
    checkpoint = open_checkpoint(ModelConfig(path=options.model), say)
    time_notice.tell_expected_time("quantize", parameters=time_notice.parameters(checkpoint.config))
    with counted(f"quantizing {options.model}", len(checkpoint.names())) as advance:
        size = write_model(checkpoint, out, quant, options.compute_dtype, advance)
    if options.json:
        print(json.dumps({"out": options.out, "bytes": size}))
        return
    what = describe_quantization(quant)
    show(f"{options.out}: {what}; other tensors {options.compute_dtype}; {size / 2**20:.1f} MiB")
