"""Rows of a data set on the Hugging Face hub, or of a local copy of one."""

import logging
from collections.abc import Callable, Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from qlora_jax.data import files
from qlora_jax.runtime import paths
from qlora_jax.runtime.errors import UserError, first_line

NAMED = 5
"""Files that a warning names."""


def read_rows(
    source: str, name: str | None, split: str, warn: Callable[[str], None] = lambda line: None
) -> Iterator[tuple[dict[str, Any], str]]:
    """Yields (row, place) of one split.

    Args:
      source: hub id, or a folder of data files.
      name: configuration, for data sets that have several.
      split: name of the split, in the form `datasets` takes: `train`, `train[:1000]`.
      warn: called with one line where data files of a folder belong to no split.

    Raises:
      UserError: no network, no such data set, configuration or split.
    """
    import datasets
    from huggingface_hub import constants
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    # Retries are announced one line each; the one error that follows says it all.
    chatty = [logging.getLogger(n) for n in ("huggingface_hub", "datasets")]
    levels = [logger.level for logger in chatty]
    for logger in chatty:
        logger.setLevel(logging.ERROR)
    offline = constants.HF_HUB_OFFLINE
    if not offline and not paths.is_dir(source) and not reachable(source):
        # Else the library tries five times, half a minute long, before it looks into its cache.
        constants.HF_HUB_OFFLINE = True
    try:
        data = datasets.load_dataset(source, name, split=split)
        if paths.is_dir(source) and (left := _left_out(Path(source), name)):
            more = f" and {len(left) - NAMED:,} more" if len(left) > NAMED else ""
            warn(
                f"warning: {source}: {', '.join(left[:NAMED])}{more}: in no split, and so not "
                "read; list the files in data.source, or rename them after the split"
            )
    except ConnectionError:
        raise UserError(
            f"{source}: the hub cannot be reached and the data set is not in the local "
            "cache; give a local file, or the built-in python-docs"
        ) from None
    except datasets.exceptions.DatasetNotFoundError:
        raise UserError(
            f"{source}: neither a file here nor a data set on the hub that you can "
            "read; correct it, or log in"
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
    """Data files of a folder that `datasets` puts into no split, by their names' patterns."""
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
    """Whether the hub answers, if only to say that there is no such data set."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        HfApi().dataset_info(source, timeout=10)
    except (HfHubHTTPError, HFValidationError):
        return True
    except Exception:  # whichever HTTP library huggingface_hub uses has its own types
        return False
    return True
