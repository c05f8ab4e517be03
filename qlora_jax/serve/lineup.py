"""Loads a model for `chat` with the adapters that the user can switch between."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

from qlora_jax.config import Config, FloatType
from qlora_jax.lora.initializers import INITIALIZERS
from qlora_jax.lora.weights import LoraSet
from qlora_jax.models.decoder import detach
from qlora_jax.models.families import EMBEDDINGS, HEAD
from qlora_jax.runtime.errors import UserError
from qlora_jax.serve.base import Base, NamedAdapter, is_run, open_base, open_trained
from qlora_jax.train import rundir
from qlora_jax.train.export import adapters as trained_adapters

BASE = "base"
"""Name of the model without an adapter."""


@dataclasses.dataclass(frozen=True)
class ModelWithAdapters:
    """A model and the adapters that can answer with it.

    Attributes:
      base: the model. It contains an adapter only if the user cannot switch to another one.
      name: name by which the user chooses `base`.
      adapters: name to adapter weights; all of them can share a bank.
      first: name of the adapter, or of the model, that answers first.
    """

    base: Base
    name: str
    adapters: dict[str, LoraSet]
    first: str


def open_lineup(
    path: str,
    named: Sequence[NamedAdapter],
    *,
    base: bool,
    bits: int | None,
    dtype: FloatType | None,
    warn: Callable[[str], None],
) -> ModelWithAdapters:
    """Loads a model or a run, and its adapters.

    The first adapter in `named` answers first; if there is none, the run's adapter; else the model
    without an adapter. An adapter that cannot share a bank is loaded into the model itself, and the
    user cannot switch to another one.

    Args:
      path: model or run directory, as in `open_base`.
      named: adapters to load besides the run's adapter.
      base: whether the model without an adapter answers first.
      bits: bits of the stored weights, as in `open_base`.
      dtype: compute dtype, as in `open_base`.
      warn: function called with lines for the user.

    Raises:
      UserError: `open_base` fails, an adapter has the name `base`, or one of several adapters
        cannot share a bank.
    """
    if any(own.name == BASE for own in named):
        raise UserError(
            f"--adapter {BASE}=...: {BASE} is the model without an adapter; give another name"
        )
    if is_run(path):
        return _of_run(path, named, base, bits, dtype, warn)
    if len(named) == 1 and not base and not _can_share(named[0]):
        worn = open_base(path, bits=bits, dtype=dtype, warn=warn, adapter=named[0].folder)
        return ModelWithAdapters(worn, named[0].name, {}, named[0].name)
    return _with(open_base(path, bits=bits, dtype=dtype, warn=warn), {}, named, base)


def _of_run(
    path: str,
    named: Sequence[NamedAdapter],
    base: bool,
    bits: int | None,
    dtype: FloatType | None,
    warn: Callable[[str], None],
) -> ModelWithAdapters:
    config, name = rundir.open_run(path), Path(path).resolve().name
    name = "run" if name == BASE else name
    alone = not (named or base)
    if not alone and _changes_base(config):
        if config.method == "full":
            model = open_trained(path, base=base, bits=bits, dtype=dtype, warn=warn)
        else:
            warn(_left_out(name, f"lora.init {config.lora.init} moved a part of W into it"))
            model = open_base(path, bits=bits, dtype=dtype, warn=warn)
        return _with(model, {}, named, base)
    trained = open_trained(path, base=False, bits=bits, dtype=dtype, warn=warn)
    if _changes_base(config):
        return ModelWithAdapters(trained, name, {}, name)
    own = trained_adapters(trained.model)
    if why := _alone_because(own):
        if alone:
            return ModelWithAdapters(trained, name, {}, name)
        warn(_left_out(name, why))
        own = {}
    detach(trained.model)
    return _with(trained, {name: own} if own else {}, named, base)


def _changes_base(config: Config) -> bool:
    """Returns whether the run's model without its adapter differs from the pretrained model."""
    return config.method == "full" or config.lora.init in INITIALIZERS


def _with(
    base: Base, own: dict[str, LoraSet], named: Sequence[NamedAdapter], plain: bool
) -> ModelWithAdapters:
    given = {each.name: each.in_bank_of(base.model) for each in named}
    first = BASE if plain else next(iter([*given, *own]), BASE)
    return ModelWithAdapters(base, BASE, own | given, first)


def _can_share(named: NamedAdapter) -> bool:
    return not (named.stored.beyond_lora or _alone_because(named.stored.adapters))


def _alone_because(adapters: LoraSet) -> str | None:
    """Returns the reason why adapters cannot share a bank; None if they can."""
    for path, own in adapters.items():
        if own.magnitude is not None:
            return f"{path} has a magnitude, so it is not plain LoRA"
        if path in EMBEDDINGS or path == HEAD:
            return f"{path} has an adapter"
    return None


def _left_out(name: str, why: str) -> str:
    return (
        f"warning: {name}: the run's adapter is not loaded, because it cannot be used beside other "
        f"adapters or the base: {why}; leave out --adapter and --base to use it"
    )
