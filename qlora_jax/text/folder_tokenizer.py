"""The tokenizer of a Hugging Face folder: its tokenizer.json as it is, or what stands in for it.

transformers 5 makes the tokenizer of most families anew from the vocabulary alone, with the
pre-tokenizer, normalizer and decoder that the family's class has, and not those of tokenizer.json.
The model was trained with those of the file. So transformers is asked only for what stands in the
other files: special tokens, further tokens and chat templates.
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
"""Patterns of what transformers reads beside the settings."""
DAMAGED = "download it again"
ENDS = ("add_bos_token", "add_eos_token")
OBEYS_ENDS = ("Llama", "CodeLlama", "Gemma", "Cohere", "GPTNeoX")
"""Names of classes, without `Tokenizer`, whose tokenizer adds a token at an end where
tokenizer_config.json says so, whatever tokenizer.json does (transformers 4, as the models were
published for; every other class leaves it to tokenizer.json)."""


def load_folder(path: Path) -> Any:
    """Loads the transformers tokenizer of a folder that has one of `tokenizer.FOLDER_FILES`.

    Ids, offsets and decoded text are those of tokenizer.json, where there is one. A tokenizer.model
    alone gives SentencePiece's ids. No code of the folder is run.

    Raises:
      UserError: a damaged or unknown file, or a tokenizer that is code.
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
    """Raises UserError for a tokenizer whose class is not transformers' own but the folder's."""
    code, name = settings.get("auto_map"), settings.get("tokenizer_class")
    if not code or (isinstance(code, dict) and not code.get("AutoTokenizer")):
        return
    with quiet_transformers(), loading_tokenizer(path / SETTINGS, DAMAGED):
        import transformers

        if isinstance(name, str) and hasattr(transformers, name):
            return
    raise UserError(
        f"{path}: the tokenizer needs code that the folder brings (auto_map in {SETTINGS}), and "
        f"such code is never run; if {FILE} is all that it needs, remove auto_map"
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
    """Puts the file's tokenizer in the place of what transformers made of it.

    Tokens that only the other files name are added. Those that the file has stay as it has them.
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
    """The tokenizer of a tokenizer.model, by way of a tokenizer.json made of it."""
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
                f"{path}: token {token!r:.80} has the id {id} in {SETTINGS} or {ADDED}, and "
                f"{found} beside {PIECES}; give the folder a {FILE}"
            )
    return fast


def _declared(path: Path, settings: Mapping[str, Any]) -> dict[int, str]:
    """Returns tokens by the ids that the settings, or else added_tokens.json, give them."""
    with loading_tokenizer(path / SETTINGS, DAMAGED):
        if "added_tokens_decoder" in settings:
            tokens = settings["added_tokens_decoder"].items()
            return {int(id): str(token["content"]) for id, token in tokens}
    if not paths.is_file(path / ADDED):
        return {}
    with loading_tokenizer(path / ADDED, DAMAGED):
        tokens = json_files.read_object(path / ADDED, DAMAGED).items()
        return {int(id): token for token, id in tokens}
