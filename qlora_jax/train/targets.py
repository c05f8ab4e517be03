"""Chooses the adapters of a run for the modules of its model."""

from collections.abc import Mapping

from qlora_jax.config import LoraConfig
from qlora_jax.lora import AdapterSpec, choose_adapters
from qlora_jax.lora.initializers import INITIALIZERS
from qlora_jax.models.config import DecoderConfig
from qlora_jax.models.weight_shapes import layer_linears, outer_modules
from qlora_jax.runtime.errors import UserError


def targets(lora: LoraConfig, decoder: DecoderConfig) -> dict[str, AdapterSpec]:
    """Returns the adapters of a config, by module path.

    Args:
      lora: section `lora` of the config.
      decoder: shapes of the model.

    Raises:
      UserError: an error of `lora.choose_adapters`; or `lora.target_modules` contains embedding or
        head, with a setting that supports only the linears of layers.
    """
    specs = choose_adapters(lora, layer_linears(decoder), outer_modules(decoder))
    _check_outer(lora, decoder, specs)
    return specs


def outer_targets(lora: LoraConfig, decoder: DecoderConfig) -> list[str]:
    """Returns the paths of embedding and head, if a config targets them."""
    return _outer(decoder, targets(lora, decoder))


def _outer(decoder: DecoderConfig, specs: Mapping[str, AdapterSpec]) -> list[str]:
    return [path for path in outer_modules(decoder) if path in specs]


def _check_outer(
    lora: LoraConfig, decoder: DecoderConfig, specs: Mapping[str, AdapterSpec]
) -> None:
    outer = _outer(decoder, specs)
    if not outer:
        return
    names = " and ".join(outer)
    settings = {
        "variant": (lora.variant == "dora", "set it to lora"),
        "init": (lora.init in INITIALIZERS, "set it to kaiming-uniform or gaussian"),
    }
    for name, (refused, remedy) in settings.items():
        if refused:
            raise UserError(
                f"lora.{name} {getattr(lora, name)}: not for {names}; leave that out of "
                f"lora.target_modules, or {remedy}"
            )
    if lora.freeze_a and decoder.names.embed in specs:
        raise UserError(
            f"lora.freeze_a: A of {decoder.names.embed} starts at zero and would stay there; leave "
            "that out of lora.target_modules, or set freeze_a to false"
        )
