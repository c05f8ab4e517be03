"""Says what to change when a run does not fit, by the ledger, in the order that costs least."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from qlora_jax.config import Config
from qlora_jax.models.config import DecoderConfig
from qlora_jax.plan.ledger import ledger, total


class Change(NamedTuple):
    """A setting to change, and the device bytes that this saves after the changes before it."""

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
"""Section, key, and what gives the new value. The first four leave the mathematics
alone; a smaller batch goes with more gradient accumulation."""


def changes(model: DecoderConfig, config: Config, missing: int) -> tuple[list[Change], int]:
    """Returns the first of `CHANGES` that save anything, until `missing` bytes are saved.

    Returns:
      The changes, and the bytes that are missing after all of them; 0 or less if none are.
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
