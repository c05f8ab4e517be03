"""The names of a file's tensors, and the check of them against those that the decoder has."""

from collections.abc import Mapping
from typing import TypeVar

from qlora_jax.models.config import DecoderConfig
from qlora_jax.models.families import HEAD, Names
from qlora_jax.models.parts import expected_shapes
from qlora_jax.runtime.errors import UserError

SHOWN = 4
T = TypeVar("T")


def by_decoder_name(found: Mapping[str, T], names: Names) -> dict[str, T]:
    """Returns a file's tensors under the decoder's names.

    A model that transformers saved without its head has the names of what is inside it: layers.0
    in place of model.layers.0. They get that prefix, if no tensor has it. GPT-NeoX's head is
    lm_head as a module and embed_out in most files.

    Args:
      found: the stored names to anything.
      names: the decoder's.
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
    """Whether a tensor of old files is no weight, such as a table of rotary frequencies."""
    return name.endswith(config.names.ignored)


def check_shapes(
    found: Mapping[str, tuple[int, ...]], config: DecoderConfig, where: object
) -> dict[str, tuple[int, ...]]:
    """Compares the tensors of a file with those the decoder has; returns the expected ones.

    A tensor the decoder has no place for is refused, because leaving it out would compute another
    function. Allowed are a head beside tied embeddings, which has been compared with them
    (`tying.settle`), and tensors that are no weights (`is_ignored`).

    Args:
      found: name to shape of everything in the file.
      config: the decoder.
      where: the file or folder, for messages.

    Raises:
      UserError: naming the tensors that are missing, of another shape or unknown.
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
            "download both again"
        )
    unknown = [name for name in found if name not in expected and not _allowed(name, config)]
    if unknown:
        raise UserError(
            f"{where}: tensors that a {config.family} decoder with this config has no place for: "
            f"{_some(unknown)}; give another model, or correct its config.json"
        )
    return expected


def _allowed(name: str, config: DecoderConfig) -> bool:
    return name == f"{config.names.head}.weight" or is_ignored(name, config)


def _some(items: list[str]) -> str:
    rest = len(items) - SHOWN
    return ", ".join(items[:SHOWN]) + (f" and {rest} more" if rest > 0 else "")
