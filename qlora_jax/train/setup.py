"""Opens the model of a run with its tokenizer, and loads it; includes training from scratch."""

from collections.abc import Callable
from pathlib import Path

from jax.sharding import Mesh

from qlora_jax.config import Config
from qlora_jax.data import sources
from qlora_jax.formats import fresh
from qlora_jax.formats.checkpoint import Checkpoint
from qlora_jax.lora.spec import AdapterSpec
from qlora_jax.models.decoder import Decoder
from qlora_jax.runtime.errors import UserError
from qlora_jax.text import tokenizer
from qlora_jax.text.bpe import train_bpe
from qlora_jax.text.tokenizer import Tokenizer
from qlora_jax.train.pretrained import load_adapted, load_base, open_pretrained


def open_model(
    config: Config, warn: Callable[[str], None] = lambda line: None
) -> tuple[Checkpoint, Tokenizer]:
    """Opens the model of a run, pretrained or from scratch, and its tokenizer.

    Args:
      config: config of the run.
      warn: function called with lines for the user.

    Raises:
      UserError: an error of `open_pretrained`; or `data.sequence_length` exceeds the positions of
        the model.
    """
    if config.model.path == fresh.NAME:
        checkpoint = _fresh(config)
        _check_length(config, checkpoint)
        return checkpoint, _own_tokenizer(config).for_embedding(checkpoint.config.vocab_size)
    checkpoint, text = open_pretrained(config, warn, config.data.chat_template)
    _check_length(config, checkpoint)
    return checkpoint, text


def _check_length(config: Config, checkpoint: Checkpoint) -> None:
    longest = checkpoint.config.longest
    if config.data.sequence_length > longest:
        raise UserError(
            f"data.sequence_length {config.data.sequence_length} is beyond the {longest} positions "
            f"of {config.model.path}; give {longest} or less"
        )


def _fresh(config: Config) -> Checkpoint:
    if config.method != "full":
        raise UserError(
            f"method {config.method}: a model {fresh.NAME} has nothing to freeze; set it to full"
        )
    return fresh.FreshCheckpoint(fresh.shapes(config.pretrain), config.train.seed)


def _own_tokenizer(config: Config) -> Tokenizer:
    """Returns the tokenizer in the section `pretrain`, or one trained on the training text."""
    pretrain = config.pretrain
    if pretrain.tokenizer is not None:
        text = tokenizer.load_tokenizer(
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


def load_run_model(
    config: Config,
    checkpoint: Checkpoint,
    warn: Callable[[str], None],
    mesh: Mesh | None = None,
) -> tuple[Decoder, dict[str, AdapterSpec]]:
    """Loads the weights one tensor at a time; attaches adapters unless every weight is trained.

    Args:
      config: config of the run.
      checkpoint: source of the weights.
      warn: function called with lines for the user.
      mesh: devices over which the pretrained weights are split; None for the default device.

    Raises:
      UserError: an error of `load_adapted`.
      RunFailed: a kernel that the config chooses computes wrong results on this device.
    """
    if config.method == "full":
        return load_base(config, checkpoint, warn, mesh=mesh), {}
    return load_adapted(config, checkpoint, warn, config.train.seed, mesh)
