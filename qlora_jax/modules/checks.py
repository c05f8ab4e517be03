"""Checks that weights and adapters allow the requested change; each fault is a one-line error."""

import warnings
from collections.abc import Collection
from typing import Any

import jax

from qlora_jax.config import LoraConfig
from qlora_jax.lora.where import named
from qlora_jax.quant import QTensor
from qlora_jax.runtime.errors import UserError


def check_values(path: str, value: Any, remedy: str) -> None:
    """Raises UserError if a weight is abstract: a shape without values.

    Args:
      path: path of the weight.
      value: value of the weight.
      remedy: advice to the user, the end of the message.
    """
    if isinstance(value, jax.ShapeDtypeStruct):
        raise UserError(f"{path}: is abstract and has no values; {remedy}")


def warn_left_out(paths: Collection[str]) -> None:
    """Warns that weights matched by `where` stay unchanged because no product uses them.

    The warning points at the user's call, which is two calls above the caller of this function.
    """
    if paths:
        warnings.warn(
            "where matches weights that no product of the example call uses; they are not changed: "
            f"{named(paths)}",
            stacklevel=4,
        )


def check_floats(path: str, value: Any) -> None:
    """Raises UserError if a weight is in 4 bits."""
    if isinstance(value, QTensor):
        raise UserError(f"{path}: is in 4 bits already; leave it out of `where`, or merge first")


def check_adapter(
    path: str, value: Any, table: bool, lora: LoraConfig, name: str, names: Collection[str]
) -> None:
    """Raises UserError if a weight cannot get a new adapter.

    Args:
      path: path of the weight.
      value: stored value of the weight.
      table: True if the weight is a table whose rows are looked up, such as an embedding.
      lora: settings of the new adapter.
      name: name of the new adapter.
      names: names of the adapters that the weight has already.
    """
    if name in names:
        raise UserError(f"{path}: has an adapter {name!r} already; give another name")
    if table and lora.variant != "lora":
        raise UserError(
            f"{path}: variant {lora.variant} does not support embeddings; leave it out of `where`, "
            "or give variant='lora'"
        )
    if lora.init == "loftq":
        check_floats(path, value)


def check_names(names: Collection[str], known: Collection[str]) -> None:
    """Raises UserError if a name is not the name of an adapter of the model."""
    for name in names:
        if name not in known:
            have = ", ".join(sorted(known)) or "none"
            raise UserError(f"adapter {name!r}: the model has {have}; give one of these")


def check_trained(names: Collection[str], known: Collection[str]) -> None:
    """Raises UserError if a model has no adapters, or not all of those to train."""
    if not known:
        raise UserError("the model has no adapters to train; call add_lora first")
    check_names(names, known)


def check_merged(changed: Collection[Any]) -> None:
    """Raises UserError if a model has nothing to merge."""
    if not changed:
        raise UserError(
            "the model has no adapters and no weight in 4 bits, so there is nothing to merge; "
            "use the model as it is"
        )


def check_not_tables_alone(found: Collection[Any], where: Any) -> None:
    """Raises UserError if `where` matches only embeddings, so that nothing would be quantized."""
    if not found:
        raise UserError(
            f"where: {where!r} matches only embeddings; give embeddings=True to quantize them"
        )
