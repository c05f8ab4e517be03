"""Reads and writes manifest.json: the details to repeat a run and explain differences."""

import dataclasses
import datetime
import json
import os
import platform
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qlora_jax.runtime import format_version, json_files
from qlora_jax.runtime.atomic import write_text
from qlora_jax.runtime.device import cpu_cores, cpu_name, describe_devices
from qlora_jax.runtime.paths import PACKAGE
from qlora_jax.runtime.versions import versions

NAME = "manifest.json"
_SESSION = (
    *("started", "finished", "command", "versions", "git", "devices", "machine", "environment"),
    *("base_hash", "base_sha256"),
)


def build(config: Any, command: str, extra: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Returns the manifest of a run that starts now.

    Args:
      config: config of the run, a dataclass with JSON values.
      command: command that started the run.
      extra: further entries for the top level, e.g. `base_hash` and `codebook_sha256`.

    Raises:
      ValueError: an extra entry has the same name as a standard entry.
    """
    devices, tree = describe_devices(), dataclasses.asdict(config)
    entries = {
        format_version.KEY: format_version.NEWEST,
        "started": now(),
        "finished": None,
        "command": command,
        "seed": tree["train"]["seed"],
        "config_sha256": json_files.digest(tree),
        "config": tree,
        "versions": versions(),
        "git": git_state(),
        "devices": {
            "backend": devices.backend,
            "kind": devices.kind,
            "count": devices.count,
        },
        "machine": {
            "platform": platform.platform(),
            "cpu": cpu_name(),
            "cores": cpu_cores(),
            "memory_bytes": _memory_bytes(),
        },
        "environment": {
            k: v for k, v in sorted(os.environ.items()) if k.startswith(("JAX_", "XLA_", "GLIBC_"))
        },
    }
    if twice := entries.keys() & (extra or {}).keys():
        raise ValueError(f"the manifest already records {', '.join(sorted(twice))}")
    return entries | dict(extra or {})


def write(run_dir: str | Path, manifest: Mapping[str, Any], *, resumed: bool = False) -> Path:
    """Writes manifest.json.

    With `resumed`, the entries of the run's earlier sessions (versions, command, devices) are kept
    as a list under `earlier`.

    Raises:
      UserError: the folder is not writable, or the existing manifest of a resumed run is
        unreadable.
    """
    path = Path(run_dir) / NAME
    manifest = dict(manifest)
    if resumed and path.exists():
        previous = read(run_dir)
        session = {k: previous[k] for k in _SESSION if k in previous}
        manifest["earlier"] = [*previous.get("earlier", []), session]
    write_text(path, json.dumps(manifest, indent=2, ensure_ascii=False) + "\n")
    return path


def finish(run_dir: str | Path, extra: Mapping[str, Any] | None = None) -> Path:
    """Adds the end time and `extra` to the existing manifest.

    Raises:
      UserError: the manifest cannot be read or written; see `read` and `write`.
    """
    return write(run_dir, read(run_dir) | {"finished": now()} | dict(extra or {}))


def read(run_dir: str | Path) -> dict[str, Any]:
    """Reads the manifest of a run.

    Raises:
      UserError: the manifest is missing, is not JSON, or has a newer format.
    """
    path = Path(run_dir) / NAME
    found = json_files.read_object(
        path,
        "restore it, or delete it to go on",
        f"no such file; is {run_dir} a run directory?",
    )
    format_version.check(found, path)
    return found


def base_hash(manifest: Mapping[str, Any]) -> str | None:
    """Returns a manifest's hash of the base with the hash's version, such as 2:9f86d0….

    Manifests from before the versions hold a hash of version 1 as `base_sha256`. None if the
    manifest has neither entry.
    """
    if "base_hash" in manifest:
        return manifest["base_hash"]
    old = manifest.get("base_sha256")
    return None if old is None else f"1:{old}"


def git_state(folder: str | Path = PACKAGE) -> dict[str, Any] | None:
    """Returns the commit of this code's checkout, and whether there are uncommitted changes.

    None if git is missing or does not track this code, such as an installed package (also inside
    another repository).
    """
    try:
        tracked = _git(folder, "ls-files", "--error-unmatch", "--", ".")
        commit = _git(folder, "rev-parse", "HEAD")
        changes = _git(folder, "status", "--porcelain", "--", ".")
    except (OSError, subprocess.SubprocessError):
        return None
    return {"commit": commit, "modified": bool(changes)} if tracked else None


def _git(folder: str | Path, *arguments: str) -> str:
    result = subprocess.run(
        ["git", "-C", str(folder), *arguments],
        capture_output=True,
        text=True,
        check=True,
        timeout=20,
    )
    return result.stdout.strip()


def now() -> str:
    """Returns the current time in UTC, in ISO 8601."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def _memory_bytes() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None
