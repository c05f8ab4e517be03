"""Finds the settings to change if a run does not fit, by the ledger, the cheapest change first."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from qlora_jax.config import Config
from qlora_jax.models.config import DecoderConfig
from qlora_jax.plan.ledger import ledger, total


class Change(NamedTuple):
    """A setting to change.

    Attributes:
      setting: command-line argument that changes the setting, such as "--lora.rank=8".
      saved: device bytes that the change saves after all earlier changes.
    """

    setting: str
    saved: int


def _to(value: Any) -> Callable[[Config, Any], Any]:
    return lambda config, old: value


def _half(least: int) -> Callable[[Config, int], int]:
    return lambda config, old: max(least, old // 2)


CHANGES: Sequence[tuple[str, str, Callable[[Config, Any], Any]]] = (
    ("optimizer", "offload", _to("host")),
    ("model", "remat", _to("full")),
    ("train", "batch_size", lambda config, old: config.mesh.devices),
    ("model", "remat", _to("host")),
    ("optimizer", "moments", _to("int8")),
    ("lora", "dtype", _to("bfloat16")),
    ("lora", "rank", _half(8)),
    ("data", "sequence_length", _half(128)),
)
"""Section, key, and function that returns the new value. The first four do not change the computed
result, if a smaller batch is made up for by more gradient accumulation."""


def changes(model: DecoderConfig, config: Config, missing: int) -> tuple[list[Change], int]:
    """Returns the first of `CHANGES` that save device bytes, until `missing` bytes are saved.

    Args:
      model: shapes of the decoder.
      config: config of the run.
      missing: device bytes to save.

    Returns:
      The changes, and the bytes that are still missing after them; 0 or less if enough are saved.
    """
    made = []
    now = total(ledger(model, config))
    for section, key, new in CHANGES:
        if missing <= 0:
            break
        part = getattr(config, section)
        value = new(config, getattr(part, key))
        changed = dataclasses.replace(
            config, **{section: dataclasses.replace(part, **{key: value})}
        )
        after = total(ledger(model, changed))
        if after < now:
            made.append(Change(f"--{section}.{key}={value}", now - after))
            missing -= now - after
            config, now = changed, after
    return made, missing
