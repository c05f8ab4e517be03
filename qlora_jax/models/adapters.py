"""Gives a model one adapter that was read from a file, or banks that hold several adapters."""

from typing import cast

import jax
from flax import nnx

from qlora_jax.lora import Adapter, AdapterSpec, LoraLinear, LoraSet
from qlora_jax.lora.bank import Bank
from qlora_jax.lora.weights import largest_rank
from qlora_jax.models.decoder import Decoder, attach, detach, run_length
from qlora_jax.runtime.errors import UserError


def set_adapter(model: Decoder, adapters: LoraSet) -> None:
    """Replaces the adapters of a model by one given adapter, in place.

    Args:
      model: model to change.
      adapters: module path to LoRA weights; the model has each of these modules, in this shape.
    """
    detach(model)
    specs = {path: AdapterSpec(own.rank, own.alpha, own.scale) for path, own in adapters.items()}
    attach(model, specs, jax.random.key(0), values=adapters)


def attach_bank(model: Decoder, *, slots: int, rank: int, dtype: jax.typing.DTypeLike) -> None:
    """Replaces the adapters of every linear by an empty bank, in place.

    Args:
      model: model to change.
      slots: largest number of adapters at a time. Rows with slot number `slots` use the base alone.
      rank: largest rank of an adapter.
      dtype: dtype of A and B. The compute dtype loses no accuracy, because products round A and B
        to it.
    """
    detach(model)
    for run in model.runs:
        for linear in run.linears().values():
            layers, k, n = linear.weight.get_value().shape
            bank = Bank(layers, k, n, slots, rank, dtype)
            # Bank has the methods of Adapter that a linear calls.
            linear.adapter = nnx.data(cast(Adapter, bank))


def put_adapter(model: Decoder, slot: int, adapters: LoraSet) -> None:
    """Writes an adapter into a slot of the banks, in place.

    No shape changes, so no program is compiled again.

    Args:
      model: model with banks.
      slot: number of the slot, from 0.
      adapters: module path to LoRA weights; the model has each of these modules, in this shape.

    Raises:
      UserError: the rank of the adapter is larger than the rank of the banks.
    """
    first = next(iter(model.runs[0].linears().values()))
    room = _bank(first).a.get_value().shape[-1]
    if (rank := largest_rank(adapters)) > room:
        raise UserError(
            f"the adapter's rank {rank} is above the largest allowed rank, {room}; start with "
            f"--max-rank {rank}, or reduce it with qlora-jax combine --rank {room}"
        )
    start = 0
    for run in model.runs:
        layers = range(start, start + run_length(run))
        for path, linear in run.linears().items():
            prefix = model.config.names.layers
            own = [adapters.get(f"{prefix}.{i}.{path}") for i in layers]
            _bank(linear).put(slot, own)
        start = layers.stop


def _bank(linear: LoraLinear) -> Bank:
    bank = cast(object, linear.adapter)
    assert isinstance(bank, Bank), "attach_bank comes first"
    return bank
