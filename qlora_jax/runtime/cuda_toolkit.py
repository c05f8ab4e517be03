"""Where jax finds CUDA's ptxas. To be said before jax is imported.

jax (`_cuda_path` of 0.10.2, 0.11.2 and 0.12.0) takes `CUDA_ROOT`, else the folder of pip's package
nvidia.cu13, else that of nvidia.cuda_nvcc, and does not look whether ptxas is in it: packages with
CUDA's libraries alone make nvidia/cu13 too. What it then answers is that folder, or the text
"None". Every program for a GPU is compiled with it as XLA's `xla_gpu_cuda_data_dir`, and Mosaic
GPU sets `MOSAIC_GPU_CUDA_ROOT` to it, in place of its default of /usr/local/cuda.
"""

import importlib.util
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, MutableMapping
from pathlib import Path

VARIABLE = "CUDA_ROOT"
PTXAS = Path("bin", "ptxas")
PACKAGES = ("cu13", "cuda_nvcc")
"""Packages below pip's `nvidia`; jax takes the first that is there."""
USUAL = Path("/usr/local/cuda")


def point(environment: MutableMapping[str, str] = os.environ) -> None:
    """Sets `CUDA_ROOT` to a toolkit on this machine if jax would look where no ptxas is.

    A variable that is set stays. Where there is no toolkit either, nothing is set.
    """
    if VARIABLE in environment or jax_finds(_nvidia()):
        return
    found = next((root for root in roots(environment) if (root / PTXAS).is_file()), None)
    if found is not None:
        environment[VARIABLE] = str(found)


def jax_finds(nvidia: Iterable[Path]) -> bool:
    """Whether ptxas is in the pip package that jax takes.

    Args:
      nvidia: the folders of pip's package `nvidia`.
    """
    for package in PACKAGES:
        folders = [folder / package for folder in nvidia if (folder / package).is_dir()]
        if folders:
            return any((folder / PTXAS).is_file() for folder in folders)
    return False


def roots(environment: Mapping[str, str]) -> Iterator[Path]:
    """Folders where a toolkit may be: the variables' two, that of PATH's ptxas, the usual one."""
    for name in ("CUDA_HOME", "CUDA_PATH"):
        if environment.get(name):
            yield Path(environment[name])
    if on_path := shutil.which(PTXAS.name, path=environment.get("PATH", "")):
        yield Path(on_path).resolve().parent.parent
    yield USUAL


def _nvidia() -> list[Path]:
    spec = importlib.util.find_spec("nvidia")  # imports nothing
    return [Path(folder) for folder in (spec and spec.submodule_search_locations) or ()]
