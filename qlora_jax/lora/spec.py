"""Chooses the linears that get an adapter, and the rank, alpha and scale of each adapter."""

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
"""Name to a function (alpha, rank) that returns the scale s of s * (x @ A) @ B:

    alpha/r         s = alpha / rank          LoRA, section 4.1
    alpha/sqrt(r)   s = alpha / sqrt(rank)    rsLoRA, arXiv 2312.03732
    constant        s = alpha
"""


@dataclasses.dataclass(frozen=True)
class AdapterSpec:
    """The numbers of one adapter: y = x @ W + scale * (x @ A) @ B, A [in, rank], B [rank, out].

    Attributes:
      rank: rank r of A and B.
      alpha: the alpha from which `scale` is computed.
      scale: factor on the product, `SCALINGS[...](alpha, rank)`.
    """

    rank: int
    alpha: float
    scale: float


OLD_NAMES = {"lm_head": "embed_out"}
"""Module path to the path of the same module in transformers 4, for GPT-NeoX."""
NEW_NAMES = {old: new for new, old in OLD_NAMES.items()}


def choose_adapters(
    config: LoraConfig,
    linears: Mapping[str, tuple[int, int]],
    outer: Mapping[str, tuple[int, int]] = MappingProxyType({}),
) -> dict[str, AdapterSpec]:
    """Returns the rank, alpha and scale of each adapter, by the path of its module.

    `target_modules` is one of: "all-linear" (every linear of the layers); a list of names (a name
    selects the modules whose path ends in it, as in PEFT); a regular expression that must match the
    whole path. "all-linear" does not include embedding and head; a name or an expression can select
    them. A key of `rank_pattern` or `alpha_pattern` matches the end of a path, as in PEFT; the
    first key that matches decides.

    Args:
      config: section `lora` of the config.
      linears: linears of the layers, module path (such as model.layers.0.self_attn.q_proj) to
        (in_features, out_features).
      outer: embedding and head, module path to (in_features, out_features); modules that are
        missing here cannot be selected.

    Returns:
      Path to spec of the selected modules, in the order of `linears` and `outer`.

    Raises:
      UserError: a target or a pattern matches nothing, or an expression is malformed.
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
    """Returns the paths whose rank exceeds min(in, out), which is allowed but not needed."""
    return [path for path, spec in specs.items() if spec.rank > min(linears[path])]


def check_patterns(config: LoraConfig, paths: Sequence[str]) -> None:
    """Checks that each key of `rank_pattern` and `alpha_pattern` matches a path.

    Raises:
      UserError: a key matches no path.
    """
    for key in config.rank_pattern:
        _require_match("lora.rank_pattern", key, paths, ends_in)
    for key in config.alpha_pattern:
        _require_match("lora.alpha_pattern", key, paths, ends_in)


def spec_of(config: LoraConfig, *paths: str) -> AdapterSpec:
    """Returns the rank, alpha and scale for a module or weight that is known by these paths."""
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
    """Returns the module path, and its path in older versions of transformers if that differs."""
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
