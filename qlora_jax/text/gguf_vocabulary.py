"""Builds a tokenizer from a .gguf file's metadata, without torch.

A GGUF file has no tokenizer.json. It holds the vocabulary, the merges or scores, and the *name* of
a pre-tokenizer. `PRE_TOKENIZERS` defines each name.
"""

import dataclasses
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from gguf import TokenType
from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic.dataclasses import dataclass
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

from qlora_jax.runtime.errors import UserError
from qlora_jax.runtime.quiet import loading_tokenizer, quiet_transformers
from qlora_jax.text.gguf_header import read_header

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PREFIX = "tokenizer.ggml."
TEMPLATE = "tokenizer.chat_template"
NO_ID = (-1, 2**32 - 1)
REQUIRED = {"gpt2": ("tokens", "merges"), "llama": ("tokens", "scores")}
ROLES = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
SPACE = "▁"


def _different(tokens: list[str]) -> list[str]:
    if len(set(tokens)) < len(tokens):
        token, count = Counter(tokens).most_common(1)[0]
        raise ValueError(f"{token!r:.80} is there {count} times")
    return tokens


def _id(value: Any) -> Any:
    return None if value in NO_ID else value


def _two(merge: str) -> str:
    if " " not in merge:
        raise ValueError("a merge is two tokens with a space between")
    return merge


Tokens = Annotated[list[str], Field(min_length=1), AfterValidator(_different)]
Id = Annotated[Annotated[int, Field(ge=0)] | None, BeforeValidator(_id)]
Kind = Annotated[int, Field(ge=0, le=max(TokenType))]
Merge = Annotated[str, AfterValidator(_two)]


@dataclasses.dataclass(frozen=True)
class PreTokenizer:
    """The rules that cut text into pieces before the merges of a byte-level vocabulary.

    Attributes:
      split: regular expression of a piece; None for the rule of GPT-2.
      single_digits: True: each digit is a piece.
      nfc: True: the text is normalized to Unicode NFC first.
      ignore_merges: True: a piece that is in the vocabulary becomes one token without merges.
      add_bos: True: a begin-of-text token is put in front, unless the file says otherwise.
    """

    split: str | None = None
    single_digits: bool = False
    nfc: bool = False
    ignore_merges: bool = False
    add_bos: bool = False


_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CL100K = rf"{_WORDS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_REST}"
_CASED = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+%s|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*%s"
_CASED_REST = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = PreTokenizer(split=_CL100K, ignore_merges=True, add_bos=True)
_QWEN2 = PreTokenizer(
    split=rf"{_WORDS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{_REST}",
    nfc=True,
)
_NEOX = PreTokenizer(nfc=True)
_DIGITS = PreTokenizer(single_digits=True)
PRE_TOKENIZERS: Mapping[str, PreTokenizer] = {
    "gpt-2": PreTokenizer(),
    "smollm": _DIGITS,
    "starcoder": _DIGITS,
    "refact": _DIGITS,
    "olmo": _NEOX,
    "mpt": _NEOX,
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "smaug-bpe": PreTokenizer(split=_CL100K),
    "dbrx": PreTokenizer(split=_CL100K),
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
    "tekken": PreTokenizer(
        split=rf"{_CASED % ('', '')}|\p{{N}}|{_CASED_REST}",
        ignore_merges=True,
        add_bos=True,
    ),
    "gpt-4o": PreTokenizer(split=rf"{_CASED % ((_WORDS + '?',) * 2)}|\p{{N}}{{1,3}}|{_CASED_REST}"),
}
"""Maps the values of `tokenizer.ggml.pre` to the rules of the pre-tokenizer.

Each name means the tokenizer.json of one model (llama.cpp's convert_hf_to_gguf_update.py lists the
models) and of all models for which llama.cpp computes the same ids. The rules are those of the
tokenizer.json:

- smollm: SmolLM. starcoder, refact: StarCoder 2 and Refact; also Granite's code models with the
  Llama architecture.
- olmo, mpt: the tokenizer of GPT-NeoX 20B, which Pythia uses (allenai/OLMo has a copy). The
  normalization to NFC comes from tokenizer.json; llama.cpp does not normalize, here and for qwen2.
- llama-bpe: Llama 3. smaug-bpe: Llama 3's file of April 2024, without ignore_merges and without
  the begin-of-text token in front.
- dbrx: OpenAI's cl100k, which OLMo 2 (allenai/OLMo has its file) and Phi-4 use.
- tekken: Mistral Nemo. gpt-4o: OpenAI's o200k, which Phi-4-mini uses.

If a file has the name `default` or no name, the converter did not know the tokenizer. llama.cpp
then uses rules with which no model was trained; this package refuses the file. It also refuses
names of llama.cpp whose tokenizer.json was not available for comparison, such as pixtral, falcon3
or deepseek-coder.
"""


@dataclass(frozen=True, kw_only=True, config=ConfigDict(strict=True, allow_inf_nan=False))
class Vocabulary:
    """The metadata of a tokenizer; the fields have the names of the keys in `tokenizer.ggml.`.

    Ids are smaller than the number of tokens. llama.cpp writes -1 for "no id"; it becomes None.
    """

    model: Literal["gpt2", "llama"]
    tokens: Tokens
    pre: str | None = None
    merges: list[Merge] | None = None
    scores: list[float] | None = None
    token_type: list[Kind] | None = None
    bos_token_id: Id = None
    eos_token_id: Id = None
    unknown_token_id: Id = None
    padding_token_id: Id = None
    add_bos_token: bool | None = None
    add_eos_token: bool = False
    add_space_prefix: bool = True

    @property
    def ids(self) -> dict[str, int]:
        """Ids by token."""
        return {token: i for i, token in enumerate(self.tokens)}

    @property
    def types(self) -> list[int]:
        """`gguf.TokenType` of each token."""
        return self.token_type or [TokenType.NORMAL] * len(self.tokens)


def read_vocabulary(metadata: Mapping[str, Any], where: str) -> Vocabulary:
    """Checks and returns the metadata of a tokenizer.

    Raises:
      UserError: a value is missing, has a wrong type or length, or is out of range; the message
        names `where` and the value.
    """
    found = {k.removeprefix(PREFIX): v for k, v in metadata.items() if k.startswith(PREFIX)}
    kind = found.get("model")
    if kind not in REQUIRED:
        raise UserError(
            f"{where}: tokenizer {kind!r} is not supported; supported: {', '.join(REQUIRED)}"
        )
    if absent := [key for key in REQUIRED[kind] if key not in found]:
        raise UserError(f"{where}: metadata {PREFIX}{absent[0]} is missing; give another GGUF file")
    names = {field.name for field in dataclasses.fields(Vocabulary)}
    try:
        vocabulary = Vocabulary(**{k: v for k, v in found.items() if k in names})
    except ValidationError as e:
        problem = e.errors()[0]
        key = ".".join(map(str, problem["loc"]))
        raise UserError(
            f"{where}: metadata {PREFIX}{key} {problem['input']!r:.80}: {problem['msg']}; "
            "download it again"
        ) from None
    size = len(vocabulary.tokens)
    for key in ("scores", "token_type"):
        if (values := getattr(vocabulary, key)) is not None and len(values) != size:
            raise UserError(
                f"{where}: metadata {PREFIX}{key} has {len(values)} entries for {size} tokens; "
                "download it again"
            )
    for role in ROLES.values():
        if (id := getattr(vocabulary, f"{role}_token_id")) is not None and id >= size:
            raise UserError(
                f"{where}: metadata {PREFIX}{role}_token_id is {id}, but there are {size} tokens; "
                "download it again"
            )
    return vocabulary


def load_fast_tokenizer(path: Path) -> "PreTrainedTokenizerFast":
    """Loads the tokenizer of a .gguf file, with its special tokens and chat template.

    Raises:
      UserError: the file is damaged, or the tokenizer's kind is not supported.
    """
    metadata = read_header(path).metadata
    vocabulary = read_vocabulary(metadata, str(path))
    template = metadata.get(TEMPLATE)
    if not isinstance(template, str | None):
        raise UserError(f"{path}: metadata {TEMPLATE} is no text; download it again")
    roles = {role: getattr(vocabulary, f"{key}_token_id") for role, key in ROLES.items()}
    with quiet_transformers():
        from transformers import PreTrainedTokenizerFast

    with loading_tokenizer(path, "download it again"):
        return PreTrainedTokenizerFast(
            tokenizer_object=build(vocabulary, str(path)),
            chat_template=template,
            clean_up_tokenization_spaces=False,
            **{f"{role}_token": vocabulary.tokens[i] for role, i in roles.items() if i is not None},
        )


def build(vocabulary: Vocabulary, where: str, *, space_once: bool = False) -> Tokenizer:
    """Builds a `tokenizers.Tokenizer` from the metadata.

    Args:
      vocabulary: metadata of the tokenizer.
      where: name of the source, for messages.
      space_once: True: SentencePiece's leading space is added only at the start of the text;
        False: also after each special token.

    Raises:
      UserError: the pre-tokenizer is not supported; the message names `where` and the
        pre-tokenizer.
    """
    if vocabulary.model == "gpt2":
        tokenizer, add_bos = _byte_level(vocabulary, where)
    else:
        tokenizer, add_bos = _sentencepiece(vocabulary, space_once), True
    _add_tokens(tokenizer, vocabulary)
    _add_ends(tokenizer, vocabulary, add_bos)
    return tokenizer


def _byte_level(vocabulary: Vocabulary, where: str) -> tuple[Tokenizer, bool]:
    pre = PRE_TOKENIZERS.get(str(vocabulary.pre))
    if pre is None:
        raise UserError(
            f"{where}: pre-tokenizer {vocabulary.pre!r:.80} is not known, so the ids could differ "
            "from those that the model was trained with; give the model's Hugging Face "
            f"folder; known: {', '.join(PRE_TOKENIZERS)}"
        )
    merges = [
        (left, right) for left, _, right in (m.partition(" ") for m in vocabulary.merges or ())
    ]
    tokenizer = Tokenizer(
        models.BPE(vocab=vocabulary.ids, merges=merges, ignore_merges=pre.ignore_merges)
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


def _sentencepiece(vocabulary: Vocabulary, space_once: bool) -> Tokenizer:
    tokens, scores = vocabulary.tokens, vocabulary.scores or ()
    pieces = {
        token: score
        for token, score, kind in zip(tokens, scores, vocabulary.types)
        if kind == TokenType.NORMAL
    }
    tokenizer = Tokenizer(
        models.BPE(
            vocab=vocabulary.ids,
            merges=merges_from_scores(pieces),
            unk_token=tokens[vocabulary.unknown_token_id or 0],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    prefixed = vocabulary.add_space_prefix
    # Metaspace alone adds no space to a text that starts with a space, but SentencePiece does.
    prepend = [normalizers.Prepend(SPACE)] if prefixed and not space_once else []
    tokenizer.normalizer = normalizers.Sequence([*prepend, normalizers.Replace(" ", SPACE)])
    if prefixed and space_once:
        first = pre_tokenizers.Metaspace(" ", prepend_scheme="first", split=False)
        letter = pre_tokenizers.Metaspace(SPACE, prepend_scheme="never", split=False)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([first, letter])
    steps: list[Any] = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if prefixed:
        steps.append(decoders.Strip(content=" ", left=1))
    tokenizer.decoder = decoders.Sequence(steps)
    return tokenizer


def merges_from_scores(pieces: Mapping[str, float]) -> list[tuple[str, str]]:
    """Returns the merges that are equivalent to a SentencePiece BPE vocabulary, best first.

    SentencePiece joins the two neighbours whose union has the highest score. So each split of a
    piece into two pieces of the vocabulary is a merge with the score of the whole piece.
    """
    ranked = sorted(pieces, key=lambda piece: -pieces[piece])  # stable: equal scores by id
    return [
        (piece[:i], piece[i:])
        for piece in ranked
        for i in range(1, len(piece))
        if piece[:i] in pieces and piece[i:] in pieces
    ]


def _add_tokens(tokenizer: Tokenizer, vocabulary: Vocabulary) -> None:
    added = {TokenType.CONTROL: True, TokenType.UNKNOWN: True, TokenType.USER_DEFINED: False}
    # SentencePiece finds user-defined tokens after spaces became ▁, so such a token must be
    # normalized, too. With a space prefix this is impossible: the token would also get the prefix.
    letters = vocabulary.model == "llama" and not vocabulary.add_space_prefix
    marked = [
        (token, added[TokenType(kind)])
        for token, kind in zip(vocabulary.tokens, vocabulary.types)
        if kind in added
    ]
    for special in (True, False):
        chosen = [
            AddedToken(t, normalized=letters and not special and SPACE in t, special=special)
            for t, s in marked
            if s == special
        ]
        (tokenizer.add_special_tokens if special else tokenizer.add_tokens)(chosen)


def _add_ends(tokenizer: Tokenizer, vocabulary: Vocabulary, add_bos: bool) -> None:
    if vocabulary.add_bos_token is not None:
        add_bos = vocabulary.add_bos_token
    bos = vocabulary.bos_token_id if add_bos else None
    eos = vocabulary.eos_token_id if vocabulary.add_eos_token else None
    if bos is None and eos is None:
        return
    before, after = ([] if id is None else [vocabulary.tokens[id]] for id in (bos, eos))
    tokenizer.post_processor = processors.TemplateProcessing(
        single=[*before, "$A", *after],
        pair=[*before, "$A", *after, *before, "$B:1", *after],
        special_tokens=[(vocabulary.tokens[id], id) for id in (bos, eos) if id is not None],
    )
