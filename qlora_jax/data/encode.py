"""From records to token ids and the mask of those that carry loss."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from rich.console import Console
from rich.progress import Progress

from qlora_jax.config import DataConfig
from qlora_jax.data.records import Chat, Prompt, Record, Text
from qlora_jax.runtime.errors import UserError
from qlora_jax.text.chat import Span, render_with_answers
from qlora_jax.text.messages import Message
from qlora_jax.text.tokenizer import Tokenizer

BATCH = 256
LONG = 20_000
"""Records from which on a progress bar is worth its lines."""


@dataclasses.dataclass(frozen=True, eq=False)
class Example:
    """One tokenized example of n >= 2 ids.

    Attributes:
      ids: i32[n].
      target: bool[n], true where the id is one the model learns to predict; never at the start.
    """

    ids: np.ndarray
    target: np.ndarray


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncodeStats:
    """What encoding made.

    Attributes:
      examples: examples made; a long text makes several.
      tokens: ids in them.
      target_tokens: ids that carry loss.
      truncated: examples cut at `sequence_length + 1` ids.
      dropped: examples left out because no target was in them, after truncation.
    """

    examples: int
    tokens: int
    target_tokens: int
    truncated: int
    dropped: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
    """A record as text.

    Attributes:
      text: what is tokenized.
      answers: returns the character spans of the answers that start before a character; raises
        UserError if one cannot be located.
      bos: a begin-of-text id is put in front if the tokenizer uses one.
      eos: an end-of-text id is appended unless the last answer ends generation itself.
      chunked: a text over length becomes several examples instead of being cut.
    """

    text: str
    answers: Callable[[int], list[Span]]
    bos: bool
    eos: bool
    chunked: bool = False


def encode(
    records: Sequence[Record], tokenizer: Tokenizer, config: DataConfig
) -> tuple[list[Example], EncodeStats]:
    """Tokenizes records and marks the targets.

    Targets come from character spans: of a conversation the assistant's turns with the token that
    ends each, of a prompt/completion pair the completion and an end of text, of a text everything.
    With `loss_on: all` every id but the first is a target. An example has at most
    `sequence_length + 1` ids; a text longer than that becomes several examples, each of which
    starts with the last id of the one before, so that every id but the first is a target once.

    Raises:
      UserError: a conversation cannot be rendered, a text cannot be encoded, or an example has no
        target left and `on_no_target` is error; the record's place is named. Or no example is left
        at all.
    """
    examples: list[Example] = []
    truncated = dropped = 0
    console = Console(stderr=True)
    hidden = len(records) < LONG or not console.is_terminal
    with Progress(console=console, transient=True, disable=hidden) as progress:
        task = progress.add_task("tokenizing", total=len(records))
        for record, chunked, whole in _wholes(records, tokenizer, config):
            progress.advance(task)
            truncated += not chunked and len(whole.ids) > config.sequence_length + 1
            for example in _fit(whole, config.sequence_length + 1, chunked):
                if example.target.any():
                    examples.append(example)
                elif config.on_no_target == "error":
                    raise UserError(
                        f"{record.where}: no target in its first {config.sequence_length} tokens; "
                        "raise data.sequence_length, or set data.on_no_target: drop"
                    )
                else:
                    dropped += 1
    return examples, EncodeStats(
        examples=len(examples),
        tokens=sum(len(e.ids) for e in examples),
        target_tokens=sum(int(e.target.sum()) for e in examples),
        truncated=truncated,
        dropped=dropped,
    )


def _wholes(
    records: Sequence[Record], tokenizer: Tokenizer, config: DataConfig
) -> Iterator[tuple[Record, bool, Example]]:
    """Yields each record, whether it is chunked, and all of it as one example."""
    for start in range(0, len(records), BATCH):
        batch = records[start : start + BATCH]
        layouts = [lay_out(record, tokenizer, config) for record in batch]
        encoded = _encode_batch(batch, layouts, tokenizer)
        for record, layout, (ids, offsets) in zip(batch, layouts, encoded):
            with _naming(record):
                spans = layout.answers(_end(layout, offsets, config.sequence_length + 1))
            targets = mark(offsets, spans)
            whole = _finish(layout, ids, targets, tokenizer, config.loss_on == "all")
            yield record, layout.chunked, whole


def _encode_batch(
    records: Sequence[Record], layouts: Sequence[Layout], tokenizer: Tokenizer
) -> list[tuple[list[int], np.ndarray]]:
    try:
        return tokenizer.encode_batch([layout.text for layout in layouts])
    except UserError:  # of one of them: which is it?
        for record, layout in zip(records, layouts):
            with _naming(record):
                tokenizer.encode(layout.text)
        raise


def conversation(
    record: Record, tokenizer: Tokenizer, config: DataConfig
) -> tuple[Message, ...] | None:
    """The turns that go through the chat template, or None for a record that is raw text."""
    if isinstance(record, Chat):
        messages = record.messages
    elif isinstance(record, Prompt) and config.template == "auto" and tokenizer.has_chat_template:
        messages = (
            {"role": "user", "content": record.prompt},
            {"role": "assistant", "content": record.completion},
        )
    else:
        return None
    if config.system_prompt is None or messages[0]["role"] == "system":
        return messages
    return ({"role": "system", "content": config.system_prompt}, *messages)


def lay_out(record: Record, tokenizer: Tokenizer, config: DataConfig) -> Layout:
    """The text of a record and where its answers lie.

    Raises:
      UserError: the conversation cannot be rendered; the record's place is named.
    """
    messages = conversation(record, tokenizer, config)
    if messages is not None:
        with _naming(record):
            variables = record.variables if isinstance(record, Chat) else {}
            text, answers = render_with_answers(messages, tokenizer, variables)
        return Layout(
            text=text, answers=answers, bos=False, eos=messages[-1]["role"] == "assistant"
        )
    if isinstance(record, Prompt):
        prompt = raw_prompt(record.prompt, config.system_prompt)
        text, start = prompt + record.completion, len(prompt)
        return Layout(text=text, answers=lambda _: [(start, len(text))], bos=True, eos=True)
    assert isinstance(record, Text)
    text = record.text
    return Layout(
        text=text, answers=lambda _: [(0, len(text))], bos=True, eos=record.ends, chunked=True
    )


@contextlib.contextmanager
def _naming(record: Record) -> Iterator[None]:
    """Inside, the message of a UserError starts with the record's place."""
    try:
        yield
    except UserError as e:
        raise UserError(f"{record.where}: {e}") from None


def raw_prompt(prompt: str, system_prompt: str | None) -> str:
    """A prompt that goes through no template, the system prompt in front."""
    return f"{system_prompt}\n\n{prompt}" if system_prompt else prompt


def mark(offsets: np.ndarray, spans: Sequence[Span]) -> np.ndarray:
    """bool[n]: which tokens have a character in one of the spans.

    An empty token, which byte-level tokenizers report for spaces alone, stands for the character
    before its end.
    """
    start, end = np.minimum(offsets[:, 0], offsets[:, 1] - 1), offsets[:, 1]
    target = np.zeros(len(offsets), np.bool_)
    for low, high in spans:
        target |= (end > low) & (start < high) & (low < high)
    return target


def _end(layout: Layout, offsets: np.ndarray, limit: int) -> int:
    """Returns the character after the last token that is kept of a layout."""
    cut = not layout.chunked and len(offsets) > limit
    return int(offsets[limit - 1, 1]) if cut else len(layout.text)


def _finish(
    layout: Layout, ids: list[int], target: np.ndarray, tokenizer: Tokenizer, loss_on_all: bool
) -> Example:
    answered = np.flatnonzero(target)
    stopped = len(answered) > 0 and ids[answered[-1]] in tokenizer.stop_ids
    head = [tokenizer.bos_id] if layout.bos and tokenizer.bos_id is not None else []
    tail = [tokenizer.eos_id] if layout.eos and not stopped else []
    target = np.concatenate([np.zeros(len(head), bool), target, np.ones(len(tail), bool)])
    if loss_on_all:
        target[:] = True
    target[:1] = False
    return Example(np.array([*head, *ids, *tail], np.int32), target)


def _fit(example: Example, limit: int, chunked: bool) -> Iterator[Example]:
    if not chunked:
        yield Example(example.ids[:limit], example.target[:limit])
        return
    for start in range(0, max(1, len(example.ids) - 1), limit - 1):
        target = example.target[start : start + limit].copy()
        target[:1] = False
        yield Example(example.ids[start : start + limit], target)
