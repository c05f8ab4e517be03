"""The decoded operand of the Mosaic GPU kernels: which thread holds which of its elements, and
where a thread finds what it decodes them from.

Nothing here runs on a GPU. Which thread holds what is taken from the instructions' layouts, and
whatever a register needs is looked for among what was loaded: that all threads find it in the same
place is checked for each register (`locate`), as is that the address of what they read is one sum
for all (`ThreadIndex`).
"""

import dataclasses
import functools
import math

import numpy as np
from jax.experimental.mosaic.gpu import fragmented_array as fa
from jax.experimental.mosaic.gpu.mma import MMALayouts
from jaxlib.mlir import ir

from qlora_jax.quant.qtensor import GROUP

WGMMA_LAYOUT = fa.WGMMA_LAYOUT
HALF = GROUP // 2
LANES, WARPS = 32, 4
SPLIT_M = 16
"""Rows of an operand whose contraction the warps share."""

Register = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Operand:
    """The decoded operand of one step, [c, o] of contraction and output features.

    Forward it is a tile of W[K, N] and `transposed` is false; backward of its transpose. How it
    is divided among the four warps, and in which order the instruction counts its axes:

      * "mma": the right operand of mma; the warps share the output features.
      * "split": likewise, but the warps share the contraction, so that each element of the other
        operand is read once, by one warp: for few rows. Forward a thread takes columns of W that
        are neighbours in memory, and output features are counted in another order.
      * "wgmma": the left operand of wgmma (sm_90), which takes features as rows, 64 at a time;
        their order is such that a thread has both nibbles of its bytes.

    Attributes:
      c, o: its shape.
      transposed: whether output features are rows of W.
      block_size: of the QTensor.
      form: one of the three.
    """

    c: int
    o: int
    transposed: bool
    block_size: int
    form: str

    @property
    def split(self) -> bool:
        return self.form == "split"

    @property
    def share(self) -> int:
        """Contraction indices of one warp."""
        return self.c // WARPS if self.split else self.c

    @property
    def codes_shape(self) -> tuple[int, int]:
        """Of the bytes that hold it."""
        k, n = (self.o, self.c) if self.transposed else (self.c, self.o)
        return k // 2, n

    @property
    def code_swizzle(self) -> int:
        """Bytes of a row that are swizzled together in shared memory."""
        return min(128, self.codes_shape[1])

    @property
    def scale_shape(self) -> tuple[int, int]:
        """Of its scales in shared memory: 16-bit values backward, pairs of equal ones forward."""
        rows = (self.o if self.transposed else self.c) // self.block_size
        return max(1, rows), self.codes_shape[1]

    @property
    def m_warps(self) -> int:
        """Warps along the rows of the result, as `mma` counts them."""
        return WARPS if self.split else 1

    def contraction(self, index: np.ndarray) -> np.ndarray:
        """[warps, ...] of indices within a warp's share to those of the tile."""
        if not self.split:
            return index
        return index + self.share * np.arange(WARPS).reshape(-1, *(1,) * (index.ndim - 1))

    def output(self, index: np.ndarray) -> np.ndarray:
        """Output features in `mma`'s order to those of the tile."""
        if self.split and not self.transposed:
            return index % 8 * (self.o // 8) + index // 8  # lane g takes neighbours
        if self.form == "wgmma":
            # rows 16w + 8h + g of every 64 are features 32h + 8w + g
            return index // 64 * 64 + index // 8 % 2 * 32 + index % 64 // 16 * 8 + index % 8
        return index

    @property
    def shape(self) -> tuple[int, int]:
        """In the instruction's order of axes; one warp's share if they share the contraction."""
        return (self.o, self.c) if self.form == "wgmma" else (self.share, self.o)

    def layout(self, dtype: ir.Type | str) -> fa.TiledLayout:
        """The instruction's layout of registers."""
        return WGMMA_LAYOUT if self.form == "wgmma" else MMALayouts(dtype, m_warps=self.m_warps).rhs

    def elements(self, layout: fa.TiledLayout) -> tuple[np.ndarray, np.ndarray]:
        """k and n within the tile of W for [warps, lanes, *registers, vector]."""
        first, second = divmod(ownership(layout, self.shape), self.shape[1])
        c, o = (second, first) if self.form == "wgmma" else (first, second)
        c, o = self.contraction(c), self.output(o)
        return (o, c) if self.transposed else (c, o)


def code_layout(operand: Operand) -> fa.TiledLayout:
    """How a warpgroup holds the bytes so that each thread has those of its own operand registers.

    The right operand of `mma` gives lane 4g + t the output features g of every eight, of its
    warp's if the warps share them, and the contraction indices 2t, 2t + 1 of every eight.
    """
    rows, columns = operand.codes_shape
    match operand.split, operand.transposed:
        case False, False:
            return _layout((8, WARPS * 8), (2, 8), (1,), warp=-4, lanes=(-2, -5))
        case False, True:
            return _layout((WARPS * 8, 8), (8, 2), warp=-4, lanes=(-2, -3))
        case True, False:
            tiles = (rows, columns), (rows // WARPS, columns), (8, columns), (2, columns // 8)
            return _layout(*tiles, warp=-8, lanes=(-3, -4))
        case _:
            tiles = (rows, columns), (rows, columns // WARPS), (8, 8), (2,)
            return _layout(*tiles, warp=-6, lanes=(-3, -2))


def _layout(*tiles: tuple[int, ...], warp: int, lanes: tuple[int, int]) -> fa.TiledLayout:
    layout = fa.TiledLayout(fa.Tiling(tiles), (warp,), lanes, -1, _check_canonical=False)
    return layout.canonicalize()


def ownership(layout: fa.TiledLayout, shape: tuple[int, ...]) -> np.ndarray:
    """Which element each thread holds in each register.

    Returns:
      int[4 warps, 32 lanes, *registers, vector]: index into the flattened array.
    """
    held = np.arange(math.prod(shape)).reshape(shape)
    for tile in layout.tiling.tiles:
        lead, rank = held.shape[: -len(tile)], len(tile)
        split = [n for size, t in zip(held.shape[-rank:], tile) for n in (size // t, t)]
        axes = [len(lead) + i for i in (*range(0, 2 * rank, 2), *range(1, 2 * rank, 2))]
        held = held.reshape(*lead, *split).transpose(*range(len(lead)), *axes)
    partitioned = [
        (d, held.shape[d]) if isinstance(d, int) else (None, d.times)
        for d in (*layout.warp_dims, *layout.lane_dims)
    ]
    dims = [d for d, _ in partitioned if d is not None]
    kept = np.moveaxis(held, (*dims, layout.vector_dim), (*range(len(dims)), -1))
    kept = kept.reshape(*kept.shape[: len(dims)], *layout.registers_shape(shape), -1)
    for axis, (d, size) in enumerate(partitioned):
        if d is None:
            kept = np.repeat(np.expand_dims(kept, axis), size, axis)
    return kept.reshape(WARPS, LANES, *kept.shape[len(partitioned) :])


def locate(wanted: np.ndarray, held: np.ndarray) -> dict[Register, tuple[Register, int]]:
    """Where registers find their elements among registers that were loaded.

    Args:
      wanted: int[warps, lanes, *registers]: each thread's element.
      held: int[warps, lanes, *registers, vector], likewise.

    Returns:
      For every index into the registers of `wanted`, a register of `held` and a place in it.

    Raises:
      AssertionError: threads would have to look in different places.
    """
    where = {int(held[(0, 0, *i)]): i for i in np.ndindex(held.shape[2:])}
    found = {}
    for register in np.ndindex(wanted.shape[2:]):
        elements = wanted[(slice(None), slice(None), *register)]
        spot = where[int(elements[0, 0])]
        if not (held[(slice(None), slice(None), *spot)] == elements).all():
            raise AssertionError(f"register {register} is in another place in each thread")
        found[register] = (spot[:-1], spot[-1])
    return found


@dataclasses.dataclass(frozen=True)
class ThreadIndex:
    """A memory index that differs between threads: warps[w] + g * (lane // 4) + t * (lane % 4)."""

    warps: tuple[int, ...]
    g: int
    t: int

    @staticmethod
    def of(index: np.ndarray) -> "ThreadIndex":
        """From int[warps, lanes], which is such a sum with 0 for the first thread.

        Raises:
          AssertionError: it is not.
        """
        place = ThreadIndex(tuple(map(int, index[:, 0])), int(index[0, 4]), int(index[0, 1]))
        lane = np.arange(LANES)
        sums = index[:, :1] + place.g * (lane // 4) + place.t * (lane % 4)
        if not (sums == index).all():
            raise AssertionError("an index that is no sum over warp and lane")
        return place


@dataclasses.dataclass(frozen=True)
class RegisterSource:
    """Where a register's two elements come from, the same in every thread.

    Attributes:
      codes: of each element, the register of codes and the byte in it.
      high: whether they are high nibbles.
      scale_place, scale_word: 32-bit word of scales in shared memory, the thread's part and the
        rest.
    """

    codes: tuple[tuple[Register, int], tuple[Register, int]]
    high: bool
    scale_place: ThreadIndex
    scale_word: int


@functools.cache
def register_sources(operand: Operand, layout: fa.TiledLayout) -> dict[Register, RegisterSource]:
    """Returns where every register of the operand in this layout comes from.

    Raises:
      AssertionError: threads would have to look in different places.
    """
    k, n = operand.elements(layout)
    rows, columns = operand.codes_shape
    codes = locate(
        (k // GROUP * HALF + k % HALF) * columns + n,
        ownership(code_layout(operand), (rows, columns)),
    )
    high = k % GROUP >= HALF
    scale = (k // operand.block_size if operand.scale_shape[0] > 1 else 0) * columns + n
    found = {}
    for register in np.ndindex(k.shape[2:-1]):
        every = (slice(None), slice(None), *register)
        if not (high[every] == high[(0, 0, *register, 0)]).all():
            raise AssertionError(f"register {register} mixes low and high nibbles")
        words = scale[every]
        if not (words[..., 1] == words[..., 0] + operand.transposed).all():
            raise AssertionError(f"register {register} has no one word of scales")
        words = words[..., 0] // 2 if operand.transposed else words[..., 0]
        found[register] = RegisterSource(
            codes=(codes[(*register, 0)], codes[(*register, 1)]),
            high=bool(high[(0, 0, *register, 0)]),
            scale_place=ThreadIndex.of(words - words[0, 0]),
            scale_word=int(words[0, 0]),
        )
    return found
