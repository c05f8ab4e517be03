"""What became of a case: right, a clear refusal, wrong, or no model to begin with."""

import dataclasses
import re
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from qlora_jax.runtime.errors import UserError

RIGHT, REFUSED, WRONG, NO_MODEL = "right", "refused", "wrong", "no model"

TOLERANCE = 1e-5
"""Largest difference that is rounding, relative to the largest logit."""

REFUSALS: Mapping[str, str] = {
    "a function of the MLP": r"(hidden_act|hidden_activation|activation_function) '\w+' is not",
    "attention in both directions": r"use_bidirectional_attention True is not",
    "OPT's other norms": r"(norm_before|final_layer_norm|elementwise_affine) (True|False) is not",
    "OPT's projected embeddings": r"shapes do not agree .*embed_tokens\.weight is \[\d+, \d+\]",
    "another quantization": r"quantization_config \(.*\): ",
    "a start that changes the base": r"init_lora_weights .* changes the base",
    "DoRA of embedding or head": r"use_dora with an adapter of \S+ is not supported",
    "another kind of adapter": r"is set, and only LoRA and DoRA adapters are supported",
}
"""Name of a kind of refusal, as docs/formats.md has it, to what its messages match."""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of a case.

    Attributes:
      group: the family, or what else cases are counted by.
      case: what differs from the usual.
      verdict: one of the four words.
      kind: of a refusal, or of what is wrong.
      detail: the message.
      off: largest difference of logits relative to the largest logit; NaN without logits.
    """

    group: str
    case: str
    verdict: str
    kind: str = ""
    detail: str = ""
    off: float = float("nan")


class NoModel(Exception):
    """The peer has no logits for this folder."""


def judge(
    group: str,
    case: str,
    folder: Path,
    theirs: Callable[[], list[np.ndarray]],
    ours: Callable[[], list[np.ndarray]],
) -> Outcome:
    """Compares the logits of a folder.

    Args:
      group: for the outcome.
      case: for the outcome.
      folder: which a refusal has to name.
      theirs: the peer's logits, some arrays; or raises anything where there are none.
      ours: our logits, alike.
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
    """The outcome of an error of ours for the user."""
    if "\n" in message or str(folder) not in message:
        return Outcome(group, case, WRONG, "an unclear message", message)
    short = message.replace(f"{folder}/", "").replace(str(folder), "FOLDER")
    if why:
        return Outcome(group, case, NO_MODEL, "refused by both", f"{short} | {why}")
    kinds = [name for name, pattern in REFUSALS.items() if re.search(pattern, message)]
    return Outcome(group, case, REFUSED, kinds[0] if kinds else "not named", short)


def line(error: BaseException) -> str:
    """The error's type and the first lines of its text, in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
