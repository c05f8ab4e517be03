"""Builds tokenizers with the chat templates of the TRL package.

The vocabulary is the built-in model's, with each template's special tokens added.
"""

import functools
import importlib.util
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from qlora_jax.formats.fetch import fetch
from qlora_jax.text import tokenizer as tokenizers_
from qlora_jax.text.gguf_vocabulary import load_fast_tokenizer
from qlora_jax.text.tokenizer import Tokenizer

SPECIAL = re.compile(
    r"<\|[^|<>{}\s]{1,40}\|>|<｜[^｜<>]{1,40}｜>|<(?:start|end)_of_turn>|\[/?INST\]|<\|[a-z_]+>|<[a-z_]+\|>"
)


class Ends(NamedTuple):
    """The special tokens in a model's configuration.

    Attributes:
      eos: token at the end of a text.
      more: further tokens that end generation, from generation_config.json.
      bos: token at the start of a text, or None.
    """

    eos: str
    more: tuple[str, ...] = ()
    bos: str | None = None


CHATML = Ends("<|im_end|>")
GEMMA = Ends("<eos>", ("<end_of_turn>",), "<bos>")
GEMMA4 = Ends("<eos>", ("<turn|>", "<|tool_response>"), "<bos>")
DEEPSEEK = Ends("<｜end▁of▁sentence｜>", (), "<｜begin▁of▁sentence｜>")
LLAMA3 = Ends("<|eot_id|>", ("<|end_of_text|>", "<|eom_id|>"), "<|begin_of_text|>")
LFM2 = Ends("<|im_end|>", (), "<|startoftext|>")
PHI3 = Ends("<|endoftext|>", ("<|end|>", "<|assistant|>"))
COHERE = Ends("<|END_OF_TURN_TOKEN|>", (), "<BOS_TOKEN>")

FAMILIES: Mapping[str, Ends] = {
    "cohere": COHERE,
    "cohere2": COHERE,
    "deepseek_r1_distill": DEEPSEEK,
    "deepseekv3": DEEPSEEK,
    "gemma": GEMMA,
    "gemma3": GEMMA,
    "gemma4_v5": GEMMA4,
    "glm4moe": Ends("<|endoftext|>", ("<|user|>", "<|observation|>")),
    "gptoss": Ends("<|return|>", ("<|call|>",), "<|startoftext|>"),
    "lfm2_v2": LFM2,
    "llama3": LLAMA3,
    "llama3_1": LLAMA3,
    "llama3_2": LLAMA3,
    "nemotron_3_nano": CHATML,
    "phi3": PHI3,
    "phi3_5": PHI3,
    "qwen2_5": CHATML,
    "qwen3": CHATML,
    "qwen3_5_nothink": CHATML,
    "qwen3_5_think": CHATML,
    "qwen3_6": CHATML,
    "qwen3_8": CHATML,
    "qwen3_instruct_2507": CHATML,
    "mistral": Ends("</s>", (), "<s>"),
}
"""Name of each template, equal to its file name in TRL; `mistral` is defined below."""

MISTRAL = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{% set system = messages[0].content %}"
    "{% set turns = messages[1:] %}{% else %}{% set turns = messages %}{% endif %}"
    "{% for m in turns %}{% if m.role == 'user' %}[INST] "
    "{% if loop.last and system is defined %}{{ system + '\n\n' }}{% endif %}{{ m.content }}[/INST]"
    "{% elif m.role == 'assistant' %}{{ ' ' + m.content | trim + eos_token }}"
    "{% else %}{{ raise_exception('only user and assistant') }}{% endif %}{% endfor %}"
)
"""Mistral v0.3's rule: the last turn holds the system text if that turn is the user's."""


def texts(name: str) -> tuple[str, str | None]:
    """Returns a template and TRL's training version with `{% generation %}` blocks, or None."""
    if name == "mistral":
        return MISTRAL, None
    folder = _folder()
    twin = folder / f"{name}_training.jinja"
    own = (folder / f"{name}.jinja").read_text(encoding="utf-8")
    return own, twin.read_text(encoding="utf-8") if twin.is_file() else None


@functools.cache
def tokenizer(name: str) -> Tokenizer:
    """Returns the tokenizer with a template and its special tokens."""
    template, _ = texts(name)
    ends = FAMILIES[name]
    fast = _fast()
    named = [t for t in (ends.eos, *ends.more, ends.bos) if t is not None]
    added = sorted({*SPECIAL.findall(template), *named})
    fast.add_special_tokens({"additional_special_tokens": added})
    fast.eos_token, fast.bos_token, fast.chat_template = ends.eos, ends.bos, template
    return tokenizers_.wrap(fast, name, fast.convert_tokens_to_ids([ends.eos, *ends.more]))


def _fast() -> Any:
    return load_fast_tokenizer(fetch("smollm2-135m-instruct"))


def _folder() -> Path:
    # Only find TRL: importing it would import torch.
    spec = importlib.util.find_spec("trl")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent / "chat_templates"
