"""Defines all settings of a run, one frozen dataclass per section.

The string under a field is its documentation, which `--help` prints.
"""

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field
from pydantic.dataclasses import dataclass
from pydantic_core import PydanticCustomError

STRICT = ConfigDict(extra="forbid", use_attribute_docstrings=True)


def _number(value: Any) -> Any:
    # pydantic would accept true as 1
    if isinstance(value, bool):
        raise PydanticCustomError("number_type", "Input should be a number")
    return value


def _sets(value: Any) -> Any:
    # the names of the sets are parts of names in metrics.jsonl and TensorBoard
    if isinstance(value, dict):
        if not value:
            raise PydanticCustomError("no_set", "Input should name at least one set")
        if bad := next((name for name in value if not re.fullmatch(r"[\w.-]+", name)), None):
            raise PydanticCustomError(
                "set_name",
                "Name of a set should consist of letters, digits, _, - and . only: {name}",
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
"""Optimizer steps of a run whose config sets neither `steps` nor `epochs`."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ModelConfig:
    """Settings of the pretrained model: source, dtypes of storage and of computation."""

    path: str
    """Hugging Face folder, .gguf file, built-in name (smollm2-135m-instruct), hub id, or
    from-scratch: random weights in the shapes of the section pretrain."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    storage_dtype: FloatType = "bfloat16"
    """Dtype of frozen weights that are not quantized: embeddings, head and norms; with method lora
    all frozen weights. With method full, lora.dtype is the dtype of every weight instead."""
    compute_dtype: FloatType = "bfloat16"
    """Dtype of activations and matrix products; float16 switches on dynamic loss scaling."""
    remat: Literal["auto", "none", "dots", "full", "host"] = "auto"
    """Recomputation in the backward pass; attention scores are always recomputed. none: nothing
    else; dots: all but products with weights; full: whole layers; host: whole layers, with their
    inputs in pinned host memory. auto: the first of dots, full and host that fits on the device,
    by the plan."""
    layer_inputs: Literal["exact", "int8"] = "exact"
    """Storage of the layers' inputs until the backward pass, on a GPU with remat full or host.
    exact: unchanged; int8: bitsandbytes' 8 bits in blocks of 256, which halves the memory and
    changes the gradients slightly."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class PretrainConfig:
    """Shapes of a new llama with tied embeddings; read only with model.path from-scratch."""

    tokenizer: str | None = None
    """Hugging Face folder or .gguf file with the tokenizer; null trains a byte-level BPE of
    vocab_size ids on the training text."""
    vocab_size: Positive = 4096
    """Rows of the embedding."""
    hidden_size: Positive = 256
    """Features of the residual stream."""
    intermediate_size: Positive = 640
    """Features inside the MLP."""
    layers: Positive = 4
    """Number of decoder layers."""
    heads: Positive = 4
    """Attention heads; the number must divide hidden_size."""
    kv_heads: Positive | None = None
    """Heads of keys and values; the number must divide heads. null: the same number as heads."""
    positions: Positive = 512
    """Tokens of the longest sequence."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class QuantConfig:
    """Settings of 4-bit storage of the frozen linears; only method qlora reads them."""

    codebook: str = "nf4"
    """Codebook of the 4-bit codes: nf4, fp4_bnb, fp4_e2m1, fp4_e3m0, int4, af4 or lloyd."""
    block_size: Positive = 64
    """Number of weights that share one scale: a power of two from 32 to 4096."""
    double_quant: bool = True
    """Quantize the scales to 8 bits (double quantization)."""
    nested_block: Positive = 256
    """Number of scales that share one nested scale, with double quantization."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class KernelsConfig:
    """Settings of products with 4-bit weights in training; only method qlora reads them."""

    materialize: Literal["never", "auto"] = "auto"
    """never: 4-bit weights are decoded only inside a GPU kernel, never to memory; auto: a weight is
    decoded to memory, one at a time, if that is faster."""
    implementation: Literal["xla", "triton", "mosaic"] | None = None
    """Implementation of all products; null chooses by device, dtype and rows."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class LoraConfig:
    """Settings of the adapters."""

    variant: Literal["lora", "dora"] = "lora"
    """lora: W + s·B·A; dora: the same, with a trained length of each column."""
    rank: Positive = 16
    """Rank r, the inner dimension of B·A."""
    alpha: PositiveFloat = 32.0
    """Numerator of the scale s; if scaling is constant, s itself."""
    scaling: Literal["alpha/r", "alpha/sqrt(r)", "constant"] = "alpha/r"
    """Formula of the scale s of B·A; constant: s = alpha."""
    target_modules: str | list[str] = "all-linear"
    """all-linear, a list of module names, or a regular expression that matches the whole module
    path. Head (lm_head) and embedding (embed_tokens) get adapters only if they are named."""
    rank_pattern: dict[str, Positive] = Field(default_factory=dict)
    """Module pattern to rank, in place of rank. The pattern is the end of a module path, or a
    regular expression that matches it."""
    alpha_pattern: dict[str, PositiveFloat] = Field(default_factory=dict)
    """Module pattern to alpha, in place of alpha; patterns as in rank_pattern."""
    dropout: Fraction = 0.0
    """Dropout rate on the input of A, in training only."""
    init: Literal["kaiming-uniform", "gaussian", "pissa", "loftq"] = "kaiming-uniform"
    """Initial values. kaiming-uniform, gaussian: distribution of A, and B is zero. pissa: A and B
    from W's largest singular values; the base keeps W - s·B·A. loftq: A and B approximate the
    error of quantization."""
    loftq_iterations: Positive = 5
    """Number of times that loftq alternates between quantization and decomposition."""
    freeze_a: bool = False
    """LoRA-FA: A is not trained, and has no gradient and no moments."""
    from_adapter: str | None = None
    """Folder of an adapter in PEFT's format with which training starts. It gives the values, and
    variant, rank, alpha, scaling, target_modules and patterns; leave these settings out."""
    dtype: FloatType = "float32"
    """Dtype of the adapters; with method full, of every weight."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class DataConfig:
    """Settings of the data: sources of examples, and their conversion into token rows."""

    source: str | Annotated[list[str], Field(min_length=1)]
    """.jsonl, .json, .csv, .tsv, .parquet or .txt file, hub id, or built-in name: python-docs,
    python-source or package-docs; or a list of these: [a.jsonl, b.jsonl, python-docs]."""
    name: str | None = None
    """Configuration name of a hub dataset. At most one of several sources may have one."""
    split: str = "train"
    """Training split of a hub dataset."""
    eval_source: Annotated[str | dict[str, str] | None, AfterValidator(_sets)] = None
    """Source of held-out examples, or several named sets: {name: source, ...}; the loss on the
    first set decides. null holds out eval_fraction of the source, chosen by text."""
    eval_split: str | None = None
    """Held-out split of a hub dataset."""
    eval_fraction: Fraction = 0.05
    """Share of the source that is held out, if there is no eval_source."""
    max_examples: NonNegative = 0
    """Largest number of examples; 0 keeps all."""
    format: Literal["auto", "chat", "prompt", "text"] = "auto"
    """Form of the records. chat: messages; prompt: prompt and completion; text: text; auto: decided
    by the fields of the records."""
    template: Literal["auto", "none"] = "auto"
    """auto: prompt/completion examples use the tokenizer's chat template, if it has one; none:
    prompt and completion are joined unchanged. Chat examples always use the template."""
    chat_template: str | None = None
    """Jinja file with a chat template that replaces the tokenizer's."""
    system_prompt: str | None = None
    """System turn that is added to prompt/completion and chat examples without one."""
    loss_on: Literal["answer", "all"] = "answer"
    """answer: the loss is on the assistant's turns only; all: on every token."""
    sequence_length: Positive = 512
    """Tokens per row."""
    packing: bool = True
    """true: several examples share a row, separated by segment ids; false: one example per row,
    with padding."""
    on_bad_record: Literal["drop", "error"] = "drop"
    """Action for a record that cannot be used, such as a malformed line or a turn without a role.
    drop: leave it out and count it with its reason; error: stop."""
    on_no_target: Literal["drop", "error"] = "drop"
    """Action for an example that has no target token after truncation. drop: leave it out and count
    it; error: stop."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class OptimizerConfig:
    """Settings of AdamW and of its learning-rate schedule."""

    learning_rate: PositiveFloat = 2e-4
    """Largest learning rate of the schedule."""
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    """Learning rate after the warm-up; cosine and linear end at zero."""
    warmup_steps: NonNegative = 0
    """Steps in which the learning rate rises linearly from zero."""
    beta1: Fraction = 0.9
    """Decay rate of the first moment."""
    beta2: Fraction = 0.999
    """Decay rate of the second moment."""
    epsilon: PositiveFloat = 1e-8
    """Constant that is added to the root of the second moment."""
    weight_decay: NonNegativeFloat = 0.0
    """Decoupled weight decay, on matrices only."""
    clip_norm: NonNegativeFloat = 1.0
    """Largest global gradient norm; larger gradients are scaled down. 0 does not clip."""
    norm_first: bool = False
    """Compute the gradient norm in a separate backward pass, so that a second pass can update each
    layer as soon as it has its gradients. Needs a GPU, remat full or host, one micro-batch and no
    float16."""
    lora_plus_ratio: PositiveFloat = 1.0
    """LoRA+: learning rate of B divided by that of A."""
    moments: Literal["float32", "bfloat16", "int8"] = "float32"
    """Storage of both moments; updates compute in float32. int8: bitsandbytes' 8 bits in blocks of
    256; arrays of fewer than 4096 elements stay in float32."""
    offload: Literal["auto", "device", "host"] = "auto"
    """Memory of the moments. host: pinned host memory, copied to the device layer by layer; auto:
    host if they do not fit on the device, by the plan, else device."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class MeshConfig:
    """Settings of the mesh of devices; `mesh: none` is one device."""

    data: Positive = 1
    """Number of groups of devices. Each group holds all weights; the rows of a batch are split over
    all devices."""
    fsdp: Positive = 1
    """Number of devices in a group. Weights, adapters and moments are split over them."""

    @property
    def devices(self) -> int:
        return self.data * self.fsdp


@dataclass(frozen=True, kw_only=True, config=STRICT)
class TrainConfig:
    """Settings of the training loop."""

    steps: Positive | None = None
    """Optimizer steps; null: as many as train.epochs needs, or 200 without train.epochs."""
    epochs: PositiveFloat | None = None
    """Passes over the training data; give this or steps."""
    batch_size: Positive = 4
    """Rows in a micro-batch."""
    gradient_accumulation: Positive = 1
    """Micro-batches in an optimizer step."""
    eval_every: NonNegative = 50
    """Steps between evaluations on the held-out data; 0 evaluates only at the start and the end."""
    eval_rows: Positive = 64
    """Largest number of held-out token rows in an evaluation; all evaluations use the same rows."""
    save_every: NonNegative = 50
    """Steps between checkpoints; 0 saves only at the end."""
    keep: Positive = 2
    """Number of newest checkpoints that are kept."""
    keep_best: bool = False
    """Also keep the checkpoint with the lowest held-out loss, and export it instead of the last."""
    patience: NonNegative = 0
    """Number of evaluations in a row without a lower held-out loss after which the run stops; 0
    never stops."""
    samples: NonNegative = 3
    """Number of held-out prompts that the model answers before and after training."""
    sample_tokens: Positive = 64
    """Largest number of tokens in such an answer."""
    seed: NonNegative = 0
    """Seed of the adapters' initial values, the order of the data and dropout."""

    @property
    def step_count(self) -> int:
        """Returns the optimizer steps if `epochs` is not given; a run counts those of `epochs`."""
        return self.steps or DEFAULT_STEPS


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ModelSettings:
    """Settings that decide how a model is loaded, stored and computed."""

    model: ModelConfig
    method: Literal["qlora", "lora", "full"] = "qlora"
    """Training method. qlora: adapters on a 4-bit base; lora: adapters on a 16-bit base; full:
    every weight."""
    quant: QuantConfig = Field(default_factory=QuantConfig)
    kernels: KernelsConfig = Field(default_factory=KernelsConfig)
    lora: LoraConfig = Field(default_factory=LoraConfig)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Config(ModelSettings):
    """All settings of a run."""

    data: DataConfig
    output: str
    """Run directory, which the run creates."""
    pretrain: PretrainConfig = Field(default_factory=PretrainConfig)
    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig)
    train: TrainConfig = Field(default_factory=TrainConfig)
    mesh: MeshConfig = Field(default_factory=MeshConfig)
