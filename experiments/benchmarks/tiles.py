"""Times the tiles of the Mosaic kernels on this machine's GPU.

Question: which tiles should TILES of qlora_jax/kernels/mosaic/tiles.py hold, and up to how many
  rows is a kernel faster than decoding the weight first?
Expected: with few rows, thread blocks share the contraction, because there are fewer tiles than
  multiprocessors; with many rows, tiles are large, because each tile decodes part of the weight.
Cost: not measured in this form. On an H200, 224 products took 66 s, compiled by 20 processes.
Command: python -m experiments.benchmarks.tiles --out docs/results/tiles-nvidia-h200.json
  --rows and --shapes choose products. Every result is compared with that of `xla`.
"""

import functools
import itertools
import json
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.tools import program
from qlora_jax.bench import jax_timing
from qlora_jax.bench.gpu.facts import facts
from qlora_jax.bench.gpu.programs import BenchProgram, compile_all, usable
from qlora_jax.gpu.case import DIRECTIONS, GpuProduct
from qlora_jax.kernels.mosaic import tiles
from qlora_jax.kernels.mosaic.tiles import MosaicTile
from qlora_jax.kernels.select import module_of
from qlora_jax.quant import quantize
from qlora_jax.runtime.atomic import write_text
from qlora_jax.runtime.errors import UserError
from qlora_jax.sweep.table import markdown

SHAPES = ((4096, 11008), (4096, 4096), (8192, 28672))
L2 = 130_000_000
"""Bytes of the codes of all weights that take turns; more than a level 2 cache holds."""

FEW = tuple(
    MosaicTile(16, o, 256, stages, "split", blocks=blocks)
    for o, (stages, blocks) in itertools.product(
        (64, 32), ((3, 264), (3, 0), (3, 528), (2, 264), (5, 264))
    )
)
SOME = tuple(
    MosaicTile(64, o, c, stages, "wgmma", blocks=blocks)
    for o, c, stages in ((128, 64, 3), (128, 64, 5), (128, 128, 2), (64, 64, 4), (64, 128, 3))
    for blocks in (0, 264, 528)
)
MANY = tuple(
    MosaicTile(m, o, c, stages, "wgmma", blocks=blocks)
    for m, o, c, stages in (
        *((256, 64, 64, 2), (256, 64, 64, 3), (128, 128, 64, 2), (128, 128, 64, 3)),
        *((128, 128, 64, 4), (128, 128, 128, 2), (128, 64, 64, 4)),
    )
    for blocks in (0, 264)
)
CANDIDATES: Mapping[int, Sequence[MosaicTile]] = {
    **dict.fromkeys((1, 4, 16), FEW),
    **dict.fromkeys((32, 64, 128), SOME),
    **dict.fromkeys((256, 512, 1024, 2048, 8192), MANY),
}
"""Rows of x to the tiles that are tried."""

FIELDS = ("rows", "k", "n", "direction")


def measured(product: GpuProduct, sets: Sequence[Any]) -> list[dict[str, Any]]:
    """Times decoding first and every candidate tile, in microseconds; compares their results."""
    names: list[tuple[str, MosaicTile | None]] = [("xla", None)]
    names += [("mosaic", tile) for tile in CANDIDATES[product.rows] if fits(tile, product)]
    rows: list[dict[str, Any]] = []
    expected = None
    for (name, tile), outcome in zip(
        names, compile_all(programs(product, names, sets), lambda: True)
    ):
        row = {
            **{field: getattr(product, field) for field in FIELDS},
            "implementation": name,
            "tile": tile and tile._asdict(),
        }
        try:
            program = usable(outcome)
            last = program(np.int32(1), sets)[-1].astype(jnp.float32)
            seconds = statistics.median(jax_timing.program_seconds(program, sets, 3))
        except Exception as e:  # the compilers and the GPU raise different types
            rows.append({**row, "failed": f"{type(e).__name__}: {e}".partition("\n")[0]})
            continue
        expected = last if expected is None else expected
        apart = float(jnp.linalg.norm(last - expected) / jnp.linalg.norm(expected))
        splits = tile and tiles.split_count(tile, product.rows, product.inner, product.outer)
        rows.append({**row, "splits": splits, "us": 1e6 * seconds, "apart": apart})
    return rows


def fits(tile: MosaicTile, product: GpuProduct) -> bool:
    """Returns whether a tile divides a product.

    Backward tiles need 64 outputs, because a byte of codes holds rows that are 32 apart.
    """
    return (
        product.inner % tile.c == 0
        and product.outer % tile.o == 0
        and (product.direction == "forward" or tile.o >= 64)
    )


def programs(
    product: GpuProduct, names: Sequence[tuple[str, MosaicTile | None]], sets: Sequence[Any]
) -> Iterator[BenchProgram]:
    """Yields a timed program for each implementation and tile.

    The caller must trace a program before it takes the next one, because the tile is a global.
    """
    for name, tile in names:
        if tile is not None:
            tiles.TILES = dict.fromkeys(tiles.TILES, (tile,))
        # a new function for each tile, because jax caches the trace of a function
        call = jax.jit(functools.partial(getattr(module_of(name), product.direction)))
        over = functools.partial(jax_timing.over_all, call)
        yield BenchProgram(name, over, (jax.ShapeDtypeStruct((), jnp.int32), sets))


def weights(k: int, n: int) -> list[Any]:
    """Returns quantized weights [k, n], more of them than the level 2 cache holds."""
    make = jax.jit(lambda key: quantize(jax.random.normal(key, (k, n), jnp.float32)))
    count = max(2, min(16, -(-L2 // (k * n // 2))))
    return [make(key) for key in jax.random.split(jax.random.key(0), count)]


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Formats the three fastest programs of each product, and decoding first, as Markdown."""
    shown = []
    by_product = itertools.groupby(rows, lambda row: [row[field] for field in FIELDS])
    for _, group in by_product:
        timed = sorted((row for row in group if "us" in row), key=lambda row: row["us"])
        for i, row in enumerate(timed):
            if i < 3 or row["tile"] is None:
                what = {field: row[field] for field in (*FIELDS, "implementation")}
                shown.append({**what, **(row["tile"] or {}), "us": round(row["us"], 1)})
    sizes = ("m", "o", "c", "stages", "blocks")
    return markdown(shown, (*FIELDS, "implementation", *sizes, "us"))


def main() -> int:
    parser = program.parser(__doc__)
    parser.add_argument("--rows", type=int, nargs="+", choices=CANDIDATES, default=[16, 64, 512])
    parser.add_argument("--shapes", nargs="+", default=[f"{k}x{n}" for k, n in SHAPES])
    parser.add_argument("--out", type=Path, help="JSON of all times")
    options = parser.parse_args()
    if jax.default_backend() != "gpu":
        raise UserError("tiles.py: needs a GPU")
    gpu, rows = jax.devices()[0].device_kind, []
    for shape in options.shapes:
        k, n = map(int, shape.split("x"))
        own = weights(k, n)
        for count, direction in itertools.product(options.rows, DIRECTIONS):
            product = GpuProduct(gpu, "", count, k, n, "bfloat16", direction)
            keys = jax.random.split(jax.random.key(1), len(own))
            xs = [jax.random.normal(key, (count, product.inner), jnp.bfloat16) for key in keys]
            rows += measured(product, list(zip(xs, own)))
            print(f"{shape}, {count} rows, {direction}: done", file=sys.stderr)
    print(table(rows))
    if options.out:
        write_text(options.out, json.dumps({**facts(jax.devices()[0]), "rows": rows}, indent=1))
    return 0


if __name__ == "__main__":
    program.run(main)
