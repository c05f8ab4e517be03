"""Which linears get an adapter, of which rank and scale."""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
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


OLD_NAMES = {"lm_head": "embed_out"}
"""Module paths to those that transformers 4 has for them, in GPT-NeoX."""
NEW_NAMES = {old: new for new, old in OLD_NAMES.items()}


def choose_adapters(
    config: LoraConfig,
    linears: Mapping[str, tuple[int, int]],
    outer: Mapping[str, tuple[int, int]] = MappingProxyType({}),
) -> dict[str, AdapterSpec]:
    """Chooses the adapters.

    `target_modules` is all-linear (every linear of the layers), a list of names (a module
    whose path ends in one, as in PEFT) or a regular expression that must match the whole path.
    Embedding and head are chosen by a name or an expression alone. `rank_pattern` and
    `alpha_pattern` keys match the end of a path, as in PEFT; the first that does wins.

    Args:
      config: the section `lora`.
      linears: the layers' linears, module path (such as model.layers.0.self_attn.q_proj) to
        (in_features, out_features).
      outer: embedding and head, likewise; without them they cannot be chosen.

    Returns:
      The targeted paths, in the order of `linears` and `outer`.

    Raises:
      UserError: a target or a pattern that matches nothing, or a malformed expression.
    """
    modules = [*linears, *outer]
    if config.target_modules == "all-linear":
        targets = list(linears)
    else:
        targets = [path for path in modules if _targeted(config.target_modules, path)]
    if not targets:
        raise UserError(
            f"lora.target_modules {config.target_modules!r} matches no linear; "
            f"name some of: {_last_names(modules)}"
        )
    if isinstance(config.target_modules, list):
        for name in config.target_modules:
            _require_match("lora.target_modules", name, modules, named)
    check_patterns(config, modules)
    return {path: spec_of(config, path) for path in targets}


def ranks_above_full(
    specs: Mapping[str, AdapterSpec], linears: Mapping[str, tuple[int, int]]
) -> list[str]:
    """Paths whose rank exceeds min(in, out): allowed, but no matrix needs it."""
    return [path for path, spec in specs.items() if spec.rank > min(linears[path])]


def check_patterns(config: LoraConfig, paths: Sequence[str]) -> None:
    """Raises UserError for a key of `rank_pattern` or `alpha_pattern` that matches no path."""
    for key in config.rank_pattern:
        _require_match("lora.rank_pattern", key, paths, ends_in)
    for key in config.alpha_pattern:
        _require_match("lora.alpha_pattern", key, paths, ends_in)


def spec_of(config: LoraConfig, *paths: str) -> AdapterSpec:
    """Returns the rank, alpha and scale of the adapter of a module or weight with these paths."""
    names = [name for path in paths for name in _names(path)]
    rank = first_match(config.rank_pattern, names, config.rank)
    alpha = first_match(config.alpha_pattern, names, config.alpha)
    return AdapterSpec(rank, alpha, SCALINGS[config.scaling](alpha, rank))


def _targeted(targets: str | list[str], path: str) -> bool:
    if isinstance(targets, list):
        return any(named(own, name) for own in _names(path) for name in targets)
    try:
        return any(re.fullmatch(targets, own) is not None for own in _names(path))
    except re.error as e:
        raise UserError(
            f"lora.target_modules {targets!r} is not a regular expression ({e}); "
            "correct it, or give a list of names"
        ) from None


def _names(path: str) -> list[str]:
    """The module path, and the one that an older transformers has for it."""
    return [path, *([OLD_NAMES[path]] if path in OLD_NAMES else [])]


def _require_match(
    field: str, key: str, modules: Sequence[str], matches: Callable[[str, str], bool]
) -> None:
    try:
        if any(matches(own, key) for path in modules for own in _names(path)):
            return
    except BadPattern as e:
        raise UserError(f"{field}: {e}; correct it") from None
    raise UserError(f"{field}: {key!r} matches no linear; name some of: {_last_names(modules)}")


def _last_names(modules: Sequence[str]) -> str:
    return ", ".join(sorted({path.rpartition(".")[2] for path in modules}))
