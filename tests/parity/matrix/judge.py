"""Judges a case by its logits: right, refused clearly, wrong, or no model to compare with."""

import dataclasses
import re
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from qlora_jax.runtime.errors import UserError

RIGHT, REFUSED, WRONG, NO_MODEL = "right", "refused", "wrong", "no model"

TOLERANCE = 1e-5
"""Largest difference that counts as rounding, relative to the largest logit."""

REFUSALS: Mapping[str, str] = {
    "a function of the MLP": r"(hidden_act|hidden_activation|activation_function) '\w+' is not",
    "attention in both directions": r"use_bidirectional_attention True is not",
    "OPT's other norms": r"(norm_before|final_layer_norm|elementwise_affine) (True|False) is not",
    "OPT's projected embeddings": r"shapes do not agree .*embed_tokens\.weight is \[\d+, \d+\]",
    "another quantization": r"quantization_config \(.*\): ",
    "an initializer that changes the base": r"init_lora_weights .* changes the base",
    "DoRA of embedding or head": r"use_dora with an adapter of \S+ is not supported",
    "another kind of adapter": r"is set, and only LoRA and DoRA adapters are supported",
}
"""Kind of refusal, with its name in docs/formats.md, to the pattern of its messages."""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """The outcome of one case.

    Attributes:
      group: group under which the case is counted, for example the family.
      case: choices that differ from the defaults.
      verdict: right, refused, wrong or no model.
      kind: kind of refusal or of fault.
      detail: error message.
      off: largest difference of the logits relative to the largest logit; NaN without logits.
    """

    group: str
    case: str
    verdict: str
    kind: str = ""
    detail: str = ""
    off: float = float("nan")


class NoModel(Exception):
    """Raised when the peer tool has no logits for a folder."""


def judge(
    group: str,
    case: str,
    folder: Path,
    theirs: Callable[[], list[np.ndarray]],
    ours: Callable[[], list[np.ndarray]],
) -> Outcome:
    """Compares our logits of a folder with the peer tool's.

    Args:
      group: group of the outcome.
      case: name of the case.
      folder: folder under test; a refusal must name it.
      theirs: returns the peer's logits as a list of arrays; any exception means no model.
      ours: returns our logits in the same order.
    """
    expected, why = None, ""
    try:
        expected = theirs()
    except Exception as e:
        why = line(e)
    try:
        found = ours()
    except UserError as e:
        return refusal(group, case, folder, str(e), why)
    except Exception as e:
        last = traceback.extract_tb(e.__traceback__)[-1]
        where = f"{line(e)} ({Path(last.filename).name}:{last.lineno})" + (why and f" | {why}")
        return Outcome(group, case, WRONG, f"raises {type(e).__name__}", where)
    if expected is None:
        return Outcome(group, case, NO_MODEL, "read all the same", why)
    if any(a.shape != b.shape for a, b in zip(expected, found)):
        return Outcome(group, case, WRONG, "another shape")
    off = max(float(np.abs(a - b).max() / np.abs(a).max()) for a, b in zip(expected, found))
    if off <= TOLERANCE:
        return Outcome(group, case, RIGHT, off=off)
    return Outcome(group, case, WRONG, "other logits", f"{off:.1e}", off)


def refusal(group: str, case: str, folder: Path, message: str, why: str) -> Outcome:
    """Returns the outcome of a UserError of ours; the message must be one line with the folder."""
    if "\n" in message or str(folder) not in message:
        return Outcome(group, case, WRONG, "an unclear message", message)
    short = message.replace(f"{folder}/", "").replace(str(folder), "FOLDER")
    if why:
        return Outcome(group, case, NO_MODEL, "refused by both", f"{short} | {why}")
    kinds = [name for name, pattern in REFUSALS.items() if re.search(pattern, message)]
    return Outcome(group, case, REFUSED, kinds[0] if kinds else "not named", short)


def line(error: BaseException) -> str:
    """Returns the error's type and the first 200 characters of its text, in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
