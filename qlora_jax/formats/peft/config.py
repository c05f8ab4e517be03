"""Reads and makes adapter_config.json, and refuses settings that are not supported."""

from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError, with_config
from typing_extensions import TypedDict

from qlora_jax.formats import contents
from qlora_jax.formats.peft.adapter import Replaced
from qlora_jax.formats.peft.targets import Targets, short_names
from qlora_jax.lora.patterns import BadPattern, first_match
from qlora_jax.lora.spec import Scaling
from qlora_jax.lora.weights import LoraSet
from qlora_jax.models.families import EMBEDDINGS
from qlora_jax.runtime import json_files, paths
from qlora_jax.runtime.errors import UserError

Rank = Annotated[int, Field(ge=1, le=2**20, strict=True)]
Factor = Annotated[float, Field(allow_inf_nan=False, strict=True)]
Flag = Annotated[bool, Field(strict=True)] | None
Text = Annotated[str, Field(strict=True)]
Texts = list[Text] | Text | None
Index = Annotated[int, Field(ge=0, strict=True)]


@with_config(ConfigDict(extra="allow"))
class AdapterConfigJson(TypedDict):
    """The keys of adapter_config.json that are read, by PEFT's names. Other keys are kept."""

    r: Rank
    lora_alpha: Factor
    target_modules: Annotated[list[Text], Field(min_length=1)] | Text
    exclude_modules: NotRequired[Texts]
    layers_to_transform: NotRequired[list[Index] | Index | None]
    layers_pattern: NotRequired[Texts]
    rank_pattern: NotRequired[dict[Text, Rank] | None]
    alpha_pattern: NotRequired[dict[Text, Factor] | None]
    use_rslora: NotRequired[Flag]
    use_dora: NotRequired[Flag]
    lora_dropout: NotRequired[Annotated[float, Field(ge=0, le=1, strict=True)] | None]
    modules_to_save: NotRequired[list[Text] | None]
    bias: NotRequired[Literal["none", "all", "lora_only"]]
    base_model_name_or_path: NotRequired[Text | None]
    ensure_weight_tying: NotRequired[Flag]


_SETTINGS = TypeAdapter(AdapterConfigJson)

OTHER_FUNCTIONS = (
    "use_bdlora",
    "lora_bias",
    "layer_replication",
    "trainable_token_indices",
    "target_parameters",
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
    "velora_config",
    "megatron_config",
)
"""Settings of PEFT with which an adapter computes something other than LoRA or DoRA."""

NO_EFFECT = (
    "peft_type",
    "task_type",
    "auto_mapping",
    "peft_version",
    "revision",
    "inference_mode",
    "fan_in_fan_out",  # PEFT sets this to false for a linear
    "init_lora_weights",
    "megatron_core",
    "loftq_config",
    "eva_config",
    "corda_config",
    "lora_ga_config",
    "use_qalora",  # changes only GPTQ linears, which are not supported
    "qalora_group_size",
    "runtime_config",
    "unsloth_fixed",
)
"""Settings that do not change what a stored adapter computes. `init_lora_weights` has a check."""

PLAIN_INITS = (None, True, False, "gaussian", "orthogonal", "eva", "lora_ga", "mica")
"""Values of `init_lora_weights` with which PEFT loads an adapter without changing the base."""


def read_config(path: Path) -> dict[str, Any]:
    """Reads and checks the settings of an adapter.

    Raises:
      UserError: the file is missing or damaged, a value has a wrong type, or a setting needs
        something other than LoRA or DoRA.
    """
    if not paths.is_file(path):
        raise contents.not_an_adapter(path.parent, path.name)
    config = json_files.read_object(path, "export the adapter again")
    if config.get("peft_type") != "LORA":
        raise UserError(
            f"{path}: peft_type {config.get('peft_type')!r} is not supported; supported: LORA"
        )
    for key in OTHER_FUNCTIONS:
        if config.get(key):
            raise UserError(
                f"{path}: {key} is set, and only LoRA and DoRA adapters are supported; "
                "merge the adapter into its base with PEFT"
            )
    init = config.get("init_lora_weights")
    if not isinstance(init, bool | str | None) or init not in PLAIN_INITS:
        raise UserError(
            f"{path}: init_lora_weights {init!r} changes the base weights; convert it to a plain "
            "LoRA adapter with PEFT's path_initial_model_for_weight_conversion"
        )
    try:
        checked: Any = _SETTINGS.validate_python(config)
    except ValidationError as e:
        problem = e.errors()[0]
        if problem["type"] == "missing":
            raise UserError(
                f"{path}: key {problem['loc'][0]} is missing; export the adapter again"
            ) from None
        key = ".".join(map(str, problem["loc"]))
        raise UserError(
            f"{path}: {key} {problem['input']!r:.80}: {problem['msg']}; export the adapter again"
        ) from None
    _check_unknown(config, path)
    return checked


def _check_unknown(config: Mapping[str, Any], path: Path) -> None:
    """Raises UserError for an unknown setting that is switched on.

    An unknown setting whose value is a number does not count as switched on.
    """
    known = {*AdapterConfigJson.__annotations__, *OTHER_FUNCTIONS, *NO_EFFECT}
    for key, value in config.items():
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if key not in known and value and not number:
            raise UserError(
                f"{path}: {key} {value!r:.80} is not known, and may change what the adapter "
                "computes; if it does not, remove this key"
            )


def targets_of(config: Mapping[str, Any]) -> Targets:
    """Returns the settings that choose the modules, from the result of `read_config`."""

    def listed(key: str) -> Any:
        value = config.get(key)
        return () if value is None else (value,) if isinstance(value, int | str) else value

    excluded = config.get("exclude_modules")
    return Targets(
        target_modules=config["target_modules"],
        exclude_modules=excluded if isinstance(excluded, str) else listed("exclude_modules"),
        layers_to_transform=listed("layers_to_transform"),
        layers_pattern=listed("layers_pattern"),
        modules_to_save=listed("modules_to_save"),
    )


def by_pattern(patterns: Mapping[str, Any] | None, path: str, default: Any, where: object) -> Any:
    """Returns the value of the first pattern that matches a module's path (`lora.patterns`).

    Args:
      patterns: pattern to value.
      path: path of the module.
      default: value if no pattern matches.
      where: file and key of the patterns, for messages.

    Raises:
      UserError: a pattern is not a regular expression, or takes too long.
    """
    try:
        return first_match(patterns or {}, [path], default)
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
    modules: Collection[str] | None,
) -> dict[str, Any]:
    """Returns the content of an adapter_config.json with which PEFT loads these adapters.

    Args:
      adapters: module path to adapter; every rank is above 0.
      base_name: name or path of the base model.
      revision: revision of the base model on the hub; None without one.
      scaling: formula of the scale from alpha and rank.
      dropout: dropout rate, for further training.
      replaced: parameters of the base that belong to the adapters.
      modules: paths of all modules of the model that PEFT can adapt; None: not known, so
        `target_modules` lists every adapted path.
    """
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
        "target_modules": short_names(adapters, modules) if modules else sorted(adapters),
        "layers_to_transform": None,
        "layers_pattern": None,
        "modules_to_save": list(replaced.modules) or None,
        # An embedding's adapter and a head's adapter may differ, so PEFT must not tie them.
        "ensure_weight_tying": replaced.ties and not adapters.keys() & EMBEDDINGS,
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
