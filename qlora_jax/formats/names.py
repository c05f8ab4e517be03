"""Maps the tensor names of a file to the decoder's names, and checks names and shapes."""

from collections.abc import Mapping
from typing import TypeVar

from qlora_jax.models.config import DecoderConfig
from qlora_jax.models.families import HEAD, Names
from qlora_jax.models.weight_shapes import expected_shapes
from qlora_jax.runtime.errors import UserError

SHOWN = 4
T = TypeVar("T")


def by_decoder_name(found: Mapping[str, T], names: Names) -> dict[str, T]:
    """Returns the tensors of a file under the decoder's names.

    A model that transformers saved without its head has names without the first part: layers.0
    instead of model.layers.0. If no tensor has this prefix, all get it. The head of GPT-NeoX may be
    lm_head (the module in transformers 5) or embed_out (most files); both are accepted.

    Args:
      found: stored name to value, of any type.
      names: names of the decoder's parts.
    """
    prefix = f"{names.layers.partition('.')[0]}."
    if any(name.startswith(prefix) for name in found):
        prefix = ""

    def own(name: str) -> str:
        for head in (names.head, HEAD):
            if name.startswith(f"{head}."):
                return names.head + name.removeprefix(head)
        return prefix + name

    return {own(name): tensor for name, tensor in found.items()}


def is_ignored(name: str, config: DecoderConfig) -> bool:
    """Returns whether a tensor is not a weight, such as the rotary frequencies in old files."""
    return name.endswith(config.names.ignored)


def check_shapes(
    found: Mapping[str, tuple[int, ...]], config: DecoderConfig, where: object
) -> dict[str, tuple[int, ...]]:
    """Checks the tensors of a file against the decoder's and returns the expected names and shapes.

    A tensor that the decoder does not have is an error: without it, the decoder would compute
    another function. Two kinds of extra tensors are allowed: a head with tied embeddings, which
    `tying.resolve_tying` has compared with the embedding, and tensors that are not weights
    (`is_ignored`).

    Args:
      found: name to shape of every tensor in the file.
      config: config of the decoder.
      where: file or folder, for messages.

    Raises:
      UserError: tensors are missing, unknown or of another shape. The message names them.
    """
    expected = expected_shapes(config)
    if missing := [name for name in expected if name not in found]:
        raise UserError(
            f"{where}: not a whole {config.family} checkpoint; missing: {_some(missing)}"
        )
    wrong = [
        f"{name} is {list(found[name])} and not {list(shape)}"
        for name, shape in expected.items()
        if found[name] != shape
    ]
    if wrong:
        raise UserError(
            f"{where}: shapes do not agree with the model's config: {_some(wrong)}; "
            "download weights and config again"
        )
    unknown = [name for name in found if name not in expected and not _allowed(name, config)]
    if unknown:
        raise UserError(
            f"{where}: has tensors that a {config.family} decoder with this config does not have: "
            f"{_some(unknown)}; give another model, or correct its config.json"
        )
    return expected


def _allowed(name: str, config: DecoderConfig) -> bool:
    return name == f"{config.names.head}.weight" or is_ignored(name, config)


def _some(items: list[str]) -> str:
    rest = len(items) - SHOWN
    return ", ".join(items[:SHOWN]) + (f" and {rest} more" if rest > 0 else "")
