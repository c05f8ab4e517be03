"""The check of a file's tensors against those that the decoder has."""

from collections.abc import Mapping

from qlora_jax.models.config import DecoderConfig
from qlora_jax.models.parts import expected_shapes
from qlora_jax.runtime.errors import UserError

SHOWN = 4


def check_shapes(
    found: Mapping[str, tuple[int, ...]], config: DecoderConfig, where: object
) -> dict[str, tuple[int, ...]]:
    """Compares the tensors of a file with those the decoder has; returns the expected ones.

    A tensor the decoder has no place for is refused, because leaving it out would compute another
    function. Harmless and allowed: a head beside tied embeddings, and old files' rotary tables.

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
        raise UserError(f"{where}: shapes do not agree with the model's config: {_some(wrong)}")
    unknown = [name for name in found if name not in expected and not _harmless(name, config)]
    if unknown:
        raise UserError(
            f"{where}: tensors that a {config.family} decoder with this config has no place for: "
            f"{_some(unknown)}"
        )
    return expected


def _harmless(name: str, config: DecoderConfig) -> bool:
    return name == f"{config.names.head}.weight" or name.endswith(config.names.ignored)


def _some(items: list[str]) -> str:
    rest = len(items) - SHOWN
    return ", ".join(items[:SHOWN]) + (f" and {rest} more" if rest > 0 else "")
