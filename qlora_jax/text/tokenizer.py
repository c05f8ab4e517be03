"""The `Tokenizer` of all models: encodes, decodes, and renders the chat template."""

import dataclasses
import datetime
import functools
import json
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from qlora_jax.runtime import json_files, paths
from qlora_jax.runtime.errors import UserError, first_line
from qlora_jax.runtime.quiet import quiet_transformers
from qlora_jax.text import template_trial, tool_calls
from qlora_jax.text.messages import Message, Variables

FOLDER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tekken.json")
"""Vocabulary files; the folder of a tokenizer has at least one of them."""
END_FILES = ("generation_config.json", "config.json")
"""Files in which eos_token_id is searched, in this order."""
FILES = (
    *FOLDER_FILES,
    *END_FILES,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "merges.txt",
    "chat_template*",
    "additional_chat_templates*",
)
"""Patterns of all files that `load_tokenizer` and transformers may read in a folder."""
SAMPLING = ("dropout", "alpha", "nbest_size")
"""Settings of a BPE or Unigram model that make the ids random."""

CLASS = "PreTrainedTokenizerFast"
"""The `tokenizer_class` with which transformers 4 and 5 both use tokenizer.json unchanged.
transformers 5 itself writes TokenizersBackend, which transformers 4 does not know. For `model_type`
qwen2, transformers 5 ignores this class and uses its own."""
LOADING = ("is_local", "local_files_only", "fix_mistral_regex")
"""Arguments of `from_pretrained` that transformers would save as settings."""

PADDING_TOKENS = ("<|finetune_right_pad_id|>", "<pad>", "[PAD]", "<|pad|>", "<unk>")
NO_VARIABLES: Variables = MappingProxyType({})
MOST_TEMPLATE = 2**20
"""Maximum length of a chat template file, in characters."""
TODAY = datetime.date(2024, 7, 26)
"""Date that chat templates get instead of today's, so that a run is reproducible."""
PROBE: tuple[Message, ...] = (
    {"role": "user", "content": "question"},
    {"role": "assistant", "content": "answer"},
)


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Tokenizer:
    """A transformers fast tokenizer with its special ids.

    Attributes:
      fast: the transformers.PreTrainedTokenizerFast.
      source: file or folder of the tokenizer, for messages.
      eos_id: id that ends a document.
      pad_id: id that fills empty positions. It may equal another id: masks never depend on it.
      bos_id: id that is put before raw text; None if the tokenizer adds none.
      stop_ids: ids that end generation: eos and the chat template's end of turn.
      template: chat template with a fixed date; None if the tokenizer has no template.
      template_source: file or folder of the template, for messages.
      vocab_size: largest id plus 1. A model's embedding may have more or fewer rows.
      rows: number of rows of the model's embedding; a text with an id of `rows` or more is refused.
        None if the tokenizer is not bound to a model.
    """

    fast: Any
    source: str
    eos_id: int
    pad_id: int
    bos_id: int | None
    stop_ids: tuple[int, ...]
    vocab_size: int
    template: str | None
    template_source: str
    rows: int | None = None

    @property
    def has_chat_template(self) -> bool:
        """Whether the tokenizer has a chat template."""
        return self.template is not None

    @functools.cached_property
    def tool_call_form(self) -> tool_calls.Form | None:
        """Form of tool calls that the chat template needs; None if it writes no tool calls."""
        return tool_calls.form(lambda messages: self.render(messages, add_generation_prompt=False))

    @property
    def stop_texts(self) -> tuple[str, ...]:
        """Texts of the stop ids in rendered text."""
        return tuple(self.fast.convert_ids_to_tokens(list(self.stop_ids)))

    def encode(self, text: str) -> list[int]:
        """Returns the ids of a text without added ids; special tokens in the text are recognized.

        Raises:
          UserError: the text holds half a surrogate pair, or a token without embedding in the
            model.
        """
        return self._encodings([text])[0].ids

    def encode_with_offsets(self, text: str) -> tuple[list[int], np.ndarray]:
        """Returns the ids and their character offsets, i64[n, 2]: start and end (exclusive).

        The range of a token that holds only spaces may be empty: its start equals its end.
        """
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[tuple[list[int], np.ndarray]]:
        """Returns `encode_with_offsets` of each text, computed in parallel."""
        encodings = self._encodings(texts)
        offsets = [np.array(e.offsets, np.int64).reshape(-1, 2) for e in encodings]
        for own in offsets:
            own[:, 1] = np.maximum(own[:, 1], 1)  # a first token of spaces may get the end 0
        return list(zip([e.ids for e in encodings], offsets))

    def with_bos(self, ids: list[int]) -> list[int]:
        """Returns the ids of raw text, with a begin-of-text id in front if the tokenizer uses one.

        If the ids already begin with this id, no second one is added.
        """
        if self.bos_id is None or ids[:1] == [self.bos_id]:
            return ids
        return [self.bos_id, *ids]

    def _encodings(self, texts: Sequence[str]) -> Any:
        backend = self.fast.backend_tokenizer
        try:
            encodings = backend.encode_batch(list(texts), add_special_tokens=False)
        except TypeError:
            raise UserError(
                "the text holds bytes that are no UTF-8, or half a character; remove it"
            ) from None
        if self.rows is not None and self.rows < self.vocab_size:
            for encoding in encodings:
                if (highest := max(encoding.ids, default=0)) >= self.rows:
                    raise UserError(f"the text holds {self._beyond(highest)}")
        return encodings

    def for_embedding(self, rows: int) -> "Tokenizer":
        """Returns the tokenizer for a model whose embedding has `rows` rows.

        A tokenizer may have more tokens than the embedding has rows. The tokenizer then refuses to
        encode a text that holds a token without embedding.

        Raises:
          UserError: the begin-of-text or end-of-text token has no embedding.
        """
        for id in (self.eos_id, self.bos_id):
            if id is not None and id >= rows:
                fitted = dataclasses.replace(self, rows=rows)
                raise UserError(f"{self.source}: every text has {fitted._beyond(id)}")
        return dataclasses.replace(
            self,
            rows=rows,
            pad_id=self.pad_id if self.pad_id < rows else self.eos_id,
            stop_ids=tuple(id for id in self.stop_ids if id < rows),
        )

    def _beyond(self, id: int) -> str:
        token = self.fast.convert_ids_to_tokens(id)
        return (
            f"the token {token!r:.80} with the id {id}, and the model has {self.rows} embeddings; "
            "remove the token, or give the model's own tokenizer"
        )

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """Returns the text of ids, without special tokens by default."""
        return self.fast.backend_tokenizer.decode(
            [int(i) for i in ids], skip_special_tokens=skip_special_tokens
        )

    def save(self, folder: Path) -> None:
        """Writes tokenizer.json and its settings files for transformers 4 and 5."""
        self.fast.save_pretrained(str(folder))
        file = folder / "tokenizer_config.json"
        settings = json_files.read_object(file, "write it again") | {"tokenizer_class": CLASS}
        kept = {key: value for key, value in settings.items() if key not in LOADING}
        file.write_text(json.dumps(kept, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

    def render(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool,
        variables: Variables = NO_VARIABLES,
    ) -> str:
        """Renders a conversation with the chat template.

        Args:
          messages: turns of the conversation.
          add_generation_prompt: True: the text ends where the next answer would begin.
          variables: further input of the template.

        Raises:
          UserError: there is no template, or it refuses the conversation.
        """
        return self.render_marked(messages, add_generation_prompt, variables, marked=False)[0]

    def render_marked(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool = False,
        variables: Variables = NO_VARIABLES,
        marked: bool = True,
    ) -> tuple[str, list[tuple[int, int]]]:
        """Returns the text of `render`, and the spans of its `{% generation %}` blocks."""
        with quiet_transformers():
            from transformers.utils.chat_template_utils import render_jinja_template
        if self.template is None:
            raise UserError(
                f"{self.source}: the tokenizer has no chat template; use an instruct model, give "
                "one as data.chat_template, or prompt/completion data (data.format: prompt)"
            )
        conversation: list[Any] = list(messages)
        try:
            rendered: Any = render_jinja_template(
                conversations=[conversation],
                chat_template=self.template,
                add_generation_prompt=add_generation_prompt,
                return_assistant_tokens_mask=marked,
                **{**self.fast.special_tokens_map, **variables},
            )
        except Exception as e:  # a template is a program and may raise anything
            raise UserError(
                f"the chat template of {self.template_source} refuses the turns: {first_line(e)}; "
                "change them, or use another template (data.chat_template)"
            ) from None
        texts, spans = rendered
        return texts[0], [(int(a), int(b)) for a, b in spans[0]] if marked else []

    @property
    def template_marks_answers(self) -> bool:
        """Whether the chat template marks the answers with `{% generation %}` blocks."""
        return re.search(r"\{%-?\s*generation\s*-?%\}", self.template or "") is not None


def load_tokenizer(
    path: str | Path,
    warn: Callable[[str], None] = lambda line: None,
    template: str | None = None,
) -> Tokenizer:
    """Loads the tokenizer of a Hugging Face folder or of a .gguf file.

    Args:
      path: path of the folder or file.
      warn: function that gets a one-line warning if a setting of the tokenizer is not used.
      template: file with a chat template that replaces the tokenizer's.

    Raises:
      UserError: the path has no usable tokenizer, or the template file is missing or unusable.
    """
    fast, end_ids = _open(Path(path), warn)
    return wrap(fast, str(path), end_ids, template)


def _read_template(path: Path) -> str:
    if not paths.is_file(path):
        raise UserError(f"data.chat_template: {path}: no such file; give a Jinja file")
    try:
        with path.open(encoding="utf-8") as file:
            text = file.read(MOST_TEMPLATE + 1)
    except OSError as e:
        raise paths.unreadable(path, e) from None
    except UnicodeDecodeError:
        raise UserError(f"data.chat_template: {path}: not UTF-8 text; convert the file") from None
    if len(text) > MOST_TEMPLATE:
        raise UserError(
            f"data.chat_template: {path}: over {MOST_TEMPLATE} characters; give a Jinja file"
        )
    return text


def _open(path: Path, warn: Callable[[str], None]) -> tuple[Any, Sequence[int]]:
    """Returns a transformers fast tokenizer and the ids that end generation."""
    if path.suffix == ".gguf":
        from qlora_jax.text.gguf_vocabulary import load_fast_tokenizer

        return load_fast_tokenizer(path), ()
    from qlora_jax.text.folder_tokenizer import load_folder

    if not paths.is_dir(path):
        raise UserError(f"{path}: no such folder; a tokenizer is a Hugging Face folder or a .gguf")
    if not any(paths.is_file(path / name) for name in FOLDER_FILES):
        raise UserError(f"{path}: no tokenizer.json in it; copy the tokenizer's files there")
    fast = load_folder(path)
    if not getattr(fast, "is_fast", False):
        raise UserError(f"{path}: the tokenizer has no fast version; add its tokenizer.json")
    if sampling := _stop_sampling(fast):
        warn(
            f"warning: {path}: {' and '.join(sampling)} of tokenizer.json would give random ids "
            "for the same text; switched off"
        )
    return fast, _end_ids(path)


def _stop_sampling(fast: Any) -> list[str]:
    """Switches off the settings that make the ids random, and returns their names."""
    model = fast.backend_tokenizer.model
    found = [name for name in SAMPLING if getattr(model, name, None)]
    for name in found:
        setattr(model, name, None)
    return found


def wrap(
    fast: Any, source: str, end_ids: Sequence[int] = (), template: str | None = None
) -> Tokenizer:
    """Makes a `Tokenizer` from a transformers fast tokenizer, and finds its special ids.

    Args:
      fast: a transformers.PreTrainedTokenizerFast; its truncation and padding are switched off.
      source: file or folder of the tokenizer, for messages.
      end_ids: further ids that end generation, such as those of a model's generation_config.json.
        The first one is the eos id if the tokenizer names none.
      template: file with a chat template that replaces the tokenizer's.

    Raises:
      UserError: no end-of-text token is known, two tokens share an id, or the chat template is
        unusable or needs too much time or memory.
    """
    if template is not None:
        fast.chat_template = _read_template(Path(template).expanduser())
    fast.backend_tokenizer.no_truncation()
    fast.backend_tokenizer.no_padding()
    fast.backend_tokenizer.encode_special_tokens = False
    vocabulary = fast.get_vocab()
    if shared := len(vocabulary) - len(set(vocabulary.values())):
        raise UserError(
            f"{source}: {shared} of the tokenizer's {len(vocabulary)} tokens have the id of "
            "another; download it again"
        )
    eos = fast.eos_token_id if fast.eos_token_id is not None else next(iter(end_ids), None)
    if eos is None:
        raise UserError(
            f"{source}: the tokenizer names no end-of-text token; "
            'set "eos_token" in its tokenizer_config.json'
        )
    pads = [fast.pad_token_id, *(vocabulary.get(name) for name in PADDING_TOKENS), eos]
    tokenizer = Tokenizer(
        fast=fast,
        source=source,
        eos_id=eos,
        pad_id=next(i for i in pads if i is not None),
        bos_id=_added_bos(fast),
        stop_ids=tuple(dict.fromkeys([eos, *end_ids])),
        vocab_size=max(vocabulary.values()) + 1,
        template=_chat_template(fast, template or source),
        template_source=template or source,
    )
    if tokenizer.template is not None:
        template_trial.check(tokenizer.template, tokenizer.template_source)
    turn = _end_of_turn(tokenizer)
    if turn is None or turn in tokenizer.stop_ids:
        return tokenizer
    return dataclasses.replace(tokenizer, stop_ids=(*tokenizer.stop_ids, turn))


def _chat_template(fast: Any, source: str) -> str | None:
    try:
        template = fast.get_chat_template()
    except ValueError:  # there is no template, or several without a default
        return None
    if not isinstance(template, str):
        raise UserError(f"{source}: its chat template is no text but {template!r:.80}; correct it")
    call = r"""strftime_now\(\s*(["'])(.*?)\1\s*\)"""
    return re.sub(call, lambda found: repr(TODAY.strftime(found[2])), template)


def _added_bos(fast: Any) -> int | None:
    bos = fast.bos_token_id
    ids = fast.backend_tokenizer.encode("a", add_special_tokens=True).ids
    return bos if bos is not None and ids[:1] == [bos] else None


def _end_of_turn(tokenizer: Tokenizer) -> int | None:
    """Returns the id of the special token that the template writes after an answer, or None."""
    if not tokenizer.has_chat_template:
        return None
    try:
        text = tokenizer.render(PROBE, add_generation_prompt=False)
    except UserError:
        return None
    tail = tokenizer.encode(text.rpartition("answer")[2].lstrip())
    added = tokenizer.fast.added_tokens_decoder
    return tail[0] if tail and tail[0] in added else None


def _end_ids(folder: Path) -> tuple[int, ...]:
    """Returns eos_token_id, a number or a list, of the first file that has it; () if none."""
    for name in END_FILES:
        try:
            value = json_files.read_object(folder / name, "").get("eos_token_id")
        except UserError:
            continue
        ids = value if isinstance(value, list) else [value]
        if all(isinstance(i, int) for i in ids):
            return tuple(ids)
    return ()
