"""A model to talk with, and the adapters that one may switch between."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

from qlora_jax.config import Config, FloatType
from qlora_jax.lora.initializers import INITIALIZERS
from qlora_jax.lora.weights import LoraSet
from qlora_jax.models.decoder import detach
from qlora_jax.models.families import EMBEDDINGS, HEAD
from qlora_jax.runtime.errors import UserError
from qlora_jax.serve.base import Base, Named, is_run, open_base, open_trained
from qlora_jax.train import rundir
from qlora_jax.train.export import adapters as trained_adapters

BASE = "base"
"""Names the model without an adapter."""


@dataclasses.dataclass(frozen=True)
class Lineup:
    """A model and who may answer with it.

    Attributes:
      base: the model. It wears an adapter itself only if that is the only one who answers.
      name: the model's name among those who answer.
      adapters: weights by name, all of which may share a bank.
      first: the name of the one who answers first.
    """

    base: Base
    name: str
    adapters: dict[str, LoraSet]
    first: str


def open_lineup(
    path: str,
    named: Sequence[Named],
    *,
    base: bool,
    bits: int | None,
    dtype: FloatType | None,
    warn: Callable[[str], None],
) -> Lineup:
    """Loads a model or a run, and the adapters that go with it.

    The first of the given adapters answers first, else a run's own, else the model without one.
    An adapter that cannot share a bank with others answers alone, with the model that wears it.

    Args:
      path: as for `open_base`.
      named: further adapters.
      base: the model without an adapter answers first.
      bits: as for `open_base`.
      dtype: as for `open_base`.
      warn: called with lines for the user.

    Raises:
      UserError: as `open_base`; an adapter is called base; one of several cannot share a bank.
    """
    if any(own.name == BASE for own in named):
        raise UserError(
            f"--adapter {BASE}=...: {BASE} is the model without an adapter; give another name"
        )
    if is_run(path):
        return _of_run(path, named, base, bits, dtype, warn)
    if len(named) == 1 and not base and not _can_share(named[0]):
        worn = open_base(path, bits=bits, dtype=dtype, warn=warn, adapter=named[0].folder)
        return Lineup(worn, named[0].name, {}, named[0].name)
    return _with(open_base(path, bits=bits, dtype=dtype, warn=warn), {}, named, base)


def _of_run(
    path: str,
    named: Sequence[Named],
    base: bool,
    bits: int | None,
    dtype: FloatType | None,
    warn: Callable[[str], None],
) -> Lineup:
    config, name = rundir.open_run(path), Path(path).resolve().name
    name = "run" if name == BASE else name
    alone = not (named or base)
    if not alone and _changes_base(config):
        if config.method == "full":
            model = open_trained(path, base=base, bits=bits, dtype=dtype, warn=warn)
        else:
            warn(_left_out(name, f"lora.init {config.lora.init} took a part of the weights"))
            model = open_base(path, bits=bits, dtype=dtype, warn=warn)
        return _with(model, {}, named, base)
    trained = open_trained(path, base=False, bits=bits, dtype=dtype, warn=warn)
    if _changes_base(config):
        return Lineup(trained, name, {}, name)
    own = trained_adapters(trained.model)
    if why := _alone_because(own):
        if alone:
            return Lineup(trained, name, {}, name)
        warn(_left_out(name, why))
        own = {}
    detach(trained.model)
    return _with(trained, {name: own} if own else {}, named, base)


def _changes_base(config: Config) -> bool:
    """Whether the run's model without its adapter is not the pretrained one."""
    return config.method == "full" or config.lora.init in INITIALIZERS


def _with(base: Base, own: dict[str, LoraSet], named: Sequence[Named], plain: bool) -> Lineup:
    given = {each.name: each.in_bank_of(base.model) for each in named}
    first = BASE if plain else next(iter([*given, *own]), BASE)
    return Lineup(base, BASE, own | given, first)


def _can_share(named: Named) -> bool:
    return not (named.stored.beyond_lora or _alone_because(named.stored.adapters))


def _alone_because(adapters: LoraSet) -> str | None:
    """Why adapters cannot share a bank; None if they can."""
    for path, own in adapters.items():
        if own.magnitude is not None:
            return f"{path} is no plain LoRA (DoRA, for one)"
        if path in EMBEDDINGS or path == HEAD:
            return f"{path} has an adapter"
    return None


def _left_out(name: str, why: str) -> str:
    return (
        f"warning: {name}: the run's own adapter takes no part beside others or the base, since "
        f"{why}; leave --adapter and --base out to talk with it"
    )
