"""What a training step holds in memory, part by part, in closed form.

Nothing is traced and no array is made: shapes and settings are enough. What the step takes and
gives (weights, adapters, gradients, moments, batch) is exact to the byte. What XLA allocates in
between is an estimate, of `activations`.
"""

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import jax.numpy as jnp

from qlora_jax.config import Config, QuantConfig
from qlora_jax.data.packing import DTYPES
from qlora_jax.lora.spec import plan
from qlora_jax.models.config import DecoderConfig
from qlora_jax.models.parts import expected_shapes, linears
from qlora_jax.plan.activations import estimates
from qlora_jax.quant.dynamic8 import BLOCK
from qlora_jax.quant.qtensor import GROUP
from qlora_jax.train.moments import MIN_8BIT_SIZE

OPTIMIZER_COUNTERS = 6
"""int32 step counts of a unit's optimizer: Adam's and the schedule's, for each of three groups."""


class Leaf(NamedTuple):
    """One array of the trained or the frozen tree; `layers` of them are stacked along its first
    axis, or none are."""

    part: str
    shape: tuple[int, ...]
    dtype: str
    trained: bool = False
    layers: int | None = None

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * jnp.dtype(self.dtype).itemsize


class Part(NamedTuple):
    """One line of the ledger.

    Attributes:
      nbytes: what it holds.
      place: "device" or "host".
      exact: False for an estimate.
    """

    nbytes: int
    place: str = "device"
    exact: bool = True


def ledger(model: DecoderConfig, run: Config) -> dict[str, Part]:
    """The parts of a step's memory by name, exact ones first, none of zero bytes.

    `optimizer.offload: auto` is counted as device: who knows the device decides. A layer's moments
    on their way from the host are not counted; they come when the activations are gone.

    Args:
      model: shapes of the pretrained decoder.
      run: method, dtypes, adapters, optimizer, rows and their length are read.

    Raises:
      UserError: adapters that match no linear.
    """
    tree = leaves(model, run)
    trained = [leaf for leaf in tree if leaf.trained]
    moments = sum(2 * moment_bytes(leaf, run) for leaf in trained)
    host = run.optimizer.offload == "host"
    exact = Counter[str]()
    for leaf in tree:
        exact[leaf.part] += leaf.nbytes
    exact["gradients"] = sum(gradient_bytes(leaf, run) for leaf in trained)
    exact["moments"] = 0 if host else moments
    exact["counters"] = _counters(model, run)
    exact["batch"] = math.prod(_batch(run)) * sum(jnp.dtype(d).itemsize for d in DTYPES.values())
    parts = {name: Part(size) for name, size in exact.items()}
    parts["moments on the host"] = Part(moments if host else 0, "host")
    guessed = estimates(model, run, _ranks(model, run))
    if run.train.gradient_accumulation > 1:
        guessed["gradients of a micro-batch"] = sum(leaf.nbytes for leaf in trained)
    away = run.model.remat == "host"
    parts |= {
        name: Part(size, "host" if away and name == "activations" else "device", exact=False)
        for name, size in guessed.items()
    }
    return {name: part for name, part in parts.items() if part.nbytes}


def total(parts: Mapping[str, Part], place: str = "device", exact: bool | None = None) -> int:
    """Bytes in one place, of all parts or of those that are exact (or are not).

    The estimates are not all alive at the same moment. For steps of 1.7B to 65B models with
    float32 adapters the device's sum was 0.98 to 1.11 times what XLA allocates when it compiles
    them for an A100 or a T4.
    """
    return sum(
        part.nbytes
        for part in parts.values()
        if part.place == place and exact in (None, part.exact)
    )


def text(nbytes: float) -> str:
    """Bytes for people: in GB (10^9), and in GiB (2^30)."""
    return f"{nbytes / 1e9:,.3f} GB ({nbytes / 2**30:,.3f} GiB)"


def parameters(model: DecoderConfig) -> int:
    """Pretrained parameters; a tied head is counted once."""
    return sum(math.prod(shape) for shape in expected_shapes(model).values())


def leaves(model: DecoderConfig, run: Config) -> list[Leaf]:
    """Every array of the trained and the frozen tree, each under the part it belongs to.

    Raises:
      UserError: adapters that match no linear.
    """
    full = run.method == "full"
    dtype = run.lora.dtype if full else run.model.storage_dtype
    layers, found = f"{model.names.layers}.", []
    for name, shape in expected_shapes(model).items():
        part = "norms and biases" if len(shape) == 1 else _outside(model).get(name, "linears")
        if not name.startswith(layers):
            found.append(Leaf(part, shape, dtype, full))
        elif name.startswith(f"{layers}0."):
            stack = (model.num_layers, *shape)
            if run.method == "qlora" and len(shape) == 2:
                found += quantized(model.num_layers, shape[1], shape[0], run.quant)
            else:
                found.append(Leaf(part, stack, dtype, full, model.num_layers))
    return [*found, *_adapters(model, run)]


def moment_bytes(leaf: Leaf, run: Config) -> int:
    """One of the two moments of a trained leaf, which are stored layer by layer."""
    units = leaf.layers or 1
    size, dtype = math.prod(leaf.shape) // units, run.optimizer.moments
    if dtype != "int8":
        return units * size * jnp.dtype(dtype).itemsize
    return units * (4 * size if size < MIN_8BIT_SIZE else size + 4 * -(-size // BLOCK))


def gradient_bytes(leaf: Leaf, run: Config) -> int:
    """A trained leaf's gradient: bfloat16 where the leaf is and nothing is accumulated."""
    narrow = leaf.dtype == "bfloat16" and run.train.gradient_accumulation == 1
    return math.prod(leaf.shape) * (2 if narrow else 4)


def _outside(model: DecoderConfig) -> dict[str, str]:
    """The matrices that are no layer's, and the part each belongs to."""
    names = model.names
    parts = {names.embed: "embeddings", names.positions: "embeddings", names.head: "head"}
    return {f"{path}.weight": part for path, part in parts.items()}


def quantized(layers: int, k: int, n: int, quant: QuantConfig) -> Iterator[Leaf]:
    """A stack of `QTensor`s [K, N], leaf by leaf."""
    blocks = -(-k // quant.block_size)
    yield Leaf("codes", (layers, -(-k // GROUP) * GROUP // 2, n), "uint8")
    yield Leaf("scales", (layers, blocks, n), "uint8" if quant.double_quant else "float32")
    if quant.double_quant:
        yield Leaf(
            "nested scales and codebooks", (layers, -(-blocks * n // quant.nested_block)), "float32"
        )
        yield Leaf("nested scales and codebooks", (layers,), "float32")
    yield Leaf("nested scales and codebooks", (layers, 16), "float32")


def _ranks(model: DecoderConfig, run: Config) -> dict[str, int]:
    """Rank of each of a layer's adapters, by its linear: a stack is as wide as its widest layer."""
    if run.method == "full":
        return {}
    layers, ranks = f"{model.names.layers}.", dict[str, int]()
    paths = {
        f"{layers}{i}.{path}": (linear.inputs, linear.outputs)
        for i in range(model.num_layers)
        for path, linear in linears(model).items()
    }
    for path, spec in plan(run.lora, paths).items():
        name = path.removeprefix(layers).split(".", 1)[1]
        ranks[name] = max(ranks.get(name, 0), spec.rank)
    return ranks


def _adapters(model: DecoderConfig, run: Config) -> Iterator[Leaf]:
    for name, rank in _ranks(model, run).items():
        k, n, _ = linears(model)[name]
        layers, dtype = model.num_layers, run.lora.dtype
        yield Leaf("adapters", (layers, k, rank), dtype, not run.lora.freeze_a, layers)
        yield Leaf("adapters", (layers, rank, n), dtype, True, layers)
        yield Leaf("adapter scales", (layers,), "float32")
        if run.lora.variant == "dora":
            yield Leaf("adapters", (layers, n), "float32", True, layers)
            yield Leaf("adapter scales", (layers, n), "float32")


def _counters(model: DecoderConfig, run: Config) -> int:
    """Counts of steps, the loss scale, and with dropout the key."""
    full = run.method == "full"
    units = model.num_layers + full
    key = 8 if run.lora.dropout and not full else 0
    return 4 * (OPTIMIZER_COUNTERS * units + 3) + key


def _batch(run: Config) -> tuple[int, int, int]:
    train = run.train
    return train.gradient_accumulation, train.batch_size, run.data.sequence_length
