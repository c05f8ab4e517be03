"""From a config to its model: opened with its tokenizer, then loaded."""

from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp

from qlora_jax.config import Config
from qlora_jax.data import sources
from qlora_jax.formats import fresh
from qlora_jax.formats.checkpoint import Checkpoint
from qlora_jax.formats.load import load
from qlora_jax.formats.source import open_checkpoint
from qlora_jax.kernels.attention.select import Kind, trusted_attention
from qlora_jax.kernels.select import trusted_kernel
from qlora_jax.lora import LoraSet, ranks_above_full
from qlora_jax.lora.spec import AdapterSpec
from qlora_jax.lora.starts import STARTS
from qlora_jax.models.config import DecoderConfig
from qlora_jax.models.decoder import Decoder, attach, use_attention, use_kernel
from qlora_jax.models.parts import outer_modules
from qlora_jax.quant.codebooks import codebook
from qlora_jax.quant.qtensor import check_block_size
from qlora_jax.runtime import compilation
from qlora_jax.runtime.errors import UserError
from qlora_jax.text import tokenizer
from qlora_jax.text.bpe import train_bpe
from qlora_jax.text.tokenizer import Tokenizer
from qlora_jax.train.display import progress
from qlora_jax.train.quantization import describe_stored
from qlora_jax.train.start import Splitter, given_values, with_replaced
from qlora_jax.train.targets import targets


def open_model(
    config: Config, warn: Callable[[str], None] = lambda line: None
) -> tuple[Checkpoint, Tokenizer]:
    """Opens the model and its tokenizer, after all that can be checked before.

    Where the config names an adapter to go on from, the tensors that it replaces are replaced.

    Args:
      config: of the run.
      warn: called with lines for the user.

    Raises:
      UserError: a setting, the checkpoint or the tokenizer cannot be used.
    """
    _check_settings(config)
    scratch = config.model.path == fresh.NAME
    checkpoint = _fresh(config) if scratch else open_checkpoint(config.model, warn)
    checkpoint = with_replaced(config, checkpoint)
    _check_checkpoint(config, checkpoint)
    template = config.data.chat_template
    if scratch:
        text = _own_tokenizer(config)
    else:
        text = tokenizer.load(checkpoint.tokenizer_path, warn, template)
    return checkpoint, text.for_embedding(checkpoint.config.vocab_size)


def _check_settings(config: Config) -> None:
    """Raises `open_model`'s errors that show in the config alone."""
    if config.method == "qlora":
        check_block_size(config.quant.block_size)
        codebook(config.quant.codebook, config.quant.block_size)
    if config.method == "lora" and config.lora.init == "loftq":
        raise UserError(
            "lora.init loftq starts from what quantizing loses, and method lora does not quantize; "
            "give method qlora, or another init"
        )


def _check_checkpoint(config: Config, checkpoint: Checkpoint) -> None:
    """Raises `open_model`'s errors that show in the config and the checkpoint's shapes."""
    if checkpoint.quantization and config.method != "qlora":
        raise UserError(
            f"method {config.method}: {config.model.path} holds 4-bit weights "
            f"({checkpoint.description}), which only method qlora trains on; set method to qlora, "
            "or give the 16-bit checkpoint"
        )
    if checkpoint.quantization and config.lora.init in STARTS:
        raise UserError(
            f"lora.init {config.lora.init} starts from 16-bit weights, and {config.model.path} "
            f"holds 4-bit ones ({checkpoint.description}); give another init or the 16-bit model"
        )
    longest = checkpoint.config.longest
    if config.data.sequence_length > longest:
        raise UserError(
            f"data.sequence_length {config.data.sequence_length} is beyond the {longest} positions "
            f"of {config.model.path}; give {longest} or less"
        )
    if config.method != "full":
        targets(config.lora, checkpoint.config)


def _fresh(config: Config) -> Checkpoint:
    if config.method != "full":
        raise UserError(
            f"method {config.method}: a model {fresh.NAME} has nothing to freeze; set it to full"
        )
    return fresh.FreshCheckpoint(fresh.shapes(config.pretrain), config.train.seed)


def _own_tokenizer(config: Config) -> Tokenizer:
    """The tokenizer that the `pretrain` section names, or one trained on the training text."""
    pretrain = config.pretrain
    if pretrain.tokenizer is not None:
        text = tokenizer.load(
            Path(pretrain.tokenizer).expanduser(), template=config.data.chat_template
        )
        if text.vocab_size > pretrain.vocab_size:
            raise UserError(
                f"pretrain.vocab_size {pretrain.vocab_size}: {text.source} has ids up to "
                f"{text.vocab_size - 1}; give {text.vocab_size} or more"
            )
        return text
    texts = (record.key for record in sources.read(config.data).train)
    return train_bpe(texts, pretrain.vocab_size, fresh.NAME, config.data.chat_template)


def load_model(
    config: Config, checkpoint: Checkpoint, warn: Callable[[str], None]
) -> tuple[Decoder, dict[str, AdapterSpec]]:
    """Loads the weights, streamed, and attaches adapters unless every weight is trained.

    Adapters are fresh, or start from the weights (`lora.init`) or another adapter
    (`lora.from_adapter`).

    Raises:
      UserError: weights that cannot be quantized, targets that match nothing, or an adapter that
        is for another model.
      RunFailed: a kernel that the config asks for is wrong on this device.
    """
    # here, since every program that follows is compiled beside the model
    compilation.give_memory_back()
    full, lora = config.method == "full", config.lora
    if checkpoint.quantization:
        for line in describe_stored(config, checkpoint.quantization):
            warn(line)
    values: LoraSet = {}
    specs: dict[str, AdapterSpec] = {}
    splitter = None
    if not full:
        values = given_values(config, warn)
        specs = targets(lora, checkpoint.config)
        splitter = Splitter(lora, specs) if lora.init in STARTS else None
    model = _load(config, checkpoint, splitter)
    device = jax.devices()[0]
    use_attention(model, trusted_attention(_attention(config, model.config), device, warn))
    if full:
        return model, {}
    use_kernel(model, trusted_kernel(config, device, warn))
    shapes = model.linears() | outer_modules(model.config)
    if above := ranks_above_full(specs, shapes):
        warn(_describe_ranks(above))
    if splitter is not None:
        splitter.report(warn)
        values = splitter.values
    attach(
        model,
        specs,
        jax.random.key(config.train.seed),
        init=lora.init,
        dropout=lora.dropout,
        dtype=jnp.dtype(lora.dtype),
        variant=lora.variant,
        freeze_a=lora.freeze_a,
        values=values,
    )
    return model, specs


def _attention(config: Config, decoder: DecoderConfig) -> Kind:
    return Kind(
        dtype=config.model.compute_dtype,
        head_size=decoder.head_dim,
        group=decoder.num_heads // decoder.num_kv_heads,
        scale=decoder.attention_scale,
        softcap=decoder.attention_softcap,
    )


def _load(config: Config, checkpoint: Checkpoint, splitter: Splitter | None) -> Decoder:
    """Reads the weights, and shows how far it is."""
    full, quantized = config.method == "full", config.method == "qlora"
    with progress(f"loading {config.model.path}", len(checkpoint.names())) as advance:
        return load(
            checkpoint,
            quant=config.quant if quantized else None,
            dtype=jnp.dtype(config.lora.dtype if full else config.model.storage_dtype),
            progress=advance,
            split=splitter,
        )


def _describe_ranks(above: Sequence[str]) -> str:
    """Returns a warning of linears whose rank is above min(in, out)."""
    kinds = ", ".join(sorted({path.rpartition(".")[2] for path in above}))
    return (
        f"warning: the rank is above min(in, out) of {len(above)} linears ({kinds}), "
        f"first {above[0]}"
    )
