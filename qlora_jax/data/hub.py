"""Reads the rows of a data set from the Hugging Face hub, or from a local copy."""

import logging
from collections.abc import Callable, Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from qlora_jax.data import files
from qlora_jax.runtime import paths
from qlora_jax.runtime.errors import UserError, first_line

NAMED = 5
"""Maximum number of files that a warning names."""


def read_rows(
    source: str, name: str | None, split: str, warn: Callable[[str], None] = lambda line: None
) -> Iterator[tuple[dict[str, Any], str]]:
    """Yields (row, place) of one split.

    Args:
      source: hub id, or path of a folder of data files.
      name: configuration, for data sets that have several.
      split: split in the syntax of `datasets`, such as `train` or `train[:1000]`.
      warn: function that gets a one-line warning if data files of a folder belong to no split.

    Raises:
      UserError: the hub cannot be reached, or the data set, configuration or split does not exist.
    """
    import datasets
    from huggingface_hub import constants
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    # Each retry would log a line, but the error at the end already contains the reason.
    chatty = [logging.getLogger(n) for n in ("huggingface_hub", "datasets")]
    levels = [logger.level for logger in chatty]
    for logger in chatty:
        logger.setLevel(logging.ERROR)
    offline = constants.HF_HUB_OFFLINE
    if not offline and not paths.is_dir(source) and not reachable(source):
        # Otherwise `datasets` retries five times (30 s) before it looks into its cache.
        constants.HF_HUB_OFFLINE = True
    try:
        data = datasets.load_dataset(source, name, split=split)
        if paths.is_dir(source) and (left := _left_out(Path(source), name)):
            more = f" and {len(left) - NAMED:,} more" if len(left) > NAMED else ""
            warn(
                f"warning: {source}: not read, because they belong to no split: "
                f"{', '.join(left[:NAMED])}{more}; list the files in data.source, or put the name "
                "of the split into their names"
            )
    except ConnectionError:
        raise UserError(
            f"{source}: the hub cannot be reached and the data set is not in the local "
            "cache; give a local file, or the built-in python-docs"
        ) from None
    except datasets.exceptions.DatasetNotFoundError:
        raise UserError(
            f"{source}: neither a local file nor a data set on the hub that you may "
            "read; correct data.source, or log in to the hub"
        ) from None
    except (HfHubHTTPError, HFValidationError, datasets.exceptions.DatasetsError) as e:
        raise UserError(f"{source}: {first_line(e)}; correct data.source") from None
    except (ValueError, OSError, RuntimeError) as e:
        raise UserError(
            f"{source}, split {split}: {first_line(e)}; correct data.source, data.name or "
            "data.split"
        ) from None
    finally:
        constants.HF_HUB_OFFLINE = offline
        for logger, level in zip(chatty, levels):
            logger.setLevel(level)
    for number, row in enumerate(data, 1):
        yield dict(row), f"{source} {split} row {number}"


def _left_out(folder: Path, name: str | None) -> list[str]:
    """Returns the data files of a folder that `datasets` assigns to no split."""
    import datasets

    builder = datasets.load_dataset_builder(str(folder), name)
    patterns = [
        str(file).removeprefix(f"{folder.resolve()}/").removeprefix("./")
        for config in (builder.config, *builder.builder_configs.values())
        for assigned in (config.data_files or {}).values()
        for file in assigned
    ]
    there = (path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.is_file())
    shown = (path for path in there if not any(p.startswith((".", "__")) for p in path.parts))
    return [
        str(path)
        for path in shown
        if files.ending(path)
        and str(path) not in patterns
        and not any(fnmatch(str(path), pattern) for pattern in patterns)
    ]


def reachable(source: str) -> bool:
    """Returns whether the hub answers; an error response (no such data set) is also an answer."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        HfApi().dataset_info(source, timeout=10)
    except (HfHubHTTPError, HFValidationError):
        return True
    except Exception:  # the exception types depend on the HTTP library of huggingface_hub
        return False
    return True
