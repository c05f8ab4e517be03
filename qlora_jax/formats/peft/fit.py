"""Whether an adapter belongs to a model."""

from collections.abc import Mapping

from qlora_jax.formats.peft.adapter import AdapterSet, listed
from qlora_jax.lora.weights import LoraSet, misfits
from qlora_jax.runtime.errors import UserError


def check_fits(
    adapters: AdapterSet,
    linears: Mapping[str, tuple[int, int]],
    shapes: Mapping[str, tuple[int, ...]],
    tied: bool,
    where: object,
) -> None:
    """Raises UserError, listing what does not fit, unless the adapters are for this model.

    Args:
      adapters: as read.
      linears: the model's, by path: (in, out).
      shapes: of all its parameters, by Hugging Face name.
      tied: whether its head is its embedding.
      where: the adapter's folder, for the message.
    """
    problems = [
        f"{path} (the model has none)"
        if model is None
        else f"{path} (adapter {list(own)}, model {list(model)})"
        for path, own, model in misfits(adapters.adapters, linears)
    ]
    for name, array in adapters.replaced.tensors.items():
        if name not in shapes:
            problems.append(f"{name} (the model has none)")
        elif array.shape != tuple(shapes[name]):
            problems.append(f"{name} (adapter {list(array.shape)}, model {list(shapes[name])})")
    if problems:
        raise UserError(
            f"{where}: belongs to another model ({adapters.base_name or 'not named'}); what does "
            f"not fit: {listed(problems)}"
        )
    replaced = adapters.replaced
    if tied and not replaced.ties and "model.embed_tokens.weight" in replaced.tensors:
        raise UserError(
            f"{where}: replaces the embedding of a model whose head is the embedding, and leaves "
            "the head as it was, which needs two matrices; train it with ensure_weight_tying"
        )


def check_linears(where: object, adapters: LoraSet, linears: Mapping[str, tuple[int, int]]) -> None:
    """Raises UserError, naming the first that does not fit, unless a model has these linears.

    Args:
      where: what to name in the message.
      adapters: plain LoRA, by path.
      linears: the model's, by path: (in, out).
    """
    for path, own, model in misfits(adapters, linears):
        if model is None:
            raise UserError(
                f"{where}: the model has no linear {path}; the adapter is another model's"
            )
        raise UserError(
            f"{where}: {path} is {list(own)} (in, out) in the adapter and {list(model)} in the "
            "model; the adapter is another model's"
        )
