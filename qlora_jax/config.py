"""The configuration of a run: one frozen dataclass per section, filled from YAML and `--a.b=c`.

This file is the whole list of settings; the string under a field is its documentation, which
`--help` prints.
"""

import dataclasses
import difflib
import hashlib
import json
import re
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass
from pydantic_core import PydanticCustomError
from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError

from qlora_jax import paths
from qlora_jax.errors import UserError

STRICT = ConfigDict(extra="forbid", use_attribute_docstrings=True)


def _number(value: Any) -> Any:
    # pydantic would take true for 1
    if isinstance(value, bool):
        raise PydanticCustomError("number_type", "Input should be a number")
    return value


Positive = Annotated[int, BeforeValidator(_number), Field(ge=1)]
NonNegative = Annotated[int, BeforeValidator(_number), Field(ge=0)]
PositiveFloat = Annotated[float, BeforeValidator(_number), Field(gt=0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, BeforeValidator(_number), Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, BeforeValidator(_number), Field(ge=0, lt=1)]
FloatType = Literal["float32", "bfloat16", "float16"]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ModelConfig:
    """Which pretrained model, and in which dtypes it is held and computed."""

    path: str
    """A Hugging Face folder, a .gguf file, a built-in name (smollm2-135m-instruct), a hub id, or
    from-scratch: random values in the shapes of the pretrain section."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    storage_dtype: FloatType = "bfloat16"
    """Frozen weights that are not quantized: embeddings, head, norms; all of them for method lora.
    Under method full every weight is held in lora.dtype."""
    compute_dtype: FloatType = "bfloat16"
    """Activations and matrix products; float16 switches dynamic loss scaling on."""
    remat: Literal["none", "dots", "full", "host"] = "dots"
    """What the backward pass recomputes: nothing, all but products with weights, or whole layers;
    host: whole layers, whose inputs wait in pinned host memory. Attention scores always."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class PretrainConfig:
    """The llama that model.path from-scratch stands for; read with that alone. Embeddings are tied
    and have vocab_size rows."""

    tokenizer: str | None = None
    """A Hugging Face folder or .gguf file to take the tokenizer of; null trains a byte-level BPE
    of vocab_size ids on the training text."""
    vocab_size: Positive = 4096
    """Rows of the embedding."""
    hidden_size: Positive = 256
    """Width of the residual stream."""
    intermediate_size: Positive = 640
    """Width inside the MLP."""
    layers: Positive = 4
    """Number of decoder layers."""
    heads: Positive = 4
    """Attention heads; they divide hidden_size."""
    kv_heads: Positive | None = None
    """Heads of keys and values, which divide heads; null: as many."""
    positions: Positive = 512
    """Longest sequence."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class QuantConfig:
    """4-bit storage of the frozen linears; read by method qlora only."""

    codebook: str = "nf4"
    """nf4, fp4_bnb, fp4_e2m1, fp4_e3m0, int4, af4 or lloyd."""
    block_size: Positive = 64
    """Weights that share one scale: a power of two from 32 to 4096."""
    double_quant: bool = True
    """Quantize the scales themselves to 8 bits."""
    nested_block: Positive = 256
    """Scales that share one scale of scales."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class KernelsConfig:
    """How training multiplies by 4-bit weights; read by method qlora only."""

    materialize: Literal["never", "auto"] = "auto"
    """never: no 4-bit weight is ever decoded to memory, only within a GPU kernel; auto: where that
    is quicker it is, one at a time."""
    implementation: Literal["xla", "triton", "mosaic"] | None = None
    """Always this one; null picks by device, dtype and rows."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class LoraConfig:
    """The adapters."""

    variant: Literal["lora", "dora"] = "lora"
    """lora: W + s·B·A; dora: that with a trained length for each of its columns."""
    rank: Positive = 16
    """r, the inner dimension of B·A."""
    alpha: PositiveFloat = 32.0
    """Numerator of the scaling; the factor itself when scaling is constant."""
    scaling: Literal["alpha/r", "alpha/sqrt(r)", "constant"] = "alpha/r"
    """How alpha becomes the factor on B·A."""
    target_modules: str | list[str] = "all-linear"
    """all-linear, a list of module names, or a regular expression on the whole module path."""
    rank_pattern: dict[str, Positive] = Field(default_factory=dict)
    """Another rank for modules whose path ends in, or matches, the key."""
    alpha_pattern: dict[str, PositiveFloat] = Field(default_factory=dict)
    """Another alpha, likewise."""
    dropout: Fraction = 0.0
    """On the input of A, in training only."""
    init: Literal["kaiming-uniform", "gaussian", "pissa", "loftq"] = "kaiming-uniform"
    """Distribution of A, with B at zero; pissa: both from W's largest singular values, the base
    keeps the rest; loftq: both from what quantizing loses."""
    loftq_iterations: Positive = 5
    """How often loftq alternates between quantizing and decomposing."""
    freeze_a: bool = False
    """LoRA-FA: A stays as it is, without gradient and moments."""
    from_adapter: str | None = None
    """Folder of an adapter in PEFT's format to go on from: it gives the values, and variant, rank,
    alpha, scaling, target_modules and patterns, which are left at their defaults here."""
    dtype: FloatType = "float32"
    """Adapters; under method full, every weight."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class DataConfig:
    """Where examples come from and how they become token rows."""

    source: str
    """A .jsonl, .json, .csv, .parquet or .txt file, a hub id, or the built-in python-docs,
    python-source or package-docs; several of those with a + between."""
    name: str | None = None
    """Configuration name of a hub dataset."""
    split: str = "train"
    """Split of a hub dataset that is trained on."""
    eval_source: str | None = None
    """Held-out examples; without it eval_fraction of the source is set aside, by text."""
    eval_split: str | None = None
    """Held-out split of a hub dataset."""
    eval_fraction: Fraction = 0.05
    """Share of the source held out."""
    max_examples: NonNegative = 0
    """Keep at most this many examples; 0 keeps all."""
    format: Literal["auto", "chat", "prompt", "text"] = "auto"
    """chat: messages; prompt: prompt and completion; text: text. auto decides by the fields."""
    template: Literal["auto", "none"] = "auto"
    """auto: prompt/completion examples go through the tokenizer's chat template, if it has one;
    none: prompt and completion are joined as they are. Chat examples always use the template."""
    system_prompt: str | None = None
    """System turn put before prompt/completion and chat examples that have none."""
    loss_on: Literal["answer", "all"] = "answer"
    """Train on the assistant's turns alone, or on every token."""
    sequence_length: Positive = 512
    """Tokens per row."""
    packing: bool = True
    """Put several examples into a row, kept apart by segment ids; else one a row, padded."""
    on_no_target: Literal["drop", "error"] = "drop"
    """An example with no target left after truncation is dropped and counted, or refused."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class OptimizerConfig:
    """AdamW and its schedule."""

    learning_rate: PositiveFloat = 2e-4
    """Peak rate."""
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    """What follows the warm-up; cosine and linear end at zero."""
    warmup_steps: NonNegative = 0
    """Linear warm-up from zero."""
    beta1: Fraction = 0.9
    """Decay of the first moment."""
    beta2: Fraction = 0.999
    """Decay of the second moment."""
    epsilon: PositiveFloat = 1e-8
    """Added to the root of the second moment."""
    weight_decay: NonNegativeFloat = 0.0
    """Decoupled, on matrices only."""
    clip_norm: NonNegativeFloat = 1.0
    """Largest global gradient norm; 0 does not clip."""
    lora_plus_ratio: PositiveFloat = 1.0
    """LoRA+: B's learning rate is this multiple of A's."""
    moments: Literal["float32", "bfloat16", "int8"] = "float32"
    """How both moments are kept; updates compute in float32. int8: bitsandbytes' 8 bits in blocks
    of 256, arrays of fewer than 4096 elements in float32."""
    offload: Literal["auto", "device", "host"] = "auto"
    """Where moments live: host keeps them in pinned host memory and brings them to the device layer
    by layer; auto: on the host where the plan says that the device is too small."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class TrainConfig:
    """The loop."""

    steps: Positive = 200
    """Optimizer steps."""
    batch_size: Positive = 4
    """Rows per micro-batch."""
    gradient_accumulation: Positive = 1
    """Micro-batches per step."""
    eval_every: NonNegative = 50
    """Steps between evaluations on the held-out split; 0 evaluates at the start and end only."""
    eval_rows: Positive = 64
    """Held-out token rows per evaluation, at most; always the same ones."""
    save_every: NonNegative = 50
    """Steps between checkpoints; 0 saves at the end only."""
    keep: Positive = 2
    """Checkpoints kept."""
    samples: NonNegative = 3
    """Held-out prompts answered before and after training."""
    sample_tokens: Positive = 64
    """Tokens per sample answer, at most."""
    seed: NonNegative = 0
    """Adapters' initial values, order of the data, dropout."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Config:
    """A whole run."""

    model: ModelConfig
    data: DataConfig
    output: str
    """Run directory, made by the run."""
    method: Literal["qlora", "lora", "full"] = "qlora"
    """qlora: 4-bit base and adapters; lora: 16-bit base and adapters; full: every weight."""
    pretrain: PretrainConfig = Field(default_factory=PretrainConfig)
    quant: QuantConfig = Field(default_factory=QuantConfig)
    kernels: KernelsConfig = Field(default_factory=KernelsConfig)
    lora: LoraConfig = Field(default_factory=LoraConfig)
    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig)
    train: TrainConfig = Field(default_factory=TrainConfig)


@dataclasses.dataclass(frozen=True)
class Setting:
    """One leaf of the schema: what `--help` prints about it."""

    key: str
    type: str
    doc: str
    default: str


_ADAPTER: TypeAdapter[Config] = TypeAdapter(Config)
SURROGATES = re.compile("[\ud800-\udfff]")
"""Stand for bytes of a name that are no UTF-8."""


def load(path: str | Path, overrides: Mapping[str, str] | None = None) -> Config:
    """Reads a YAML file and lays dotted overrides over it.

    Args:
      path: the YAML file. A section given as one word fills its first field: `model: a.gguf`
        means `model: {path: a.gguf}`, `data: my.jsonl` means `data: {source: my.jsonl}`.
      overrides: dotted key to its value, e.g. `{"lora.rank": "8"}`: the text itself where the
        setting is text, with null or nothing for none, else YAML. One that is for a section, such
        as `{"model": "a.gguf"}`, keeps the section's other settings.

    Raises:
      UserError: missing or malformed file, unknown key (the nearest one is named), wrong type.
    """
    path = Path(path)
    try:
        tree = _read_yaml(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        raise UserError(f"{path}: no such config file") from None
    except OSError as e:
        raise paths.unreadable(path, e) from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: not a text file; a config is YAML") from None
    except MarkedYAMLError as e:
        line = e.problem_mark.line + 1 if e.problem_mark else "?"
        raise UserError(f"{path}:{line}: not valid YAML: {e.problem}") from None
    except (YAMLError, ValueError) as e:
        raise UserError(f"{path}: not valid YAML: {str(e).splitlines()[0]}") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path}: a config is a mapping with the keys {', '.join(_names(Config))}")
    tree = _expand(tree)
    for key, text in (overrides or {}).items():
        _override(tree, key, text)
    return from_tree(tree, str(path))


def from_tree(tree: Mapping[str, Any], where: str) -> Config:
    """Builds a Config from plain nested dicts.

    Raises:
      UserError: naming `where`, the key and what is wrong with its value.
    """
    try:
        config = _ADAPTER.validate_python(dict(tree))
    except ValidationError as e:
        raise UserError(f"{where}: {_explain(e)}") from None
    for key, value in _flatten(to_tree(config)):
        if SURROGATES.search(json.dumps(value, ensure_ascii=False)):
            raise UserError(
                f"{where}: {key} {value!r} is no UTF-8 text, and so cannot be recorded; rename it"
            )
    return config


def changed(config: Config, overrides: Mapping[str, str]) -> Config:
    """The config with dotted overrides laid over it.

    Raises:
      UserError: an unknown key or a value of the wrong type.
    """
    tree = to_tree(config)
    for key, text in overrides.items():
        _override(tree, key, text)
    return from_tree(tree, "the command line")


def to_tree(config: Config) -> dict[str, Any]:
    """The config as plain nested dicts, every default written out."""
    return dataclasses.asdict(config)


def dump(config: Config, path: Path) -> None:
    """Writes the config as YAML."""
    with path.open("w", encoding="utf-8") as f:
        writer = YAML()
        writer.default_flow_style = False
        writer.allow_unicode = False  # U+0085 would be written as it is and read back as a space
        writer.dump(to_tree(config), f)


def digest(config: Config) -> str:
    """SHA-256 of the config's values, as hex."""
    return hashlib.sha256(json.dumps(to_tree(config), sort_keys=True).encode()).hexdigest()


def difference(a: Config, b: Config) -> list[str]:
    """The settings in which two configs differ, as `key: value in a → value in b`."""
    left, right = dict(_flatten(to_tree(a))), dict(_flatten(to_tree(b)))
    return [
        f"{k}: {left.get(k)} → {right.get(k)}"
        for k in sorted(left.keys() | right.keys())
        if left.get(k) != right.get(k)
    ]


def settings(cls: type = Config, prefix: str = "") -> Iterator[Setting]:
    """Every leaf of the schema with its type, default and documentation."""
    for name, info in cls.__pydantic_fields__.items():  # type: ignore[attr-defined]
        if dataclasses.is_dataclass(info.annotation):
            yield from settings(typing.cast(type, info.annotation), f"{prefix}{name}.")
        else:
            default = (
                "required"
                if info.is_required()
                else str(info.get_default(call_default_factory=True))
            )
            doc = " ".join((info.description or "").split())
            yield Setting(prefix + name, _type_name(info.annotation), doc, default)


def _names(cls: type) -> list[str]:
    return [f.name for f in dataclasses.fields(cls)]


def _sections() -> dict[str, type]:
    return {f.name: f.type for f in dataclasses.fields(Config) if dataclasses.is_dataclass(f.type)}  # type: ignore[misc]


def _expand(tree: dict[str, Any]) -> dict[str, Any]:
    sections = _sections()
    return {
        key: {_names(sections[key])[0]: value}
        if key in sections and isinstance(value, str)
        else value
        for key, value in tree.items()
    }


def _override(tree: dict[str, Any], key: str, text: str) -> None:
    kinds = {s.key: s.type for s in settings()}
    if key in _sections():
        _override_section(tree, key, text, kinds)
        return
    *parents, last = _steps(key, kinds)
    for name in parents:
        node = tree.setdefault(name, {})
        if not isinstance(node, dict):
            raise UserError(f"--{key}: {name} is a single value, {node!r}, and has no keys")
        tree = node
    tree[last] = _value(text, kinds.get(key, ""))


def _override_section(
    tree: dict[str, Any], section: str, text: str, kinds: Mapping[str, str]
) -> None:
    value = _parse(text)
    if not isinstance(value, dict):
        first = f"{section}.{_names(_sections()[section])[0]}"
        value = text if kinds[first] == "str" else value
    value, before = _expand({section: value})[section], tree.get(section)
    both = isinstance(value, dict) and isinstance(before, dict)
    tree[section] = before | value if both else value


def _steps(key: str, kinds: Mapping[str, str]) -> list[str]:
    # The keys of a mapping are module paths, which have dots of their own.
    for name, kind in kinds.items():
        if kind.startswith("dict") and key.startswith(f"{name}."):
            return [*name.split("."), key.removeprefix(f"{name}.")]
    return key.split(".")


def _value(text: str, kind: str) -> Any:
    kinds = kind.split(" | ")
    if "str" not in kinds:
        return _parse(text)
    if text in ("", "null") and "null" in kinds:
        return None
    if "list[str]" in kinds and isinstance(value := _parse(text), list):
        return value
    return text


def _read_yaml(text: str) -> Any:
    """Parses YAML of plain values; raises YAMLError, or ValueError for the 45th of May."""
    try:
        return YAML(typ="safe").load(text)
    except RecursionError:
        raise YAMLError("nested too deeply") from None


def _parse(text: str) -> Any:
    try:
        return _read_yaml(text)
    except (YAMLError, ValueError):
        return text


def _explain(error: ValidationError) -> str:
    problems = error.errors()
    unknown = [
        p for p in problems if p["type"] in ("unexpected_keyword_argument", "extra_forbidden")
    ]
    problem = (unknown or problems)[0]
    location = [str(x) for x in problem["loc"]]
    key = ".".join(location)
    if unknown:
        return f"unknown key {key}; the nearest known one is {nearest(key)}"
    if problem["type"] in ("missing", "missing_argument", "missing_keyword_only_argument"):
        return f"{key} is missing; add it to the file or give --{key}=..."
    schema = {s.key: s for s in settings()}
    key = next(
        (
            ".".join(location[:n])
            for n in range(len(location), 0, -1)
            if ".".join(location[:n]) in schema
        ),
        key,
    )
    expected = f" (expected: {schema[key].type})" if key in schema else ""
    message = problem["msg"][0].lower() + problem["msg"][1:]
    return f"{key}: {message}, not {problem['input']!r}{expected}"


def is_known(key: str) -> bool:
    """Whether a dotted key is a setting, a section, or an entry of a setting that is a mapping."""
    schema = {s.key: s.type for s in settings()}
    return (
        key in schema
        or key in _sections()
        or any(key.startswith(f"{k}.") for k, kind in schema.items() if kind.startswith("dict"))
    )


def nearest(key: str, more: Sequence[str] = ()) -> str:
    """The setting, section or name in `more` that a mistyped key most resembles."""
    known = [s.key for s in settings()] + list(_sections()) + list(more)

    def likeness(other: str) -> tuple[float, float]:
        whole = difflib.SequenceMatcher(None, key, other).ratio()
        last = difflib.SequenceMatcher(None, key.split(".")[-1], other.split(".")[-1]).ratio()
        return max(whole, last), whole

    return max(known, key=likeness)


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping) and f"{prefix}{key}" in _sections():
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _type_name(annotation: Any) -> str:
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        return _type_name(args[0])
    if origin is Literal:
        return " | ".join(str(a) for a in args)
    if origin in (types.UnionType, typing.Union):
        return " | ".join("null" if a is type(None) else _type_name(a) for a in args)
    if origin is not None:
        return f"{origin.__name__}[{', '.join(_type_name(a) for a in args)}]"
    return getattr(annotation, "__name__", str(annotation))


def parse_overrides(arguments: Sequence[str]) -> dict[str, str]:
    """Turns `["--lora.rank=8", "--train.steps", "50"]` into `{"lora.rank": "8", ...}`.

    Raises:
      UserError: an argument that is not of that form, or a value that is missing.
    """
    overrides: dict[str, str] = {}
    rest = list(arguments)
    while rest:
        argument = rest.pop(0)
        if not argument.startswith("--"):
            raise UserError(
                f"unexpected argument {argument!r}; settings are given as --section.key=value"
            )
        key, equals, value = argument[2:].partition("=")
        if not equals:
            if not rest:
                raise UserError(f"--{key} has no value; write --{key}=VALUE")
            value = rest.pop(0)
        overrides[key] = value
    return overrides
