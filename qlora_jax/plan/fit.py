"""Decides whether a run fits on the device that is here, before a weight is read."""

from typing import Any, NamedTuple

import jax

from qlora_jax import config as configs
from qlora_jax.config import Config
from qlora_jax.models.config import DecoderConfig
from qlora_jax.plan import accounts
from qlora_jax.plan.advice import changes
from qlora_jax.runtime.errors import UserError

GIB = 2**30


class Fit(NamedTuple):
    """Where a run's moments go, and what it will hold on the device; None where that is unknown."""

    offload: str
    device: int | None


def fit(config: Config, decoder: DecoderConfig, device: jax.Device, force: bool) -> Fit:
    """Compiles the step for the device, from shapes alone, and compares with its memory.

    A device that does not tell its memory (a CPU) is taken to hold any run.

    Args:
      config: of the run.
      decoder: the model's shapes.
      device: that it would run on.
      force: go on where it does not fit.

    Raises:
      UserError: it does not fit, with what to change.
    """
    asked = config.optimizer.offload
    limit = (device.memory_stats() or {}).get("bytes_limit")
    if limit is None:
        return Fit("host" if asked == "host" else "device", None)
    step = accounts.abstract_step(config, decoder, device)
    gradient = accounts.gradient_account(step, compiled)
    updates = accounts.update_accounts(step, compiled)
    offload, programs = accounts.settle(step, asked, [gradient], updates, limit)
    held = max(program.device for program in programs)
    if held <= limit or force:
        return Fit(offload, held)
    tried = configs.changed(config, {"optimizer.offload": offload})
    made, missing = changes(decoder, tried, held - limit)
    remedy = ", ".join(change.setting for change in made) or "a smaller model"
    raise UserError(
        f"this run needs {held / GIB:.2f} GiB on {device.device_kind}, which has "
        f"{limit / GIB:.2f}; to fit: {remedy}"
        + (f" (still missing: {missing / GIB:.2f} GiB)" if missing > 0 else "")
        + "; --force runs it all the same"
    )


def compiled(function: Any, *arguments: Any, donate: tuple[int, ...] = ()) -> jax.stages.Compiled:
    """Compiles for the default device: an `accounts.Compile`."""
    return jax.jit(function, donate_argnums=donate).lower(*arguments).compile()
