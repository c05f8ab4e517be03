"""Trains a new tokenizer: byte-level BPE as in GPT-2, with a ChatML template."""

from collections.abc import Iterable

from qlora_jax.runtime.errors import UserError
from qlora_jax.runtime.quiet import quiet_transformers
from qlora_jax.text.tokenizer import Tokenizer, wrap

END_OF_TEXT, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
SMALLEST = 256 + 3
"""Smallest vocabulary: one token for each byte, and three special tokens."""
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    f"{{{{ '{START}' + message['role'] + '\n' + message['content'] + '{END}' + '\n' }}}}"
    "{% endfor %}"
    f"{{% if add_generation_prompt %}}{{{{ '{START}assistant\n' }}}}{{% endif %}}"
)


def train_bpe(
    texts: Iterable[str], vocab_size: int, source: str, template: str | None = None
) -> Tokenizer:
    """Trains a BPE tokenizer on texts; the same texts always give the same tokenizer.

    Args:
      texts: training texts, in order.
      vocab_size: maximum number of ids; few texts can give fewer.
      source: name of the tokenizer, for messages.
      template: file with a chat template that replaces ChatML.

    Raises:
      UserError: `vocab_size` is smaller than `SMALLEST`.
    """
    if vocab_size < SMALLEST:
        raise UserError(
            f"pretrain.vocab_size {vocab_size} is too small for 256 bytes and 3 special tokens; "
            f"give {SMALLEST} or more"
        )
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers, trainers

    with quiet_transformers():
        from transformers import PreTrainedTokenizerFast
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT, START, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        chat_template=CHAT_TEMPLATE,
    )
    return wrap(fast, source, template=template)
