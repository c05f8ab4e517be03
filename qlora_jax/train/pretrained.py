"""Opens a pretrained model with its tokenizer, and loads its weights."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from qlora_jax.config import ModelSettings
from qlora_jax.formats.checkpoint import Checkpoint
from qlora_jax.formats.load import load_model
from qlora_jax.formats.source import open_checkpoint
from qlora_jax.kernels.attention.select import Kind, trusted_attention
from qlora_jax.kernels.select import trusted_kernel
from qlora_jax.lora import LoraSet, ranks_above_full
from qlora_jax.lora.initializers import INITIALIZERS
from qlora_jax.lora.spec import AdapterSpec
from qlora_jax.models.config import DecoderConfig
from qlora_jax.models.decoder import Decoder, attach, use_attention, use_kernel
from qlora_jax.models.weight_shapes import outer_modules
from qlora_jax.quant.codebooks import codebook
from qlora_jax.quant.qtensor import check_block_size
from qlora_jax.runtime import compilation
from qlora_jax.runtime.display import progress
from qlora_jax.runtime.errors import UserError
from qlora_jax.text import tokenizer
from qlora_jax.text.tokenizer import Tokenizer
from qlora_jax.train.initial_values import Splitter, given_values, with_replaced
from qlora_jax.train.quantization import describe_stored
from qlora_jax.train.targets import targets


def open_pretrained(
    settings: ModelSettings, warn: Callable[[str], None], template: str | None = None
) -> tuple[Checkpoint, Tokenizer]:
    """Checks the settings, then opens a model and its tokenizer.

    If the adapter in `lora.from_adapter` replaces tensors of the model, the returned checkpoint
    contains the adapter's tensors in place of its own.

    Args:
      settings: settings of the model.
      warn: function called with lines for the user.
      template: Jinja file with a chat template that replaces the tokenizer's; None for no file.

    Raises:
      UserError: a setting, the checkpoint or the tokenizer cannot be used.
    """
    _check_settings(settings)
    checkpoint = with_replaced(settings, open_checkpoint(settings.model, warn))
    _check_checkpoint(settings, checkpoint)
    text = tokenizer.load_tokenizer(checkpoint.tokenizer_path, warn, template)
    return checkpoint, text.for_embedding(checkpoint.config.vocab_size)


def _check_settings(settings: ModelSettings) -> None:
    """Raises the errors of `open_pretrained` that follow from the settings alone."""
    if settings.method == "qlora":
        check_block_size(settings.quant.block_size)
        codebook(settings.quant.codebook, settings.quant.block_size)
    if settings.method == "lora" and settings.lora.init == "loftq":
        raise UserError(
            "lora.init loftq uses the quantization error, but method lora does not quantize; "
            "give method qlora, or another init"
        )


def _check_checkpoint(settings: ModelSettings, checkpoint: Checkpoint) -> None:
    """Raises the errors of `open_pretrained` that follow from settings and checkpoint shapes."""
    if checkpoint.quantization and settings.method != "qlora":
        raise UserError(
            f"method {settings.method}: {settings.model.path} holds 4-bit weights "
            f"({checkpoint.description}), which only method qlora trains on; set method to qlora, "
            "or give the 16-bit checkpoint"
        )
    if checkpoint.quantization and settings.lora.init in INITIALIZERS:
        raise UserError(
            f"lora.init {settings.lora.init} needs 16-bit weights, but {settings.model.path} holds "
            f"4-bit weights ({checkpoint.description}); give another init or the 16-bit model"
        )
    if settings.method != "full":
        targets(settings.lora, checkpoint.config)


def load_base(
    settings: ModelSettings,
    checkpoint: Checkpoint,
    warn: Callable[[str], None],
    splitter: Splitter | None = None,
    mesh: Mesh | None = None,
) -> Decoder:
    """Loads the weights one tensor at a time, without adapters, and chooses the kernels.

    Args:
      settings: settings of the model.
      checkpoint: source of the weights.
      warn: function called with lines for the user.
      splitter: hook that moves a part of each weight into the initial adapter values; None if
        adapters do not start from the weights.
      mesh: devices over which the weights are split; None for the default device.

    Raises:
      UserError: a weight cannot be quantized.
      RunFailed: a kernel that the settings choose computes wrong results on this device.
    """
    # before loading, because all later programs are compiled while the model is in memory
    compilation.give_memory_back()
    if checkpoint.quantization:
        for line in describe_stored(settings, checkpoint.quantization):
            warn(line)
    model = _load(settings, checkpoint, splitter, mesh)
    device = jax.local_devices()[0]
    use_attention(model, trusted_attention(_attention(settings, model.config), device, warn))
    if settings.method != "full":
        use_kernel(model, trusted_kernel(settings, device, warn))
    return model


def load_adapted(
    settings: ModelSettings,
    checkpoint: Checkpoint,
    warn: Callable[[str], None],
    seed: int,
    mesh: Mesh | None = None,
) -> tuple[Decoder, dict[str, AdapterSpec]]:
    """Loads the weights one tensor at a time, and attaches adapters.

    The adapters are initialized with random values, from the weights (`lora.init`), or from another
    adapter (`lora.from_adapter`).

    Args:
      settings: settings of the model.
      checkpoint: source of the weights.
      warn: function called with lines for the user.
      seed: seed of the adapters' random initial values.
      mesh: devices over which the base is split; None for the default device.

    Raises:
      UserError: an error of `load_base`; `lora.target_modules` matches no module; or the adapter
        is for another model.
      RunFailed: an error of `load_base`.
    """
    lora = settings.lora
    values: LoraSet = given_values(settings, warn)
    specs = targets(lora, checkpoint.config)
    splitter = Splitter(lora, specs) if lora.init in INITIALIZERS else None
    model = load_base(settings, checkpoint, warn, splitter, mesh)
    shapes = model.linears() | outer_modules(model.config)
    if above := ranks_above_full(specs, shapes):
        warn(_describe_ranks(above))
    if splitter is not None:
        splitter.report(warn)
        values = splitter.values
    attach(
        model,
        specs,
        jax.random.key(seed),
        init=lora.init,
        dropout=lora.dropout,
        dtype=jnp.dtype(lora.dtype),
        variant=lora.variant,
        freeze_a=lora.freeze_a,
        values=values,
    )
    return model, specs


def _attention(settings: ModelSettings, decoder: DecoderConfig) -> Kind:
    return Kind(
        dtype=settings.model.compute_dtype,
        head_size=decoder.head_dim,
        group=decoder.num_heads // decoder.num_kv_heads,
        scale=decoder.attention_scale,
        softcap=decoder.attention_softcap,
    )


def _load(
    settings: ModelSettings,
    checkpoint: Checkpoint,
    splitter: Splitter | None,
    mesh: Mesh | None,
) -> Decoder:
    """Reads the weights, and shows the progress."""
    full, quantized = settings.method == "full", settings.method == "qlora"
    with progress(f"loading {settings.model.path}", len(checkpoint.names())) as advance:
        return load_model(
            checkpoint,
            quant=settings.quant if quantized else None,
            dtype=jnp.dtype(settings.lora.dtype if full else settings.model.storage_dtype),
            progress=advance,
            split=splitter,
            mesh=mesh,
        )


def _describe_ranks(above: Sequence[str]) -> str:
    """Returns a warning about linears whose rank is above min(in, out)."""
    kinds = ", ".join(sorted({path.rpartition(".")[2] for path in above}))
    return (
        f"warning: the rank is above min(in, out) of {len(above)} linears ({kinds}), "
        f"first {above[0]}"
    )
