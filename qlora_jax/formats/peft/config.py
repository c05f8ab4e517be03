"""adapter_config.json: what of it is understood, and what is refused because it is not."""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, NotRequired

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError, with_config
from typing_extensions import TypedDict

from qlora_jax.formats.peft.adapter import Replaced
from qlora_jax.lora.patterns import BadPattern, first_match
from qlora_jax.lora.spec import Scaling
from qlora_jax.lora.weights import LoraSet
from qlora_jax.runtime import json_files
from qlora_jax.runtime.errors import UserError

Rank = Annotated[int, Field(ge=1, le=2**20, strict=True)]
Factor = Annotated[float, Field(allow_inf_nan=False, strict=True)]
Flag = Annotated[bool, Field(strict=True)] | None


@with_config(ConfigDict(extra="allow"))
class Settings(TypedDict):
    """Holds the keys of adapter_config.json that are read, by PEFT's names. Others are kept."""

    r: Rank
    lora_alpha: Factor
    target_modules: list[str] | str | None
    rank_pattern: NotRequired[dict[str, Rank] | None]
    alpha_pattern: NotRequired[dict[str, Factor] | None]
    use_rslora: NotRequired[Flag]
    use_dora: NotRequired[Flag]
    lora_dropout: NotRequired[Annotated[float, Field(ge=0, le=1, strict=True)] | None]
    modules_to_save: NotRequired[list[str] | None]
    bias: NotRequired[str]
    base_model_name_or_path: NotRequired[str | None]
    ensure_weight_tying: NotRequired[Flag]


_SETTINGS = TypeAdapter(Settings)

OTHER_FUNCTIONS = (
    "use_qalora",
    "use_bdlora",
    "lora_bias",
    "fan_in_fan_out",
    "layer_replication",
    "trainable_token_indices",
    "target_parameters",
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
    "velora_config",
)
"""Settings of PEFT that, when set, make an adapter compute something that is not LoRA or DoRA."""

PLAIN_INITS = (None, True, False, "gaussian", "orthogonal", "eva")
"""Values of `init_lora_weights` that leave the base weights as they are."""


def read_config(path: Path) -> dict[str, Any]:
    """The settings of an adapter.

    Raises:
      UserError: missing or damaged, or it asks for something that is not LoRA or DoRA.
    """
    config = json_files.read_object(
        path, "export the adapter again", "no such file; an adapter in PEFT's format has one"
    )
    if config.get("peft_type") != "LORA":
        raise UserError(
            f"{path}: peft_type {config.get('peft_type')!r} is not supported; supported: LORA"
        )
    if absent := [key for key in ("r", "lora_alpha", "target_modules") if key not in config]:
        raise UserError(f"{path}: key {absent[0]} is missing")
    if config.get("bias", "none") not in ("none", "all", "lora_only"):
        raise UserError(
            f"{path}: bias {config['bias']!r} is not supported; supported: none, all, lora_only"
        )
    for key in OTHER_FUNCTIONS:
        if config.get(key):
            raise UserError(f"{path}: {key} is set, and only LoRA and DoRA adapters are supported")
    if (init := config.get("init_lora_weights")) not in PLAIN_INITS:
        raise UserError(
            f"{path}: init_lora_weights {init!r} changes the base weights; convert it to a plain "
            "LoRA adapter with PEFT's path_initial_model_for_weight_conversion"
        )
    try:
        checked: Any = _SETTINGS.validate_python(config)
    except ValidationError as e:
        problem = e.errors()[0]
        key = ".".join(map(str, problem["loc"]))
        raise UserError(
            f"{path}: {key} {problem['input']!r:.80}: {problem['msg']}; export the adapter again"
        ) from None
    return checked


def by_pattern(patterns: Mapping[str, Any] | None, path: str, default: Any, where: object) -> Any:
    """Returns what `lora.patterns.first_match` does, for a file's patterns.

    Args:
      patterns: keys and their values.
      path: the module's.
      default: returned if no key matches.
      where: the file and key that the patterns are from, for messages.

    Raises:
      UserError: a key is not a regular expression, or takes too long.
    """
    try:
        return first_match(patterns or {}, path, default)
    except BadPattern as e:
        raise UserError(f"{where}: {e}") from None


def make_config(
    adapters: LoraSet,
    *,
    base_name: str,
    revision: str | None,
    scaling: Scaling,
    dropout: float,
    replaced: Replaced,
) -> dict[str, Any]:
    """The settings with which PEFT loads these adapters; none has rank 0."""
    ranks = {path: adapter.rank for path, adapter in adapters.items()}
    alphas = {
        path: _number(adapter.alpha * (adapter.rank if scaling == "constant" else 1))
        for path, adapter in adapters.items()
    }
    rank, rank_pattern = _common(ranks)
    alpha, alpha_pattern = _common(alphas)
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "revision": revision,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": rank_pattern,
        "alpha_pattern": alpha_pattern,
        "use_rslora": scaling == "alpha/sqrt(r)",
        "use_dora": any(adapter.magnitude is not None for adapter in adapters.values()),
        "target_modules": _targets(adapters),
        "layers_to_transform": None,
        "layers_pattern": None,
        "modules_to_save": list(replaced.modules) or None,
        "ensure_weight_tying": replaced.ties,
        "bias": replaced.bias,
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "lora_dropout": dropout,
    }


def _number(value: float) -> int | float:
    return int(value) if float(value).is_integer() else float(value)


def _common(values: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    common = Counter(values.values()).most_common(1)[0][0]
    return common, {path: value for path, value in values.items() if value != common}


def _targets(paths: Iterable[str]) -> list[str]:
    """Short names if every layer up to the last has all of them, else whole paths.

    PEFT adapts whatever ends in a short name, so these would claim too much in the other case.
    """
    layers: dict[str, set[int]] = defaultdict(set)
    paths = sorted(paths)
    for path in paths:
        found = re.search(r"\.(\d+)\.", path)
        kind = re.sub(r"\.\d+\.", ".*.", path, count=1)
        layers[kind].update([int(found[1])] if found else [])
    last = max((max(indices) for indices in layers.values() if indices), default=-1)
    whole = all(len(indices) in (0, last + 1) for indices in layers.values())
    return sorted({path.rpartition(".")[2] for path in paths}) if whole else paths
