"""Adds up what a step's devices send each other, and models how long that and the rest take."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp

from qlora_jax.config import Config
from qlora_jax.gpu import roofline
from qlora_jax.gpu.collectives import Collective, collectives, gathers
from qlora_jax.gpu.hlo import FLOATS
from qlora_jax.gpu.links import link_of
from qlora_jax.gpu.roofline import RATES
from qlora_jax.models.config import DecoderConfig
from qlora_jax.models.decoder import WHOLE_LAYERS
from qlora_jax.models.parts import linears
from qlora_jax.models.sharding import LAYERS
from qlora_jax.models.trees import flatten
from qlora_jax.plan.compiled_memory import AbstractStep

WEIGHTS, ADAPTERS, GRADIENTS, REST = PARTS = ("weights", "adapters", "gradients", "rest")

CODES = jnp.uint8, "u8"
"""Dtype of codes and of their scales, as jax and as HLO write it."""

ADAPTER = ".adapter."
"""In the path of an adapter's array."""

BFLOAT16 = 2
PASSES = 2
"""In which the weights of a layer are needed: forward and backward."""

CAUSAL = 0.5
"""Share of all pairs of positions that attend."""


class Traffic(NamedTuple):
    """What a device receives in a gradient.

    Attributes:
      received: bytes by part: the layers' weights (codes and scales, where they are in 4 bits),
        their adapters, gradients, and the rest.
      in_bfloat16: bytes if the layers' weights were gathered in bfloat16, once in each pass.
      collectives: what it is made of, the most bytes first.
      gathers: all-gathers in the program, each counted once however often it is done.
      overlapped: those of them that have a product or a kernel between start and end.
      hidden: share of all gathered bytes that are in these.
    """

    received: dict[str, int]
    in_bfloat16: int
    collectives: list[Collective]
    gathers: int
    overlapped: int
    hidden: float

    @property
    def total(self) -> int:
        return sum(self.received.values())

    @property
    def ratio(self) -> float:
        """Bytes of weights, as a share of those in bfloat16."""
        return self.received[WEIGHTS] / self.in_bfloat16 if self.in_bfloat16 else 0.0


class Times(NamedTuple):
    """Modelled seconds of a gradient on each device, at the rates of data sheets.

    Attributes:
      link: what joins the devices.
      bandwidth: its bytes per second, each way.
      compute: seconds of all products.
      sending: seconds of the traffic.
    """

    link: str
    bandwidth: float
    compute: float
    sending: float

    @property
    def bound(self) -> str:
        return "the links" if self.sending > self.compute else "compute"


def traffic(text: str, step: AbstractStep, decoder: DecoderConfig, fsdp: int) -> Traffic:
    """Returns what a device receives in a compiled gradient.

    Args:
      text: the compiled program's.
      step: in shapes.
      decoder: shapes of the model.
      fsdp: devices over which the weights are split.
    """
    shapes = _layer_shapes(step)
    found = collectives(text)
    received = dict.fromkeys(PARTS, 0)
    for one in found:
        received[_part(one, shapes)] += one.received * one.times
    micro_batches = step.batch["mask"].shape[0]
    elements = decoder.num_layers * sum(k * n for k, n in _matrices(decoder))
    whole = BFLOAT16 * PASSES * micro_batches * elements
    started = gathers(text)
    every = sum(gather.received * gather.times for gather in started)
    hidden = sum(gather.received * gather.times for gather in started if gather.products)
    return Traffic(
        received,
        whole * (fsdp - 1) // fsdp,
        found,
        len(started),
        sum(bool(gather.products) for gather in started),
        hidden / every if every else 0.0,
    )


def as_traffic(fields: Sequence[Any]) -> Traffic:
    """Returns a `Traffic` that was written as JSON."""
    made = Traffic(*fields)
    found = [Collective(*one)._replace(shape=tuple(one[2])) for one in made.collectives]
    return made._replace(collectives=found)


def times(config: Config, decoder: DecoderConfig, gpu: str, received: int) -> Times | None:
    """Models a gradient's seconds on a mesh: nothing is measured, and nothing waits for a latency.

    Products and decoding take the time of `roofline`, all bytes of the traffic go one way after
    another at the link's rate.

    Args:
      config: of the run; remat and offload are decided.
      decoder: shapes of the model.
      gpu: a name in `GPUS`.
      received: bytes that a device receives.

    Returns:
      The times; None where the rates of the GPU or of its links are not known.
    """
    link = link_of(gpu, config.mesh.devices)
    if link is None or gpu not in RATES:
        return None
    each = config.train.gradient_accumulation * _micro_batch(config, decoder, gpu)
    return Times(link.name, link.bandwidth, each, received / link.bandwidth)


def _micro_batch(config: Config, decoder: DecoderConfig, gpu: str) -> float:
    """Models the seconds of a micro-batch's products on one device."""
    sheet, length = roofline.data_sheet(gpu), config.data.sequence_length
    rows = config.train.batch_size // config.mesh.devices * length
    again = config.model.remat in WHOLE_LAYERS
    full = config.method == "full"
    passes = 2 + again + full  # a trained weight has a gradient of its own

    def product(k: int, n: int) -> float:
        moved = BFLOAT16 * (rows * (k + n) + k * n)
        return roofline.product_time(gpu, rows, k, n, moved).seconds

    def decoding(k: int, n: int) -> float:
        return k * n * (BFLOAT16 + 0.5) / sheet.bandwidth if config.method == "qlora" else 0.0

    matrices = _matrices(decoder)
    layer = sum(passes * (product(*shape) + decoding(*shape)) for shape in matrices)
    flop = 0.0
    if not full:  # both factors: forward, again, and the gradients of input and factor
        flop += sum(2 * rows * config.lora.rank * (k + n) for k, n in matrices) * (3 + again)
    attention = 4 * rows * length * CAUSAL * decoder.num_heads * decoder.head_dim
    flop += attention * (1 + again + 2.5)  # backward has five products to forward's two
    # the logits and the mean of the head's vectors; a trained head takes the logits once more
    head = (2 + 2 * full) * product(decoder.hidden_size, decoder.vocab_size)
    return decoder.num_layers * (layer + flop / sheet.tensor) + head


def _matrices(decoder: DecoderConfig) -> list[tuple[int, int]]:
    return [(linear.inputs, linear.outputs) for linear in linears(decoder).values()]


def _layer_shapes(step: AbstractStep) -> dict[tuple[int, ...], str]:
    """Maps the sizes of the arrays of a layer, sorted, to the part that they are of.

    Codes are left out: nothing else that moves is of bytes.
    """
    found: dict[tuple[int, ...], str] = {}
    for tree in (step.frozen, step.state.trained):
        for path, leaf in flatten(tree).items():
            if path.startswith(LAYERS) and leaf.dtype != CODES[0]:
                part = ADAPTERS if ADAPTER in path else WEIGHTS
                found.setdefault(_sizes(leaf.shape[1:]), part)
    return found


def _sizes(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(sorted(size for size in shape if size > 1))


def _part(one: Collective, shapes: Mapping[tuple[int, ...], str]) -> str:
    if one.kind == "all-gather" and one.dtype in FLOATS:
        return shapes.get(_sizes(one.shape), REST)
    if one.kind == "all-gather":
        return WEIGHTS if one.dtype == CODES[1] else REST
    if one.kind == "reduce-scatter" or (one.kind == "all-reduce" and len(one.shape) > 1):
        return GRADIENTS
    return REST
