"""Opens the checkpoint that the `model` section of a config names."""

from collections.abc import Callable
from pathlib import Path

from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from qlora_jax.config import ModelConfig
from qlora_jax.formats.checkpoint import Checkpoint
from qlora_jax.formats.fetch import BUILTIN, fetch
from qlora_jax.formats.gguf import open_gguf
from qlora_jax.formats.huggingface import CONFIG, open_folder
from qlora_jax.formats.shards import INDEX
from qlora_jax.runtime import paths
from qlora_jax.runtime.errors import UserError
from qlora_jax.text import tokenizer

FILE_SUFFIXES = (".gguf", ".safetensors", ".json", ".bin", ".pt", ".pth")
HUB_FILES = [CONFIG, INDEX, "model*.safetensors", *tokenizer.FILES]


def open_checkpoint(
    model: ModelConfig, warn: Callable[[str], None] = lambda line: None
) -> Checkpoint:
    """Opens the model that `model.path` names: a built-in, a folder, a .gguf file or a hub id.

    Downloads a built-in model or a hub id into its cache first. Obeys HF_HUB_OFFLINE.

    Args:
      model: the section `model` of the config.
      warn: callback that gets one line for each note of the checkpoint.

    Raises:
      UserError: `model.path` names nothing, or the model cannot be used.
    """
    checkpoint = _open(model)
    for note in checkpoint.notes:
        warn(f"warning: {note}")
    return checkpoint


def _open(model: ModelConfig) -> Checkpoint:
    path = Path(model.path).expanduser()
    local = model.path in BUILTIN or paths.exists(path) or _looks_local(model.path)
    if local and model.revision is not None:
        raise UserError(
            f"model.revision: {model.path} is not a hub id and has no revisions; remove it"
        )
    if model.path in BUILTIN:
        return open_gguf(fetch(model.path))
    if paths.is_dir(path):
        return open_folder(path)
    if path.suffix == ".gguf" and paths.is_file(path):
        return open_gguf(path)
    if paths.exists(path):
        raise UserError(
            f"{model.path}: a model is a Hugging Face folder or a .gguf file; give the folder"
        )
    if local:
        raise UserError(f"{model.path}: no such file or folder; correct model.path")
    return open_folder(_download(model.path, model.revision))


def _looks_local(path: str) -> bool:
    return path.startswith((".", "/", "~")) or path.endswith(FILE_SUFFIXES) or path.count("/") > 1


def _download(repository: str, revision: str | None) -> Path:
    try:
        return Path(snapshot_download(repository, revision=revision, allow_patterns=HUB_FILES))
    except HFValidationError:
        raise UserError(
            f"{repository}: not a folder, a file, a hub id or a built-in model "
            f"({', '.join(BUILTIN)}); correct model.path"
        ) from None
    except GatedRepoError:
        raise UserError(
            f"{repository}: access is restricted; accept its terms and log in"
        ) from None
    except RepositoryNotFoundError:
        raise UserError(
            f"{repository}: no such model on the hub; the built-in ones are: {', '.join(BUILTIN)}"
        ) from None
    except RevisionNotFoundError:
        raise UserError(
            f"model.revision: {repository} has no revision {revision!r}; "
            "correct it, or leave it out"
        ) from None
    except LocalEntryNotFoundError:
        why = (
            "HF_HUB_OFFLINE is set" if constants.is_offline_mode() else "the hub cannot be reached"
        )
        raise UserError(
            f"{repository}: not in the local hub cache, and {why}; give a local folder, "
            f"a .gguf file or a built-in model ({', '.join(BUILTIN)})"
        ) from None
    except (HfHubHTTPError, OSError) as e:
        raise UserError(
            f"{repository}: download failed ({str(e).splitlines()[0]}); try again"
        ) from None
