"""Which linears get an adapter, of which rank and scale."""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping
from typing import Literal

from qlora_jax.config import LoraConfig
from qlora_jax.lora.patterns import BadPattern, ends_in, first_match, named
from qlora_jax.runtime.errors import UserError

Scaling = Literal["alpha/r", "alpha/sqrt(r)", "constant"]

SCALINGS: Mapping[str, Callable[[float, int], float]] = {
    "alpha/r": lambda alpha, rank: alpha / rank,
    "alpha/sqrt(r)": lambda alpha, rank: alpha / math.sqrt(rank),
    "constant": lambda alpha, rank: alpha,
}
"""How alpha becomes the factor on B·A: LoRA section 4.1, rsLoRA (arXiv 2312.03732), or as it is."""


@dataclasses.dataclass(frozen=True)
class AdapterSpec:
    """One adapter: y = x @ W + scale * (x @ A) @ B with A [in, rank] and B [rank, out]."""

    rank: int
    alpha: float
    scale: float


def plan(config: LoraConfig, linears: Mapping[str, tuple[int, int]]) -> dict[str, AdapterSpec]:
    """Chooses the adapters.

    `target_modules` is all-linear (every linear but the head), a list of names (a module
    whose path ends in one, as in PEFT) or a regular expression that must match the whole path.
    `rank_pattern` and `alpha_pattern` keys match the end of a path, as in PEFT; the first that
    does wins.

    Args:
      config: the section `lora`.
      linears: module path (such as model.layers.0.self_attn.q_proj) to (in_features,
        out_features), the head left out.

    Returns:
      The targeted paths, in the order of `linears`.

    Raises:
      UserError: a target or a pattern that matches no linear, or a malformed expression.
    """
    targets = [path for path in linears if _targeted(config.target_modules, path)]
    if not targets:
        names = sorted({path.rpartition(".")[2] for path in linears})
        raise UserError(
            f"lora.target_modules {config.target_modules!r} matches no linear; "
            f"there are: {', '.join(names)}"
        )
    if isinstance(config.target_modules, list):
        for name in config.target_modules:
            _require_match("lora.target_modules", name, linears, named)
    for key in config.rank_pattern:
        _require_match("lora.rank_pattern", key, linears, ends_in)
    for key in config.alpha_pattern:
        _require_match("lora.alpha_pattern", key, linears, ends_in)
    return {path: _spec(config, path) for path in targets}


def ranks_above_full(
    specs: Mapping[str, AdapterSpec], linears: Mapping[str, tuple[int, int]]
) -> list[str]:
    """Paths whose rank exceeds min(in, out): allowed, but no matrix needs it."""
    return [path for path, spec in specs.items() if spec.rank > min(linears[path])]


def _spec(config: LoraConfig, path: str) -> AdapterSpec:
    rank = first_match(config.rank_pattern, path, config.rank)
    alpha = first_match(config.alpha_pattern, path, config.alpha)
    return AdapterSpec(rank, alpha, SCALINGS[config.scaling](alpha, rank))


def _targeted(targets: str | list[str], path: str) -> bool:
    if targets == "all-linear":
        return True
    if isinstance(targets, list):
        return any(named(path, name) for name in targets)
    try:
        return re.fullmatch(targets, path) is not None
    except re.error as e:
        raise UserError(
            f"lora.target_modules {targets!r} is not a regular expression: {e}"
        ) from None


def _require_match(
    field: str,
    key: str,
    linears: Mapping[str, tuple[int, int]],
    matches: Callable[[str, str], bool],
) -> None:
    try:
        if any(matches(path, key) for path in linears):
            return
    except BadPattern as e:
        raise UserError(f"{field}: {e}") from None
    names = sorted({path.rpartition(".")[2] for path in linears})
    raise UserError(f"{field}: {key!r} matches no linear; there are: {', '.join(names)}")
