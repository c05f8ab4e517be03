"""Loads the tokenizer of a Hugging Face folder: its unchanged tokenizer.json, or a replacement.

For most model families, transformers 5 uses only the vocabulary of tokenizer.json. It takes the
pre-tokenizer, normalizer and decoder from the family's class. But the model was trained with those
of tokenizer.json. Therefore this module takes the whole tokenizer from tokenizer.json, and uses
transformers only to read the other files: special tokens, added tokens and chat templates.
"""

import json
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer as Backend

from qlora_jax.runtime import json_files, paths
from qlora_jax.runtime.errors import UserError
from qlora_jax.runtime.quiet import loading_tokenizer, quiet_transformers
from qlora_jax.text import sentencepiece_model

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

FILE = "tokenizer.json"
PIECES = "tokenizer.model"
TEKKEN = "tekken.json"
SETTINGS = "tokenizer_config.json"
ADDED = "added_tokens.json"
BESIDE = ("special_tokens_map.json", ADDED, "chat_template*", "additional_chat_templates*")
"""Patterns of the files that transformers reads in addition to `SETTINGS`."""
DAMAGED = "download it again"
ENDS = ("add_bos_token", "add_eos_token")
OBEYS_ENDS = ("Llama", "CodeLlama", "Gemma", "Cohere", "GPTNeoX")
"""Names of classes, without `Tokenizer`, that add begin and end tokens as tokenizer_config.json
says, even if tokenizer.json says otherwise. For all other classes tokenizer.json decides. This is
the behaviour of transformers 4, for which the models were published."""


def load_folder(path: Path) -> Any:
    """Loads the transformers tokenizer of a folder that has one of `tokenizer.FOLDER_FILES`.

    If the folder has a tokenizer.json, it decides ids, offsets and decoded text. If there is only
    a tokenizer.model, the ids are SentencePiece's. Code in the folder is never run.

    Raises:
      UserError: a file is damaged or unknown, or the tokenizer needs code from the folder.
    """
    settings = _settings(path)
    _refuse_code(path, settings)
    if paths.is_file(path / FILE):
        return _from_file(path, settings, path)
    if paths.is_file(path / PIECES) and not paths.is_file(path / TEKKEN):
        return _from_pieces(path, settings)
    with loading_tokenizer(path, f"{DAMAGED}, with its {FILE}"):
        with quiet_transformers():
            from transformers import AutoTokenizer
        return AutoTokenizer.from_pretrained(
            str(path), local_files_only=True, trust_remote_code=False
        )


def _settings(path: Path) -> dict[str, Any]:
    if not paths.is_file(path / SETTINGS):
        return {}
    return json_files.read_object(path / SETTINGS, DAMAGED)


def _refuse_code(path: Path, settings: Mapping[str, Any]) -> None:
    """Raises UserError if the tokenizer's class is code in the folder, not in transformers."""
    code, name = settings.get("auto_map"), settings.get("tokenizer_class")
    if not code or (isinstance(code, dict) and not code.get("AutoTokenizer")):
        return
    with quiet_transformers(), loading_tokenizer(path / SETTINGS, DAMAGED):
        import transformers

        if isinstance(name, str) and hasattr(transformers, name):
            return
    raise UserError(
        f"{path}: the tokenizer needs code from the folder (auto_map in {SETTINGS}), and such "
        f"code is never run; if {FILE} alone is enough, remove auto_map"
    )


def _from_file(path: Path, settings: Mapping[str, Any], where: Path) -> "PreTrainedTokenizerFast":
    with quiet_transformers():
        from transformers import PreTrainedTokenizerFast
    with loading_tokenizer(where, f"{DAMAGED}, with its {FILE}"):
        backend = Backend.from_file(str(path / FILE))
        fast = PreTrainedTokenizerFast.from_pretrained(
            str(path), local_files_only=True, trust_remote_code=False, fix_mistral_regex=False
        )
        _replace_backend(fast, backend)
        _obey_ends(fast, settings)
        fast.name_or_path = str(where)
    return fast


def _replace_backend(fast: "PreTrainedTokenizerFast", backend: Backend) -> None:
    """Replaces the tokenizer that transformers made by the tokenizer of tokenizer.json.

    Tokens that only the other files name are added. The tokens of tokenizer.json are unchanged.
    """
    names = {token.content for token in backend.get_added_tokens_decoder().values()}
    added = sorted(fast.added_tokens_decoder.items())
    backend.add_tokens([token for _, token in added if token.content not in names])
    fast._tokenizer = backend


def _obey_ends(fast: "PreTrainedTokenizerFast", settings: Mapping[str, Any]) -> None:
    name = str(settings.get("tokenizer_class")).removesuffix("Fast").removesuffix("Tokenizer")
    told = {key: settings[key] for key in ENDS if isinstance(settings.get(key), bool)}
    if name in OBEYS_ENDS and "add_bos_token" in told:
        for key, value in told.items():
            setattr(fast, key, value)


def _from_pieces(path: Path, settings: Mapping[str, Any]) -> "PreTrainedTokenizerFast":
    """Loads a tokenizer.model: converts it to a temporary tokenizer.json, and loads that file."""
    declared = _declared(path, settings)
    backend, named = sentencepiece_model.read(path / PIECES, settings, declared)
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        backend.save(str(folder / FILE))
        (folder / SETTINGS).write_text(json.dumps(named | dict(settings)), encoding="utf-8")
        for pattern in BESIDE:
            for source in path.glob(pattern):
                copy = shutil.copytree if source.is_dir() else shutil.copyfile
                copy(source, folder / source.name)
        fast = _from_file(folder, {}, path)
    for id, token in declared.items():
        if (found := fast.backend_tokenizer.token_to_id(token)) != id:
            raise UserError(
                f"{path}: token {token!r:.80} has the id {id} in {SETTINGS} or {ADDED}, but the "
                f"id {found} with {PIECES}; add a {FILE} to the folder"
            )
    return fast


def _declared(path: Path, settings: Mapping[str, Any]) -> dict[int, str]:
    """Returns added tokens by id, from the settings or else from added_tokens.json."""
    with loading_tokenizer(path / SETTINGS, DAMAGED):
        if "added_tokens_decoder" in settings:
            tokens = settings["added_tokens_decoder"].items()
            return {int(id): str(token["content"]) for id, token in tokens}
    if not paths.is_file(path / ADDED):
        return {}
    with loading_tokenizer(path / ADDED, DAMAGED):
        tokens = json_files.read_object(path / ADDED, DAMAGED).items()
        return {int(id): token for token, id in tokens}
