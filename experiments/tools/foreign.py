"""Opens other tools' files, and checks their logits and token ids.

Every model folder, adapter folder and .gguf file below FOLDER is opened as `generate` opens it. If
the folder holds a `reference.npz` with `tokens` and `logits`, the logits in float32 are compared
with the reference. If it holds a tokenizer.json, the ids of some texts are compared with those of
the `tokenizers` library. The model of an adapter is the folder next to it whose name starts with
"base".

Expected: each is right, or refused in one line that names the file and the remedy.
Cost: a second or two for each tiny model.
Command: python -m experiments.tools.foreign FOLDER [--json]
"""

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from qlora_jax.runtime.errors import UserError

TOLERANCE = 1e-5
"""Largest difference of logits that counts as rounding, relative to the largest logit."""
TEXTS = ("\n\n1.", "hello 123", "  def f(x):\n\treturn x\n", "naïve 漢字かな 한국 🙂‍↔️", "a  b   c ")


class Outcome(NamedTuple):
    """Result of opening one file or folder.

    Attributes:
      path: path of the file or folder.
      verdict: right, read (there is nothing to compare with), refused, wrong or failed.
      detail: difference, message or error.
    """

    path: str
    verdict: str
    detail: str


def main(arguments: list[str]) -> int:
    """Opens all models and adapters below a folder, prints the outcomes, returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    found = [outcome(path, options.folder) for path in candidates(options.folder)]
    if options.json:
        print(json.dumps([row._asdict() for row in found], indent=2))
    else:
        for row in found:
            print(f"{row.verdict:8}{row.path}: {row.detail}")
        print(", ".join(f"{n} {verdict}" for verdict, n in Counter(r[1] for r in found).items()))
    return any(row.verdict in ("wrong", "failed") for row in found)


def candidates(root: Path) -> Iterator[Path]:
    """Yields the model folders, adapter folders and .gguf files below a folder."""
    for path in sorted(root.rglob("*")):
        names = ("config.json", "adapter_config.json")
        if path.suffix == ".gguf" or (path.is_dir() and any((path / n).exists() for n in names)):
            yield path


def outcome(path: Path, root: Path) -> Outcome:
    """Opens one model or adapter and compares it with its references."""
    shown = str(path.relative_to(root))
    try:
        differences = compare(path)
    except UserError as e:
        return Outcome(shown, "refused", str(e).replace(str(root), "."))
    except Exception as e:  # every other exception is a fault
        return Outcome(shown, "failed", f"{type(e).__name__}: {e}")
    if not differences:
        return Outcome(shown, "read", "nothing to compare with")
    right = all(ok for ok, _ in differences)
    return Outcome(shown, "right" if right else "wrong", "; ".join(text for _, text in differences))


def compare(path: Path) -> list[tuple[bool, str]]:
    """Returns, for logits and for ids, whether they are right, and a text about the comparison.

    Raises:
      UserError: the file is refused.
    """
    from qlora_jax.formats.peft import read_adapter
    from qlora_jax.serve.base import open_base
    from qlora_jax.text import tokenizer

    adapter = path if (path / "adapter_config.json").exists() else None
    models = sorted(path.parent.glob("base*")) if adapter else [path]
    if adapter and not models:
        read_adapter(adapter)
        return []
    if not adapter and path.is_dir() and not any(path.glob("*.safetensors")):
        return [_ids(tokenizer.load_tokenizer(path), path / "tokenizer.json")]
    base = open_base(
        str(models[0]), bits=16, dtype="float32", warn=lambda line: None, adapter=adapter
    )
    reference: Any = {}
    if (path / "reference.npz").exists():
        reference = np.load(path / "reference.npz")
    found = []
    if "logits" in reference:
        found.append(_logits(base.model, reference["tokens"], reference["logits"]))
    if (path / "tokenizer.json").exists():
        found.append(_ids(base.tokenizer, path / "tokenizer.json"))
    return found


def _logits(model: Any, tokens: np.ndarray, expected: np.ndarray) -> tuple[bool, str]:
    ids = jnp.asarray(tokens)
    positions = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
    hidden = model.hidden(ids, jnp.ones_like(ids), positions, dtype=jnp.float32)
    difference = float(np.abs(np.asarray(model.logits(hidden)) - expected).max())
    most = float(np.abs(expected).max())
    return difference <= TOLERANCE * most, f"logits differ by {difference:.1e} of {most:.2g}"


def _ids(text: Any, file: Path) -> tuple[bool, str]:
    from tokenizers import Tokenizer

    truth = Tokenizer.from_file(str(file))
    truth.no_truncation()
    truth.no_padding()
    other = [t for t in TEXTS if text.encode(t) != truth.encode(t, add_special_tokens=False).ids]
    return not other, f"ids of {len(TEXTS) - len(other)} of {len(TEXTS)} texts are equal"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
