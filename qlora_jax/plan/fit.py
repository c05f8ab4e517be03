"""Decides if a run fits on the devices of this machine, before a weight is read."""

from typing import Any, NamedTuple

import jax

from qlora_jax import config as configs
from qlora_jax.config import Config
from qlora_jax.models.config import DecoderConfig
from qlora_jax.plan import compiled_memory
from qlora_jax.plan.advice import changes
from qlora_jax.plan.choose import POLICIES, Compiled, choose
from qlora_jax.runtime.errors import UserError
from qlora_jax.train.mesh import mesh_of

GIB = 2**30


class Fit(NamedTuple):
    """Chosen settings of memory for a run, and its planned memory on the device.

    Attributes:
      offload, remat: values of `optimizer.offload` and `model.remat`.
      device: planned bytes on each device; None if the device does not report its memory.
      chosen: text with the `auto` settings whose fastest value does not fit; "" if there are none.
    """

    offload: str
    remat: str
    device: int | None
    chosen: str = ""


def fit(config: Config, decoder: DecoderConfig, device: jax.Device, force: bool) -> Fit:
    """Compiles the step for the device from shapes, and compares its memory with the device's.

    If a device does not report its memory (a CPU), any run fits. On a mesh the memory of one device
    is compared, because all devices hold the same number of bytes.

    Args:
      config: config of the run.
      decoder: shapes of the model.
      device: device of the run, or one of its devices.
      force: True accepts a run that does not fit.

    Raises:
      UserError: the run does not fit; the message lists settings to change.
    """
    limit = (device.memory_stats() or {}).get("bytes_limit")
    if limit is None:
        asked, remat = config.optimizer.offload, config.model.remat
        return Fit(
            "host" if asked == "host" else "device", POLICIES[0] if remat == "auto" else remat, None
        )

    mesh = mesh_of(config)

    def step_of(config: Config) -> Compiled:
        step = compiled_memory.abstract_step(config, decoder, device, mesh)
        gradients = compiled_memory.gradient_memory(step, compiled)
        return Compiled(step, gradients, compiled_memory.update_memory(step, compiled))

    choice = choose(config, limit, step_of)
    held = choice.device
    if held <= limit or force:
        words = ", ".join(choice.settings(config))
        return Fit(choice.offload, choice.remat, held, words)
    decided = {"optimizer.offload": choice.offload, "model.remat": choice.remat}
    tried = configs.changed(config, decided)
    made, missing = changes(decoder, tried, held - limit)
    remedy = ", ".join(change.setting for change in made) or "a smaller model"
    where = device.device_kind if mesh is None else f"each of {mesh.size} {device.device_kind}"
    raise UserError(
        f"this run needs {held / GIB:.2f} GiB on {where}, which has "
        f"{limit / GIB:.2f}; to fit: {remedy}"
        + (f" (still missing: {missing / GIB:.2f} GiB)" if missing > 0 else "")
        + "; --force runs it all the same"
    )


def compiled(function: Any, *arguments: Any, donate: tuple[int, ...] = ()) -> jax.stages.Compiled:
    """Compiles a function for the default device; a `compiled_memory.Compile`."""
    return jax.jit(function, donate_argnums=donate).lower(*arguments).compile()
