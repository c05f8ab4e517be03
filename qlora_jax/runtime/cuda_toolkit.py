"""Sets the folder in which jax finds CUDA's ptxas; must run before jax is imported.

jax (`_cuda_path` of 0.10.2, 0.11.2 and 0.12.0) takes the first of `CUDA_ROOT`, the folder of pip's
package nvidia.cu13, and the folder of nvidia.cuda_nvcc. It does not check whether the folder holds
ptxas; packages with only CUDA's libraries also create nvidia/cu13. The result is this folder, or
the text "None". XLA compiles every GPU program with the result as `xla_gpu_cuda_data_dir`, and
Mosaic GPU sets `MOSAIC_GPU_CUDA_ROOT` to it instead of its default /usr/local/cuda.
"""

import importlib.util
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, MutableMapping
from pathlib import Path

VARIABLE = "CUDA_ROOT"
PTXAS = Path("bin", "ptxas")
PACKAGES = ("cu13", "cuda_nvcc")
"""Packages in pip's `nvidia`; jax takes the first one that is installed."""
USUAL = Path("/usr/local/cuda")


def point(environment: MutableMapping[str, str] = os.environ) -> None:
    """Sets `CUDA_ROOT` to this machine's CUDA toolkit if jax would find no ptxas.

    If the variable is already set, or there is no toolkit, nothing changes.
    """
    if VARIABLE in environment or jax_finds(_nvidia()):
        return
    found = next((root for root in roots(environment) if (root / PTXAS).is_file()), None)
    if found is not None:
        environment[VARIABLE] = str(found)


def jax_finds(nvidia: Iterable[Path]) -> bool:
    """Returns whether ptxas is in the pip package that jax takes.

    Args:
      nvidia: folders of pip's package `nvidia`.
    """
    for package in PACKAGES:
        folders = [folder / package for folder in nvidia if (folder / package).is_dir()]
        if folders:
            return any((folder / PTXAS).is_file() for folder in folders)
    return False


def roots(environment: Mapping[str, str]) -> Iterator[Path]:
    """Yields possible toolkit folders: $CUDA_HOME, $CUDA_PATH, that of PATH's ptxas, `USUAL`."""
    for name in ("CUDA_HOME", "CUDA_PATH"):
        if environment.get(name):
            yield Path(environment[name])
    if on_path := shutil.which(PTXAS.name, path=environment.get("PATH", "")):
        yield Path(on_path).resolve().parent.parent
    yield USUAL


def _nvidia() -> list[Path]:
    spec = importlib.util.find_spec("nvidia")  # imports nothing
    return [Path(folder) for folder in (spec and spec.submodule_search_locations) or ()]
