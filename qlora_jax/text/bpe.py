"""A tokenizer of one's own: byte-level BPE, as GPT-2's, with a ChatML template."""

from collections.abc import Iterable

from qlora_jax.runtime.errors import UserError
from qlora_jax.runtime.quiet import quiet_transformers
from qlora_jax.text.tokenizer import Tokenizer, wrap

END_OF_TEXT, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
SMALLEST = 256 + 3
"""Every byte is a token, and so is each of the three marks."""
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    f"{{{{ '{START}' + message['role'] + '\n' + message['content'] + '{END}' + '\n' }}}}"
    "{% endfor %}"
    f"{{% if add_generation_prompt %}}{{{{ '{START}assistant\n' }}}}{{% endif %}}"
)


def train_bpe(
    texts: Iterable[str], vocab_size: int, source: str, template: str | None = None
) -> Tokenizer:
    """Learns merges from texts; equal texts give equal tokenizers.

    Args:
      texts: what is read, in order.
      vocab_size: most ids; a small text gives fewer.
      source: a name for messages.
      template: a file with a chat template that takes the place of ChatML.

    Raises:
      UserError: no room for the bytes.
    """
    if vocab_size < SMALLEST:
        raise UserError(
            f"pretrain.vocab_size {vocab_size} has no room for every byte and three marks; "
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
