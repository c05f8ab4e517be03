"""Random texts of code, CJK, emoji, digits and newlines, on which tokenizers differ."""

import random

PARTS = [
    "def f(x):\n",
    "    return ",
    "  ",
    "\n\n1.",
    " hello",
    "world 123 456",
    "3.14159",
    "日本語 中文",
    "한국어",
    "🙂👩‍👩‍👧‍👦",
    "🇫🇷",
    "\t",
    "e\u0301é",
    "हिन्दी",
    "<html>",
    "\r\n",
    "  \n \n",
    "\u00a0\u3000",
    "▁",
    "½²١٢٣",
    " " * 37,
    "Don'T I'm we'LL!!!",
    "CamelCase snake_case",
    "#include <a.h>\n//==",
]


def mixed(count: int, seed: int = 0) -> list[str]:
    """Returns texts of one to nine parts each; equal seeds give equal texts."""
    source = random.Random(seed)
    return ["".join(source.choices(PARTS, k=source.randint(1, 9))) for _ in range(count)]
