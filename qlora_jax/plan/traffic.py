"""Adds up the bytes between the devices of a step, and models the times of traffic and compute."""

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
from qlora_jax.models.sharding import LAYERS
from qlora_jax.models.trees import flatten
from qlora_jax.models.weight_shapes import linears
from qlora_jax.plan.compiled_memory import AbstractStep

WEIGHTS, ADAPTERS, GRADIENTS, REST = PARTS = ("weights", "adapters", "gradients", "rest")

CODES = jnp.uint8, "u8"
"""Dtype of codes and of double-quantized scales: jax's dtype, and its name in HLO."""

ADAPTER = ".adapter."
"""Part of the path of each array of an adapter."""

BFLOAT16 = 2
PASSES = 2
"""Number of passes that need the weights of a layer: forward and backward."""

CAUSAL = 0.5
"""Share of the pairs of positions that causal attention computes."""


class Traffic(NamedTuple):
    """Bytes that a device receives from other devices in a gradient.

    Attributes:
      received: part to bytes: the layers' weights (codes and scales, if they are in 4 bits), their
        adapters, gradients, and the rest.
      in_bfloat16: bytes if the layers' weights were gathered in bfloat16, once in each pass.
      collectives: collectives of the program, those with the most bytes first.
      gathers: number of all-gathers in the program; one in a loop counts once.
      overlapped: number of all-gathers that have a product or a kernel between start and end.
      hidden: share of all gathered bytes that belong to overlapped all-gathers.
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
        """Returns the received bytes of weights, divided by those in bfloat16."""
        return self.received[WEIGHTS] / self.in_bfloat16 if self.in_bfloat16 else 0.0


class Times(NamedTuple):
    """Modelled seconds of a gradient on each device, at the rates of data sheets.

    Attributes:
      link: name of the link between the devices.
      bandwidth: bytes per second of the link, in each direction.
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
    """Returns the bytes that a device receives in a compiled gradient.

    Args:
      text: HLO text of the compiled program.
      step: functions and shapes of the step.
      decoder: shapes of the model.
      fsdp: number of devices over which the weights are split.
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
    """Makes a `Traffic` of its fields, as read from JSON."""
    made = Traffic(*fields)
    found = [Collective(*one)._replace(shape=tuple(one[2])) for one in made.collectives]
    return made._replace(collectives=found)


def times(config: Config, decoder: DecoderConfig, gpu: str, received: int) -> Times | None:
    """Models the seconds of a gradient on a mesh; nothing is measured, and latency is not counted.

    Products and decoding take the time of `roofline`. All received bytes pass one after another at
    the link's rate in one direction.

    Args:
      config: config of the run; remat and offload are not `auto`.
      decoder: shapes of the model.
      gpu: name in `described.GPUS`.
      received: bytes that a device receives in a gradient.

    Returns:
      The times; None if the rates of the GPU or of its links are not known.
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
    passes = 2 + again + full  # the gradient of a trained weight is one more product

    def product(k: int, n: int) -> float:
        moved = BFLOAT16 * (rows * (k + n) + k * n)
        return roofline.product_time(gpu, rows, k, n, moved).seconds

    def decoding(k: int, n: int) -> float:
        return k * n * (BFLOAT16 + 0.5) / sheet.bandwidth if config.method == "qlora" else 0.0

    matrices = _matrices(decoder)
    layer = sum(passes * (product(*shape) + decoding(*shape)) for shape in matrices)
    flop = 0.0
    if not full:  # A and B: forward, recomputed forward, gradients of the input and of A or B
        flop += sum(2 * rows * config.lora.rank * (k + n) for k, n in matrices) * (3 + again)
    attention = 4 * rows * length * CAUSAL * decoder.num_heads * decoder.head_dim
    flop += attention * (1 + again + 2.5)  # backward has 5 products, forward 2: 5 / 2 = 2.5
    # The logits and the mean of the head's vectors; a trained head computes the logits once more.
    head = (2 + 2 * full) * product(decoder.hidden_size, decoder.vocab_size)
    return decoder.num_layers * (layer + flop / sheet.tensor) + head


def _matrices(decoder: DecoderConfig) -> list[tuple[int, int]]:
    return [(linear.inputs, linear.outputs) for linear in linears(decoder).values()]


def _layer_shapes(step: AbstractStep) -> dict[tuple[int, ...], str]:
    """Returns sorted sizes of each array of a layer to its part, weights or adapters.

    Codes are left out, because they are known by their dtype: no other exchanged array is uint8.
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
