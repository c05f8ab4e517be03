"""Computes ROUGE-L, from the longest common subsequence of words (Lin 2004, section 3)."""

import re

from rapidfuzz.distance import LCSseq


def rouge_l(answer: str, reference: str) -> float:
    """Returns the F1 score, 0 to 1, of the longest common subsequence of words.

    Words are sequences of letters and digits in lower case, as in the metric's reference program.
    """
    a, b = _words(answer), _words(reference)
    common = LCSseq.similarity(a, b)
    return 2 * common / (len(a) + len(b)) if common else 0.0


def _words(text: str) -> list[str]:
    return re.findall(r"[a-z0-9]+", text.lower())
