"""Checks that an adapter belongs to a model and that it is complete."""

from collections.abc import Collection

import numpy as np

from qlora_jax.formats.peft.adapter import CONFIG, AdapterSet, is_within, listed
from qlora_jax.formats.tying import matrices
from qlora_jax.lora.spec import NEW_NAMES
from qlora_jax.lora.weights import misfits
from qlora_jax.models.config import DecoderConfig
from qlora_jax.models.families import HEAD
from qlora_jax.models.weight_shapes import adaptable, expected_shapes, layer_linears, outer_modules
from qlora_jax.runtime.errors import UserError


def check_fits(adapters: AdapterSet, config: DecoderConfig, where: object) -> None:
    """Raises UserError if the adapters do not fit the model or are incomplete.

    The modules that the adapter's settings cover in this model must be the modules in the adapter's
    file. Settings that match no module are no error, as in PEFT. The message lists the problems.

    Args:
      adapters: the adapters.
      config: config of the model.
      where: folder of the adapter, for the message.
    """
    if problems := _strangers(adapters, config):
        raise UserError(
            f"{where}: belongs to another model ({adapters.base_name or 'not named'}); what does "
            f"not fit: {listed(problems)}"
        )
    covered = _covered(adapters, config, where)
    if absent := sorted(covered - adapters.adapters.keys()):
        raise UserError(
            f"{where}: incomplete: {CONFIG} covers these modules, and the file has no tensors for "
            f"them: {listed(absent)}; export it again"
        )
    if absent := _not_replaced(adapters, config, covered):
        raise UserError(
            f"{where}: incomplete: {CONFIG} says that these were trained, and the file lacks them: "
            f"{listed(absent)}; export it again"
        )
    if extra := sorted(adapters.adapters.keys() - covered):
        raise UserError(
            f"{where}: the file has tensors for modules that {CONFIG} does not cover: "
            f"{listed(extra)}; add them to target_modules, or export it again"
        )


def replaced_tensors(adapters: AdapterSet, config: DecoderConfig) -> dict[str, np.ndarray]:
    """Returns the replaced parameters under their names in the checkpoint of the model.

    Only one name differs: GPT-NeoX's head is lm_head in an adapter and embed_out in a checkpoint.
    """
    head = {f"{HEAD}.weight": matrices(config)[1]}
    return {head.get(name, name): value for name, value in adapters.replaced.tensors.items()}


def _covered(adapters: AdapterSet, config: DecoderConfig, where: object) -> set[str]:
    """Returns the paths of the modules that the adapter's settings cover in the model."""
    outer = outer_modules(config).keys()
    found = adapters.targets.covered(
        layer_linears(config), (*outer, *NEW_NAMES), f"{where}/{CONFIG}"
    )
    covered = {NEW_NAMES.get(path, path) for path in found}
    # If PEFT ties embedding and head, covering one of them covers both.
    tied = adapters.replaced.ties and config.tie_embeddings and covered & outer
    return covered | outer if tied else covered


def _strangers(adapters: AdapterSet, config: DecoderConfig) -> list[str]:
    """Lists the modules and parameters that the model lacks or has in another shape."""
    shapes, (embed, head) = expected_shapes(config), matrices(config)
    shapes.setdefault(head, shapes[embed])
    problems = [
        f"{path} (the model has none)"
        if model is None
        else f"{path} (adapter {list(own)}, model {list(model)})"
        for path, own, model in misfits(adapters.adapters, adaptable(config))
    ]
    for name, array in replaced_tensors(adapters, config).items():
        if name not in shapes:
            problems.append(f"{name} (the model has none)")
        elif array.shape != tuple(shapes[name]):
            problems.append(f"{name} (adapter {list(array.shape)}, model {list(shapes[name])})")
    return problems


def _not_replaced(
    adapters: AdapterSet, config: DecoderConfig, covered: Collection[str]
) -> list[str]:
    """Returns the parameters of the base that the settings call trained and the file lacks."""
    replaced, found = adapters.replaced, replaced_tensors(adapters, config)
    biases = {
        "none": lambda path: False,
        "all": lambda path: True,
        "lora_only": lambda path: path in covered,
    }[replaced.bias]
    return [
        name
        for name in expected_shapes(config)
        if name not in found
        and (
            any(is_within(name, module) for module in replaced.modules)
            or (name.endswith(".bias") and biases(name.removesuffix(".bias")))
        )
    ]
