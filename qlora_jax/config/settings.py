"""Lists all settings of a run: one frozen dataclass per section.

The string under a field is its documentation, which `--help` prints.
"""

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field
from pydantic.dataclasses import dataclass
from pydantic_core import PydanticCustomError

STRICT = ConfigDict(extra="forbid", use_attribute_docstrings=True)


def _number(value: Any) -> Any:
    # pydantic would take true for 1
    if isinstance(value, bool):
        raise PydanticCustomError("number_type", "Input should be a number")
    return value


def _sets(value: Any) -> Any:
    # the names become those of figures in metrics.jsonl and TensorBoard
    if isinstance(value, dict):
        if not value:
            raise PydanticCustomError("no_set", "Input should name at least one set")
        if bad := next((name for name in value if not re.fullmatch(r"[\w.-]+", name)), None):
            raise PydanticCustomError(
                "set_name",
                "Name of a set should be of letters, digits, _, - and . alone: {name}",
                {"name": repr(bad)},
            )
    return value


Positive = Annotated[int, BeforeValidator(_number), Field(ge=1)]
NonNegative = Annotated[int, BeforeValidator(_number), Field(ge=0)]
PositiveFloat = Annotated[float, BeforeValidator(_number), Field(gt=0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, BeforeValidator(_number), Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, BeforeValidator(_number), Field(ge=0, lt=1)]
FloatType = Literal["float32", "bfloat16", "float16"]
DEFAULT_STEPS = 200
"""Optimizer steps of a run that gives neither steps nor epochs."""


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
    remat: Literal["auto", "none", "dots", "full", "host"] = "auto"
    """What the backward pass recomputes: nothing, all but products with weights, or whole layers;
    host: whole layers, whose inputs wait in pinned host memory. Attention scores always. auto: the
    first of dots, full and host with which the plan says that the device is large enough."""
    layer_inputs: Literal["exact", "int8"] = "exact"
    """On a GPU, how the layers' inputs wait for the backward pass with remat full and host: as they
    are, or in bitsandbytes' 8 bits in blocks of 256: half the memory, gradients that are close."""


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
    """all-linear, a list of module names, or a regular expression on the whole module path. The
    head (lm_head) and the embedding (embed_tokens) have adapters only if they are named."""
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

    source: str | Annotated[list[str], Field(min_length=1)]
    """A .jsonl, .json, .csv, .tsv, .parquet or .txt file, a hub id, or the built-in python-docs,
    python-source or package-docs; or a list of these: [a.jsonl, b.jsonl, python-docs]."""
    name: str | None = None
    """Configuration name of a hub dataset; of several sources at most one has one."""
    split: str = "train"
    """Split of a hub dataset that is trained on."""
    eval_source: Annotated[str | dict[str, str] | None, AfterValidator(_sets)] = None
    """Held-out examples, or several sets of them: {name: source, ...}, of which the first decides;
    without it eval_fraction of the source is set aside, by text."""
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
    chat_template: str | None = None
    """A Jinja file with a chat template that takes the place of the tokenizer's own."""
    system_prompt: str | None = None
    """System turn put before prompt/completion and chat examples that have none."""
    loss_on: Literal["answer", "all"] = "answer"
    """Train on the assistant's turns alone, or on every token."""
    sequence_length: Positive = 512
    """Tokens per row."""
    packing: bool = True
    """Put several examples into a row, kept apart by segment ids; else one a row, padded."""
    on_bad_record: Literal["drop", "error"] = "drop"
    """A record that cannot be used, such as a malformed line or a turn without a role, is left out
    and counted with its reason, or refused."""
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
    norm_first: bool = False
    """On a GPU with remat full or host, one micro-batch and no float16: find the norm in a backward
    pass of its own, so that a second one can update each layer as soon as it has its gradients."""
    lora_plus_ratio: PositiveFloat = 1.0
    """LoRA+: B's learning rate is this multiple of A's."""
    moments: Literal["float32", "bfloat16", "int8"] = "float32"
    """How both moments are kept; updates compute in float32. int8: bitsandbytes' 8 bits in blocks
    of 256, arrays of fewer than 4096 elements in float32."""
    offload: Literal["auto", "device", "host"] = "auto"
    """Where moments live: host keeps them in pinned host memory and brings them to the device layer
    by layer; auto: on the host where the plan says that the device is too small."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class MeshConfig:
    """The devices of a run; `mesh: none` is one device."""

    data: Positive = 1
    """Groups of devices that hold the same weights; rows of a batch are split over all devices."""
    fsdp: Positive = 1
    """Devices of a group: weights, adapters and moments are split over them."""

    @property
    def devices(self) -> int:
        return self.data * self.fsdp


@dataclass(frozen=True, kw_only=True, config=STRICT)
class TrainConfig:
    """The loop."""

    steps: Positive | None = None
    """Optimizer steps; null: those of train.epochs, or 200 without it."""
    epochs: PositiveFloat | None = None
    """Passes over the training data, instead of steps."""
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
    """Newest checkpoints kept."""
    keep_best: bool = False
    """Keep the checkpoint of the lowest held-out loss too, and export that one, not the last."""
    patience: NonNegative = 0
    """Stop after this many evaluations in a row without a lower held-out loss; 0 never stops."""
    samples: NonNegative = 3
    """Held-out prompts answered before and after training."""
    sample_tokens: Positive = 64
    """Tokens per sample answer, at most."""
    seed: NonNegative = 0
    """Adapters' initial values, order of the data, dropout."""

    @property
    def step_count(self) -> int:
        """Optimizer steps, where `epochs` is not given; a run counts the steps of its epochs."""
        return self.steps or DEFAULT_STEPS


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ModelSettings:
    """What decides how a model is loaded, held and computed."""

    model: ModelConfig
    method: Literal["qlora", "lora", "full"] = "qlora"
    """qlora: 4-bit base and adapters; lora: 16-bit base and adapters; full: every weight."""
    quant: QuantConfig = Field(default_factory=QuantConfig)
    kernels: KernelsConfig = Field(default_factory=KernelsConfig)
    lora: LoraConfig = Field(default_factory=LoraConfig)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Config(ModelSettings):
    """A whole run."""

    data: DataConfig
    output: str
    """Run directory, made by the run."""
    pretrain: PretrainConfig = Field(default_factory=PretrainConfig)
    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig)
    train: TrainConfig = Field(default_factory=TrainConfig)
    mesh: MeshConfig = Field(default_factory=MeshConfig)
