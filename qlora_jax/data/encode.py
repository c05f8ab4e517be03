"""From records to token ids and the mask of those that carry loss."""

import dataclasses
import functools
import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from rich.console import Console
from rich.progress import Progress

from qlora_jax.config import DataConfig
from qlora_jax.data.bad_records import BadRecords
from qlora_jax.data.records import Chat, Prompt, Record, Text
from qlora_jax.runtime.errors import UserError
from qlora_jax.text import tool_calls
from qlora_jax.text.chat import Found, Span, render_with_answers
from qlora_jax.text.ignored import ignored
from qlora_jax.text.messages import Message, Variables
from qlora_jax.text.tokenizer import NO_VARIABLES, Tokenizer

BATCH = 256
LONG = 20_000
"""Records from which on a progress bar is worth its lines."""
WINDOW = 8
"""Tokens that are compared before an answer, in place of all."""
UNWRITTEN = "which the chat template does not write"
WITHIN = (
    "in the text of a turn, where it counts as that token beside those that the chat template "
    "writes; take it out of the data, or set data.template: none for prompts that are formatted"
)
MERGED = (
    "answers begin within a token that also holds the end of their prompt, which generation cannot "
    "give; let the prompt end without a space, and the answer begin with it"
)


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
      notes: what is to be told of some answers or conversations, and their number.
    """

    examples: int
    tokens: int
    target_tokens: int
    truncated: int
    dropped: int
    notes: Mapping[str, int] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
    """A record as text.

    Attributes:
      text: what is tokenized.
      answers: finds the answers that start before a character; raises UserError if one cannot be
        located.
      bos: a begin-of-text id is put in front if the tokenizer uses one.
      eos: an end-of-text id is appended unless the last answer ends generation itself.
      chunked: a text over length becomes several examples instead of being cut.
      notes: what is to be told of the record.
    """

    text: str
    answers: Callable[[int], Found]
    bos: bool
    eos: bool
    chunked: bool = False
    notes: Sequence[str] = ()


class Conversation(NamedTuple):
    """What goes through the chat template.

    Attributes:
      messages: the turns.
      variables: further input of the template.
      without_loss: turns of the assistant that carry no loss.
    """

    messages: tuple[Message, ...]
    variables: Variables = NO_VARIABLES
    without_loss: frozenset[int] = frozenset()


def encode(
    records: Sequence[Record],
    tokenizer: Tokenizer,
    config: DataConfig,
    bad: BadRecords | None = None,
) -> tuple[list[Example], EncodeStats]:
    """Tokenizes records and marks the targets.

    Targets come from character spans: of a conversation the assistant's turns with the token that
    ends each, of a prompt/completion pair the completion and an end of text, of a text everything.
    An answer begins with a token of its own. Where the chat template writes what is before an
    answer differently once more turns follow, that answer is an example of its own.
    With `loss_on: all` every id but the first is a target. An example has at most
    `sequence_length + 1` ids; a text longer than that becomes several examples, each of which
    starts with the last id of the one before, so that every id but the first is a target once.

    Args:
      records: what is encoded.
      tokenizer: the tokenizer.
      config: the settings of data.
      bad: leaves out records that cannot be rendered or encoded; None stops at the first.

    Raises:
      UserError: a conversation cannot be rendered, a text cannot be encoded, or an example has no
        target left and `on_no_target` is error; the record's place is named.
    """
    examples: list[Example] = []
    truncated = dropped = 0
    notes: Counter[str] = Counter()
    bad = bad or BadRecords("error")
    console = Console(stderr=True)
    hidden = len(records) < LONG or not console.is_terminal
    with Progress(console=console, transient=True, disable=hidden) as progress:
        task = progress.add_task("tokenizing", total=len(records))
        for record, layout, wholes in _wholes(records, tokenizer, config, bad, notes):
            progress.advance(task)
            for whole in wholes:
                truncated += not layout.chunked and len(whole.ids) > config.sequence_length + 1
                for example in _fit(whole, config.sequence_length + 1, layout.chunked):
                    if example.target.any():
                        examples.append(example)
                    elif config.on_no_target == "error":
                        raise UserError(
                            f"{record.where}: no target in its first {config.sequence_length} "
                            "tokens; raise data.sequence_length, or set data.on_no_target: drop"
                        )
                    else:
                        dropped += 1
    return examples, EncodeStats(
        examples=len(examples),
        tokens=sum(len(e.ids) for e in examples),
        target_tokens=sum(int(e.target.sum()) for e in examples),
        truncated=truncated,
        dropped=dropped,
        notes=notes,
    )


def _wholes(
    records: Sequence[Record],
    tokenizer: Tokenizer,
    config: DataConfig,
    bad: BadRecords,
    notes: Counter[str],
) -> Iterator[tuple[Record, Layout, list[Example]]]:
    """Yields each record, its layout, and all of it as one example or, of some chats, several.

    Args:
      records: the records.
      tokenizer: the tokenizer.
      config: the settings of data.
      bad: leaves out those that cannot be used.
      notes: counts what is to be told; it is added to.
    """
    for start in range(0, len(records), BATCH):
        laid: list[tuple[Record, Layout]] = []
        for record in records[start : start + BATCH]:
            with bad.guard(record.where):
                laid.append((record, lay_out(record, tokenizer, config)))
        for record, layout, tokens in _tokenized(laid, tokenizer, bad):
            wholes: list[Example] = []
            with bad.guard(record.where):
                wholes = _examples(layout, tokens, tokenizer, config, notes)
            yield record, layout, wholes


class Tokens(NamedTuple):
    """A tokenized text.

    Attributes:
      ids: the ids.
      offsets: i64[n, 2], the characters of each: start and end.
    """

    ids: list[int]
    offsets: np.ndarray


def _tokenized(
    laid: Sequence[tuple[Record, Layout]], tokenizer: Tokenizer, bad: BadRecords
) -> Iterator[tuple[Record, Layout, Tokens]]:
    """Yields records with their layouts and tokens, but for those whose text has none."""
    try:
        encoded = tokenizer.encode_batch([layout.text for _, layout in laid])
    except UserError:  # of one of them
        for record, layout in laid:
            with bad.guard(record.where):
                encoded = [tokenizer.encode_with_offsets(layout.text)]
                yield record, layout, Tokens(*encoded[0])
        return
    for (record, layout), tokens in zip(laid, encoded):
        yield record, layout, Tokens(*tokens)


def _examples(
    layout: Layout,
    tokens: Tokens,
    tokenizer: Tokenizer,
    config: DataConfig,
    notes: Counter[str],
) -> list[Example]:
    """Returns a record's text as an example, before the examples of answers apart."""
    found = layout.answers(_end(layout, tokens.offsets, config.sequence_length + 1))
    notes.update(layout.notes)
    notes.update(found.notes)
    whole = functools.partial(_whole, layout, tokenizer=tokenizer, config=config, notes=notes)
    examples = [
        whole(text, [span], Tokens(*tokenizer.encode_with_offsets(text)))
        for text, span in found.apart
    ]
    if found.spans or not found.apart:
        examples.insert(0, whole(layout.text, found.spans, tokens))
    return examples


def _whole(
    layout: Layout,
    text: str,
    spans: Sequence[Span],
    tokens: Tokens,
    *,
    tokenizer: Tokenizer,
    config: DataConfig,
    notes: Counter[str],
) -> Example:
    """Returns a text of a record as one example, whatever its length."""
    if not layout.chunked:
        tokens, merged = _parted(text, [start for start, _ in spans], tokens, tokenizer)
        if merged:
            notes[MERGED] += merged
    return _finish(
        layout, tokens.ids, mark(tokens.offsets, spans), tokenizer, config.loss_on == "all"
    )


def _parted(
    text: str, starts: Sequence[int], tokens: Tokens, tokenizer: Tokenizer
) -> tuple[Tokens, int]:
    """Encodes a text in parts where the tokens before an answer are not those of its prompt.

    In generation the prompt is encoded alone, so such a token could not be given.

    Returns:
      The tokens, and the number of answers that still begin within a token: a tokenizer that puts
      a space in front of each part would write another text.
    """
    cuts = [start for start in starts if not _is_parted(text, start, tokens, tokenizer)]
    if not cuts:
        return tokens, 0
    edges = [0, *cuts, len(text)]
    parts = tokenizer.encode_batch([text[a:b] for a, b in itertools.pairwise(edges)])
    ids = [id for own, _ in parts for id in own]
    if tokenizer.decode(ids, False) != tokenizer.decode(tokens.ids, False):
        return tokens, len(cuts)
    offsets = np.concatenate([own + edge for (_, own), edge in zip(parts, edges)])
    return Tokens(ids, offsets), 0


def _is_parted(text: str, start: int, tokens: Tokens, tokenizer: Tokenizer) -> bool:
    """Whether the tokens before a character are those of the text before it alone."""
    low, high = tokens.offsets[:, 0], tokens.offsets[:, 1]
    if ((low < start) & (start < high)).any():
        return False
    count = int((high <= start).sum())
    first = max(0, count - WINDOW)
    near = tokenizer.encode(text[low[first] if first else 0 : start])
    return near == tokens.ids[first:count] or tokenizer.encode(text[:start]) == tokens.ids[:count]


def conversation(record: Record, tokenizer: Tokenizer, config: DataConfig) -> Conversation | None:
    """Returns what goes through the chat template, or None for a record that is raw text.

    Raises:
      UserError: it holds tool calls, and the chat template writes none.
    """
    if isinstance(record, Chat):
        found = Conversation(record.messages, record.variables, record.without_loss)
    elif isinstance(record, Prompt) and config.template == "auto" and tokenizer.has_chat_template:
        found = Conversation(
            (
                {"role": "user", "content": record.prompt},
                {"role": "assistant", "content": record.completion},
            )
        )
    else:
        return None
    if config.system_prompt is not None and found.messages[0]["role"] != "system":
        found = found._replace(
            messages=({"role": "system", "content": config.system_prompt}, *found.messages),
            without_loss=frozenset(turn + 1 for turn in found.without_loss),
        )
    if not any(message.get("tool_calls") for message in found.messages):
        return found
    form = tokenizer.tool_call_form
    if form is None:
        raise _unwritten("tool_calls", tokenizer)
    return found._replace(messages=tool_calls.written(found.messages, form))


def _unwritten(name: str, tokenizer: Tokenizer) -> UserError:
    return UserError(
        f"the chat template of {tokenizer.template_source} does not write its {name}; give one "
        f"that does as data.chat_template, or take {name} out of the data"
    )


def lay_out(record: Record, tokenizer: Tokenizer, config: DataConfig) -> Layout:
    """The text of a record and where its answers lie.

    Raises:
      UserError: the conversation cannot be rendered.
    """
    chat = conversation(record, tokenizer, config)
    if chat is not None:
        return _lay_out_chat(chat, tokenizer)
    if isinstance(record, Prompt):
        prompt = raw_prompt(record.prompt, config.system_prompt)
        text, start = prompt + record.completion, len(prompt)
        return Layout(text=text, answers=_always([(start, len(text))]), bos=True, eos=True)
    assert isinstance(record, Text)
    text = record.text
    return Layout(
        text=text, answers=_always([(0, len(text))]), bos=True, eos=record.ends, chunked=True
    )


def _lay_out_chat(chat: Conversation, tokenizer: Tokenizer) -> Layout:
    unread = ignored(
        chat.messages, chat.variables, lambda m, variables: tokenizer.render(m, False, variables)
    )
    for name in ("tool_calls", "tools"):
        if name in unread:
            raise _unwritten(name, tokenizer)
    text, answers = render_with_answers(chat.messages, tokenizer, chat.variables, chat.without_loss)
    return Layout(
        text=text,
        answers=answers,
        bos=False,
        eos=chat.messages[-1]["role"] == "assistant",
        notes=[
            *(f"conversations hold {name}, {UNWRITTEN}" for name in unread),
            *(f"conversations hold {token!r} {WITHIN}" for token in _marks(chat, tokenizer)),
        ],
    )


def _marks(chat: Conversation, tokenizer: Tokenizer) -> list[str]:
    """Returns the tokens that begin a text or end a turn and that contents hold themselves."""
    texts = [m["content"] for m in chat.messages if isinstance(m.get("content"), str)]
    tokens = {*tokenizer.stop_texts, tokenizer.fast.bos_token} - {None}
    return sorted(token for token in tokens if any(token in text for text in texts))


def _always(spans: list[Span]) -> Callable[[int], Found]:
    return lambda end: Found(spans, [], {})


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
    whole = tokenizer.with_bos(ids) if layout.bos else ids
    head = len(whole) - len(ids)
    tail = [tokenizer.eos_id] if layout.eos and not stopped else []
    target = np.concatenate([np.zeros(head, bool), target, np.ones(len(tail), bool)])
    if loss_on_all:
        target[:] = True
    target[:1] = False
    return Example(np.array([*whole, *tail], np.int32), target)


def _fit(example: Example, limit: int, chunked: bool) -> Iterator[Example]:
    if not chunked:
        yield Example(example.ids[:limit], example.target[:limit])
        return
    for start in range(0, max(1, len(example.ids) - 1), limit - 1):
        target = example.target[start : start + limit].copy()
        target[:1] = False
        yield Example(example.ids[start : start + limit], target)
