"""A model under one adapter that was read, or with banks of several."""

from typing import cast

import jax
from flax import nnx

from qlora_jax.lora import Adapter, AdapterSpec, LoraLinear, LoraSet
from qlora_jax.lora.bank import Bank
from qlora_jax.lora.weights import largest_rank
from qlora_jax.models.decoder import Decoder, attach, detach, run_length
from qlora_jax.runtime.errors import UserError


def wear(model: Decoder, adapters: LoraSet) -> None:
    """Gives the model one adapter in place of those that it had, in place.

    Args:
      model: changed in place.
      adapters: LoRA weights by path; the model has each path, with these shapes.
    """
    detach(model)
    specs = {path: AdapterSpec(own.rank, own.alpha, own.scale) for path, own in adapters.items()}
    attach(model, specs, jax.random.key(0), values=adapters)


def attach_bank(model: Decoder, *, slots: int, rank: int, dtype: jax.typing.DTypeLike) -> None:
    """Gives every linear an empty bank, in place of the adapters that the model had.

    Args:
      model: changed in place.
      slots: most adapters at a time. The slot after them, `slots` itself, is the base's.
      rank: largest rank of any.
      dtype: of A and B; the compute dtype loses nothing, for products round them to it.
    """
    detach(model)
    for run in model.runs:
        for linear in run.linears().values():
            layers, k, n = linear.weight.get_value().shape
            bank = Bank(layers, k, n, slots, rank, dtype)
            linear.adapter = nnx.data(cast(Adapter, bank))  # a linear calls it as it does one


def put_adapter(model: Decoder, slot: int, adapters: LoraSet) -> None:
    """Writes an adapter into a slot, in place. No shape changes, so no program compiles anew.

    Args:
      model: with banks.
      slot: from 0.
      adapters: LoRA weights by path; the model has each path, with these shapes.

    Raises:
      UserError: the adapter's rank is above the banks'.
    """
    first = next(iter(model.runs[0].linears().values()))
    room = _bank(first).a.get_value().shape[-1]
    if (rank := largest_rank(adapters)) > room:
        raise UserError(
            f"the adapter's rank {rank} is above the largest there is room for, {room}; start with "
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
