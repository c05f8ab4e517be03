"""Builds a tokenizer from a .gguf file's metadata, without torch.

A GGUF file has no tokenizer.json: it holds the vocabulary, merges or scores, and the *name* of a
pre-tokenizer. What each name means is data here.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gguf import TokenType
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

from qlora_jax.errors import UserError
from qlora_jax.formats.gguf_header import read_header
from qlora_jax.formats.quiet import quiet_transformers

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PREFIX = "tokenizer.ggml."
REQUIRED = {"gpt2": ("tokens", "merges"), "llama": ("tokens", "scores")}
ROLES = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
SPACE = "▁"


@dataclasses.dataclass(frozen=True)
class PreTokenizer:
    """How text is cut before the merges of a byte-level vocabulary apply.

    `split` None stands for GPT-2's own rule. `ignore_merges` takes a whole piece that is in the
    vocabulary as it is.
    """

    split: str | None = None
    single_digits: bool = False
    nfc: bool = False
    ignore_merges: bool = False
    add_bos: bool = False


_LLAMA3 = PreTokenizer(
    split=r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    ignore_merges=True,
    add_bos=True,
)
_QWEN2 = PreTokenizer(
    split=r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    nfc=True,
)
PRE_TOKENIZERS: Mapping[str, PreTokenizer] = {
    "gpt-2": PreTokenizer(),
    "smollm": PreTokenizer(single_digits=True),
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
}
"""Values of `tokenizer.ggml.pre`."""


def load_fast_tokenizer(path: Path) -> "PreTrainedTokenizerFast":
    """The tokenizer in a .gguf file, with its special tokens and chat template.

    Raises:
      UserError: a damaged file, or a tokenizer of another kind than those known here.
    """
    metadata = read_header(path).metadata
    tokenizer = build(metadata, str(path))
    tokens = metadata[f"{PREFIX}tokens"]
    roles = {role: metadata.get(f"{PREFIX}{key}_token_id") for role, key in ROLES.items()}
    with quiet_transformers():
        from transformers import PreTrainedTokenizerFast

        return PreTrainedTokenizerFast(
            tokenizer_object=tokenizer,
            chat_template=metadata.get("tokenizer.chat_template"),
            clean_up_tokenization_spaces=False,
            **{f"{role}_token": tokens[i] for role, i in roles.items() if i is not None},
        )


def build(metadata: Mapping[str, Any], where: str) -> Tokenizer:
    """The same from metadata already read, as a bare `tokenizers.Tokenizer`.

    Raises:
      UserError: naming `where` and the metadata that is missing or not supported.
    """
    kind = metadata.get(f"{PREFIX}model")
    if kind not in REQUIRED:
        raise UserError(
            f"{where}: tokenizer {kind!r} is not supported; supported: {', '.join(REQUIRED)}"
        )
    if absent := [key for key in REQUIRED[kind] if f"{PREFIX}{key}" not in metadata]:
        raise UserError(f"{where}: metadata {PREFIX}{absent[0]} is missing; give another GGUF file")
    tokens = metadata[f"{PREFIX}tokens"]
    types = metadata.get(f"{PREFIX}token_type") or [TokenType.NORMAL] * len(tokens)
    if kind == "gpt2":
        tokenizer, add_bos = _byte_level(metadata, where)
    else:
        tokenizer, add_bos = _sentencepiece(metadata, types), True
    _add_tokens(tokenizer, tokens, types)
    _add_ends(tokenizer, metadata, add_bos)
    return tokenizer


def _byte_level(metadata: Mapping[str, Any], where: str) -> tuple[Tokenizer, bool]:
    name = metadata.get(f"{PREFIX}pre")
    pre = PRE_TOKENIZERS.get(str(name))
    if pre is None:
        raise UserError(
            f"{where}: pre-tokenizer {name!r} is not known; known: {', '.join(PRE_TOKENIZERS)}"
        )
    merges = [tuple(merge.split(" ", 1)) for merge in metadata[f"{PREFIX}merges"]]
    tokenizer = Tokenizer(
        models.BPE(vocab=_vocabulary(metadata), merges=merges, ignore_merges=pre.ignore_merges)
    )
    steps: list[Any] = [pre_tokenizers.Digits(True)] if pre.single_digits else []
    if pre.split is not None:
        steps.append(pre_tokenizers.Split(Regex(pre.split), behavior="isolated"))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pre.split is None))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    if pre.nfc:
        tokenizer.normalizer = normalizers.NFC()
    return tokenizer, pre.add_bos


def _sentencepiece(metadata: Mapping[str, Any], types: Sequence[int]) -> Tokenizer:
    vocabulary = _vocabulary(metadata)
    tokens, scores = metadata[f"{PREFIX}tokens"], metadata[f"{PREFIX}scores"]
    pieces = {t: s for t, s, kind in zip(tokens, scores, types) if kind == TokenType.NORMAL}
    unknown = metadata.get(f"{PREFIX}unknown_token_id", 0)
    tokenizer = Tokenizer(
        models.BPE(
            vocab=vocabulary,
            merges=merges_from_scores(pieces),
            unk_token=tokens[unknown],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    prefixed = metadata.get(f"{PREFIX}add_space_prefix", True)
    # Not Metaspace, which adds no space to a text that starts with one; SentencePiece does.
    prepend = [normalizers.Prepend(SPACE)] if prefixed else []
    tokenizer.normalizer = normalizers.Sequence([*prepend, normalizers.Replace(" ", SPACE)])
    steps: list[Any] = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if prefixed:
        steps.append(decoders.Strip(content=" ", left=1))
    tokenizer.decoder = decoders.Sequence(steps)
    return tokenizer


def merges_from_scores(pieces: Mapping[str, float]) -> list[tuple[str, str]]:
    """The merges that a SentencePiece BPE vocabulary stands for, best first.

    SentencePiece joins the neighbours whose union has the highest score, so every way to cut a
    piece in two known pieces is a merge with that piece's score.
    """
    ranked = sorted(pieces, key=lambda piece: -pieces[piece])  # stable: equal scores by id
    return [
        (piece[:i], piece[i:])
        for piece in ranked
        for i in range(1, len(piece))
        if piece[:i] in pieces and piece[i:] in pieces
    ]


def _vocabulary(metadata: Mapping[str, Any]) -> dict[str, int]:
    return {token: i for i, token in enumerate(metadata[f"{PREFIX}tokens"])}


def _add_tokens(tokenizer: Tokenizer, tokens: Sequence[str], types: Sequence[int]) -> None:
    added = {TokenType.CONTROL: True, TokenType.UNKNOWN: True, TokenType.USER_DEFINED: False}
    marked = [
        (token, added[TokenType(kind)]) for token, kind in zip(tokens, types) if kind in added
    ]
    for special in (True, False):
        chosen = [
            AddedToken(t, normalized=False, special=special) for t, s in marked if s == special
        ]
        (tokenizer.add_special_tokens if special else tokenizer.add_tokens)(chosen)


def _add_ends(tokenizer: Tokenizer, metadata: Mapping[str, Any], add_bos: bool) -> None:
    tokens = metadata[f"{PREFIX}tokens"]
    wanted = {
        "bos": metadata.get(f"{PREFIX}add_bos_token", add_bos),
        "eos": metadata.get(f"{PREFIX}add_eos_token", False),
    }
    ids = {end: metadata.get(f"{PREFIX}{end}_token_id") for end in wanted}
    used = {end: ids[end] for end in wanted if wanted[end] and ids[end] is not None}
    if not used:
        return
    before, after = ([tokens[used[end]]] if end in used else [] for end in ("bos", "eos"))
    tokenizer.post_processor = processors.TemplateProcessing(
        single=[*before, "$A", *after],
        pair=[*before, "$A", *after, *before, "$B:1", *after],
        special_tokens=[(tokens[i], i) for i in used.values()],
    )
