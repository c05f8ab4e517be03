"""Fixtures: small real tokenizers trained on a few sentences, with a ChatML template."""

from pathlib import Path

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from qlora_jax.formats.fetch import fetch
from qlora_jax.runtime.errors import UserError
from qlora_jax.runtime.quiet import quiet_transformers
from qlora_jax.text import tokenizer as tokenizers_

CHATML = (
    "{% for m in messages %}"
    "{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
CORPUS = [
    "What does the function do? It returns the number of items in a container.",
    "user assistant system The capital of France is Paris. Yes, no, hello!",
    "Recursively copy a directory tree    and return the destination directory.\n\n",
]
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<s>", "</s>", "<pad>"]


def build_backend() -> Backend:
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel(trim_offsets=True)
    backend.train_from_iterator(
        CORPUS * 4,
        trainers.BpeTrainer(
            vocab_size=420,
            special_tokens=SPECIAL,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return backend


def build_sentencepiece() -> Backend:
    """Builds one like Llama 2's: "▁" for a space and in front, unknown letters as bytes."""
    backend = Backend(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    special = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=special, show_progress=False)
    backend.train_from_iterator(CORPUS * 4, trainer)
    return backend


def build_fast(
    template: str | None = CHATML, eos: str | None = "<|endoftext|>", build=build_backend, **more
):
    with quiet_transformers():
        from transformers import PreTrainedTokenizerFast
    backend = build()
    if "bos_token" in more:
        bos = more["bos_token"]
        backend.post_processor = processors.TemplateProcessing(
            single=[bos, "$A"], special_tokens=[(bos, backend.token_to_id(bos))]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, chat_template=template, eos_token=eos, **more
    )


@pytest.fixture(scope="session")
def make_tokenizer():
    """Returns a function that builds a Tokenizer with a given template or special tokens."""

    def make(*args, **kwargs):
        return tokenizers_.wrap(build_fast(*args, **kwargs), "test-tokenizer")

    return make


@pytest.fixture(scope="session")
def sentencepiece_backend():
    return build_sentencepiece


@pytest.fixture(scope="session")
def make_fast():
    return build_fast


@pytest.fixture(scope="session")
def tokenizer(make_tokenizer):
    return make_tokenizer()


@pytest.fixture(scope="session")
def builtin_gguf() -> Path:
    """Path of the built-in model's file, from the cache or downloaded; skips without network."""
    try:
        return fetch("smollm2-135m-instruct")
    except UserError as e:
        pytest.skip(str(e))
