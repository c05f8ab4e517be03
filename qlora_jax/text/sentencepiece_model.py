"""Converts a SentencePiece tokenizer.model to a tokenizer of the `tokenizers` package.

The conversion of transformers is not used: for a text that starts with a space, its ids differ
from SentencePiece's.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gguf import TokenType
from tokenizers import Tokenizer

from qlora_jax.runtime import paths
from qlora_jax.runtime.errors import UserError
from qlora_jax.runtime.quiet import loading_tokenizer
from qlora_jax.text.gguf_vocabulary import Vocabulary, build

BPE = 2
"""Value of the trainer's `model_type` for BPE."""
ROLES = ("bos", "eos", "unk", "pad")
REMEDY = "give the folder a tokenizer.json"


def read(
    path: Path, settings: Mapping[str, Any], special: Mapping[int, str]
) -> tuple[Tokenizer, dict[str, str]]:
    """Builds the tokenizer of a tokenizer.model.

    The ids are the same as SentencePiece's. Special tokens in a text get their ids and cut the
    text into parts. Each part is encoded like a separate text. With `legacy: false` the parts after
    the first get no space in front.

    Args:
      path: path of the tokenizer.model.
      settings: content of tokenizer_config.json.
      special: special tokens by id; a special token replaces the piece with the same id.

    Returns:
      The tokenizer, and the model's special tokens by name: `bos_token`, `eos_token` and so on.

    Raises:
      UserError: the file is not a SentencePiece model, or the kind of model is not supported.
    """
    with loading_tokenizer(path, REMEDY):
        from sentencepiece import sentencepiece_model_pb2

        try:
            schema = sentencepiece_model_pb2.ModelProto  # type: ignore[attr-defined]
            model = schema.FromString(path.read_bytes())
        except OSError as e:
            raise paths.unreadable(path, e) from None
        if fault := _fault(model):
            raise UserError(f"{path}: a SentencePiece model {fault} is not supported; {REMEDY}")
        ids = {role: getattr(model.trainer_spec, f"{role}_id") for role in ROLES}
        vocabulary = _vocabulary(model, settings, special, ids)
        once = settings.get("legacy") is False
        named = {f"{role}_token": vocabulary.tokens[i] for role, i in ids.items() if i >= 0}
        return build(vocabulary, str(path), space_once=once), named


def _fault(model: Any) -> str:
    """Returns the unsupported property of the model, or an empty string."""
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    kinds = {piece.type for piece in model.pieces}
    faults = {
        "of another type than BPE": trainer.model_type != BPE,
        f"with the normalization {normalizer.name}": bool(normalizer.precompiled_charsmap),
        "that removes spaces": normalizer.remove_extra_whitespaces,
        "that keeps spaces as they are": not normalizer.escape_whitespaces,
        "with the space after a word": trainer.treat_whitespace_as_suffix,
        "with unused pieces": TokenType.UNUSED in kinds,
        "with user-defined pieces and a space put in front": (
            TokenType.USER_DEFINED in kinds and normalizer.add_dummy_prefix
        ),
    }
    return next((fault for fault, found in faults.items() if found), "")


def _vocabulary(
    model: Any, settings: Mapping[str, Any], special: Mapping[int, str], ids: Mapping[str, int]
) -> Vocabulary:
    tokens: list[str] = []
    kinds: list[int] = []
    for i, piece in enumerate(model.pieces):
        name, kind = piece.piece, TokenType(piece.type)
        if special.get(i, name) != name:
            name, kind = special[i], TokenType.CONTROL
        tokens.append(name)
        kinds.append(kind)
    bos, eos = (settings.get(f"add_{end}_token") for end in ("bos", "eos"))
    return Vocabulary(
        model="llama",
        tokens=tokens,
        scores=[piece.score for piece in model.pieces],
        token_type=kinds,
        bos_token_id=ids["bos"],
        eos_token_id=ids["eos"],
        unknown_token_id=ids["unk"],
        add_bos_token=bos if isinstance(bos, bool) else None,
        add_eos_token=eos is True,
        add_space_prefix=model.normalizer_spec.add_dummy_prefix,
    )
