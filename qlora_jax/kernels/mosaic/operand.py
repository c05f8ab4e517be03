"""The decoded operand of the Mosaic GPU kernels: which thread holds which elements and sources.

This module runs when a kernel is compiled, not on a GPU. The instructions' layouts say which thread
holds which element. For each register, `locate` finds the loaded register that holds its codes, and
asserts that it is the same one in every thread. `ThreadIndex` asserts that an address in memory is
one sum over warp and lane for all threads.
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
"""Rows of the left operand in the form "split"."""

Register = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Operand:
    """The decoded operand of one step: a matrix [c, o] of contraction and output features.

    In the forward pass the operand is a tile of W[K, N]; in the backward pass, a tile of the
    transpose of W. `form` says how the four warps divide the operand, and in which order the
    instruction counts its axes:

      * "mma": the right operand of mma; the output features are divided among the warps.
      * "split": the right operand of mma; the contraction is divided among the warps, so that one
        warp reads each element of the other operand once. This form is for few rows. In the forward
        pass a thread takes columns of W that are neighbours in memory, which changes the order of
        the output features.
      * "wgmma": the left operand of wgmma (sm_90), whose rows are features, 64 at a time. Their
        order is chosen so that a thread has both nibbles of its bytes.

    Attributes:
      c: number of contraction indices.
      o: number of output features.
      transposed: True if output features are rows of W (backward).
      block_size: block size of the QTensor.
      form: "mma", "split" or "wgmma".
    """

    c: int
    o: int
    transposed: bool
    block_size: int
    form: str

    @property
    def split(self) -> bool:
        """Whether the contraction is divided among the warps."""
        return self.form == "split"

    @property
    def share(self) -> int:
        """Number of contraction indices of one warp."""
        return self.c // WARPS if self.split else self.c

    @property
    def codes_shape(self) -> tuple[int, int]:
        """Shape of the bytes that hold the operand's codes."""
        k, n = (self.o, self.c) if self.transposed else (self.c, self.o)
        return k // 2, n

    @property
    def code_swizzle(self) -> int:
        """Bytes of a row that are swizzled together in shared memory."""
        return min(128, self.codes_shape[1])

    @property
    def scale_shape(self) -> tuple[int, int]:
        """Shape of the scales in shared memory; an entry is one 16-bit value, or two equal ones.

        An entry is one value in the backward pass, and two equal values in the forward pass.
        """
        rows = (self.o if self.transposed else self.c) // self.block_size
        return max(1, rows), self.codes_shape[1]

    @property
    def m_warps(self) -> int:
        """Number of warps along the rows of the result, for the layouts of `mma`."""
        return WARPS if self.split else 1

    def contraction(self, index: np.ndarray) -> np.ndarray:
        """Maps indices within a warp's share, [warps, ...], to contraction indices of the tile."""
        if not self.split:
            return index
        return index + self.share * np.arange(WARPS).reshape(-1, *(1,) * (index.ndim - 1))

    def output(self, index: np.ndarray) -> np.ndarray:
        """Maps output features in the instruction's order to output features of the tile."""
        if self.split and not self.transposed:
            return index % 8 * (self.o // 8) + index // 8  # so lane g takes neighbouring columns
        if self.form == "wgmma":
            # rows 16w + 8h + g of every 64 are features 32h + 8w + g
            return index // 64 * 64 + index // 8 % 2 * 32 + index % 64 // 16 * 8 + index % 8
        return index

    @property
    def shape(self) -> tuple[int, int]:
        """Shape in the instruction's order of axes; for "split", the shape of one warp's share."""
        return (self.o, self.c) if self.form == "wgmma" else (self.share, self.o)

    def layout(self, dtype: ir.Type | str) -> fa.TiledLayout:
        """Returns the instruction's layout of registers."""
        return WGMMA_LAYOUT if self.form == "wgmma" else MMALayouts(dtype, m_warps=self.m_warps).rhs

    def elements(self, layout: fa.TiledLayout) -> tuple[np.ndarray, np.ndarray]:
        """Returns k and n within the tile of W, each [warps, lanes, *registers, vector]."""
        first, second = divmod(ownership(layout, self.shape), self.shape[1])
        c, o = (second, first) if self.form == "wgmma" else (first, second)
        c, o = self.contraction(c), self.output(o)
        return (o, c) if self.transposed else (c, o)


def code_layout(operand: Operand) -> fa.TiledLayout:
    """Returns the layout of the bytes in which each thread holds the codes of its own registers.

    In the right operand of `mma`, lane 4g + t holds output feature g of every eight (of its warp's
    features, unless the form is "split") and the contraction indices 2t and 2t + 1 of every eight.
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
    """Returns which element each thread holds in each register.

    Returns:
      Index into the flattened array, int[4 warps, 32 lanes, *registers, vector].
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
    """Finds, for each register, the loaded register that holds its element.

    Args:
      wanted: element that each thread needs, int[warps, lanes, *registers].
      held: element that each thread has loaded, int[warps, lanes, *registers, vector].

    Returns:
      Index of a register of `wanted` to the register of `held` and the position in it.

    Raises:
      AssertionError: the loaded register is not the same one in every thread.
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
    """A memory index that depends on the thread: warps[w] + g * (lane // 4) + t * (lane % 4).

    Attributes:
      warps: first index of each warp w.
      g: distance between groups of four lanes.
      t: distance between the lanes of a group.
    """

    warps: tuple[int, ...]
    g: int
    t: int

    @staticmethod
    def of(index: np.ndarray) -> "ThreadIndex":
        """Returns the ThreadIndex of given indices.

        Args:
          index: index of each thread, int[warps, lanes]; 0 for the first thread.

        Raises:
          AssertionError: the indices are not such a sum over warp and lane.
        """
        place = ThreadIndex(tuple(map(int, index[:, 0])), int(index[0, 4]), int(index[0, 1]))
        lane = np.arange(LANES)
        sums = index[:, :1] + place.g * (lane // 4) + place.t * (lane % 4)
        if not (sums == index).all():
            raise AssertionError("an index that is no sum over warp and lane")
        return place


@dataclasses.dataclass(frozen=True)
class RegisterSource:
    """The sources of a register's two elements; they are the same in every thread.

    The index of the 32-bit word of scales in shared memory is scale_place + scale_word.

    Attributes:
      codes: register of codes and byte in it, for each of the two elements.
      high: True if the codes are high nibbles.
      scale_place: part of the index that depends on the thread.
      scale_word: part of the index that is the same for all threads.
    """

    codes: tuple[tuple[Register, int], tuple[Register, int]]
    high: bool
    scale_place: ThreadIndex
    scale_word: int


@functools.cache
def register_sources(operand: Operand, layout: fa.TiledLayout) -> dict[Register, RegisterSource]:
    """Returns the sources of every register of the operand in this layout.

    Raises:
      AssertionError: the sources of a register are not the same in every thread.
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
