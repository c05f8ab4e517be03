"""Damages the bytes of a file, at random places or in parts that a reader interprets."""

import json
import random
import struct
from collections.abc import Callable, Mapping
from typing import Any

DIGITS = "9" * 5000
DEEP = "[" * 100_000 + "]" * 100_000
VALUES = (
    *("null", "true", "false", "[]", "{}", '""', '"a"', "0", "-1", "1.5", "1e400", "-1e400"),
    *("NaN", "Infinity", str(2**31), str(2**63), str(2**64), str(10**30), "-0.0", "[[[]]]"),
    *('"\\ud800"', '"\\u0000"', '"../../x"', '"/dev/zero"', '["a", 1, null]', '{"a": {"b": []}}'),
    *(f'"{"x" * 100_000}"', DIGITS, DEEP, '"nan"', '"\\u001b[2J"', '"' + "(a+)+" * 8 + '$"'),
)
"""JSON values that a reader of settings may not expect."""

NUMBERS = (0, 1, 2, 7, 0x7F, 0xFF, 0xFFFF, 2**31 - 1, 2**31, 2**32 - 1, 2**62, 2**63, 2**64 - 1)
FLOATS = (float("nan"), float("inf"), -1.0, 0.0, 1e38)
WORDS = (
    b"\x00",
    b"\xff\xff",
    b"\n",
    b'"',
    b"{",
    b"[",
    b"NaN",
    b"%s",
    b"\xed\xa0\x80",
    b"\xef\xbb\xbf",
)

Mutation = Callable[[bytes, random.Random], bytes]


def flip(data: bytes, rng: random.Random) -> bytes:
    """Flips one to eight bits."""
    changed = bytearray(data)
    for _ in range(rng.randint(1, 8) if data else 0):
        bit = rng.randrange(8 * len(changed))
        changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def cut(data: bytes, rng: random.Random) -> bytes:
    """Keeps a random prefix."""
    return data[: rng.randrange(len(data) + 1)]


def drop(data: bytes, rng: random.Random) -> bytes:
    """Removes bytes in the middle."""
    start = rng.randrange(len(data) + 1)
    return data[:start] + data[start + rng.randint(1, 64) :]


def insert(data: bytes, rng: random.Random) -> bytes:
    """Inserts bytes with a meaning in many formats, or random bytes."""
    at = rng.randrange(len(data) + 1)
    new = rng.choice(WORDS) * rng.choice((1, 1, 100)) if rng.random() < 0.7 else rng.randbytes(16)
    return data[:at] + new + data[at:]


def repeat(data: bytes, rng: random.Random) -> bytes:
    """Repeats a part of the file."""
    start = rng.randrange(len(data) + 1)
    part = data[start : start + rng.randint(1, 512)]
    return data[:start] + part * rng.randint(2, 40) + data[start + len(part) :]


def zero(data: bytes, rng: random.Random) -> bytes:
    """Overwrites a part with zeros."""
    start = rng.randrange(len(data) + 1)
    size = min(rng.randint(1, 4096), len(data) - start)
    return data[:start] + bytes(size) + data[start + size :]


def garbage(data: bytes, rng: random.Random) -> bytes:
    """Replaces the file by random bytes, or by an empty file."""
    return rng.randbytes(rng.choice((0, 1, 8, 1000)))


BYTES: tuple[Mutation, ...] = (flip, cut, drop, insert, repeat, zero, garbage)


def any_bytes(data: bytes, rng: random.Random) -> bytes:
    """Damages bytes at random, for any format."""
    return rng.choice(BYTES)(data, rng)


def json_value(data: bytes, rng: random.Random) -> bytes:
    """Replaces, removes, adds or moves values of a JSON file, or of a line of a JSON lines file."""
    try:
        trees = [json.loads(data)]
    except ValueError:
        lines = data.split(b"\n")
        at = rng.randrange(len(lines))
        try:
            trees = [json.loads(lines[at])]
        except ValueError:
            return any_bytes(data, rng)
        return b"\n".join([*lines[:at], _changed(trees[0], rng), *lines[at + 1 :]])
    return _changed(trees[0], rng)


def _changed(tree: Any, rng: random.Random) -> bytes:
    holder = {"": tree}
    marks: dict[str, str] = {}
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        places = list(_places(holder))
        node, key = rng.choice(places[1:] or places)
        kind = rng.choice(("replace", "replace", "replace", "remove", "move", "add"))
        if kind == "remove" and node is not holder:
            del node[key]
        elif kind == "move":
            other, place = rng.choice(places)
            node[key] = json.loads(json.dumps(_get(other, place)))
        elif kind == "add" and isinstance(node, dict):
            node[rng.choice(("a", "type", "auto_map", "\x1b[2J", *map(str, node)))] = _mark(
                rng, marks
            )
        else:
            node[key] = _mark(rng, marks)
    text = json.dumps(holder[""], ensure_ascii=rng.random() < 0.5)
    for mark, value in marks.items():
        text = text.replace(json.dumps(mark), value)
    return text.encode("utf-8", "surrogatepass")


def _mark(rng: random.Random, marks: dict[str, str]) -> str:
    mark = f"@{len(marks)}@"
    marks[mark] = rng.choice(VALUES)
    return mark


def _get(node: Any, key: Any) -> Any:
    try:
        return node[key]
    except (KeyError, IndexError):
        return None


def _places(node: Any, limit: int = 2000) -> Any:
    """Yields (container, key) of every value in a tree; of large containers, the first ones."""
    entries = list(node.items()) if isinstance(node, dict) else list(enumerate(node))
    for key, value in entries[:limit]:
        yield node, key
        if isinstance(value, dict | list):
            yield from _places(value, 50)


def header(data: bytes, rng: random.Random) -> bytes:
    """Changes a safetensors file: its JSON header, the header's length, or bytes of tensors."""
    size = int.from_bytes(data[:8], "little")
    text, rest = data[8 : 8 + size], data[8 + size :]
    kind = rng.random()
    if kind < 0.15:
        return struct.pack("<Q", rng.choice(NUMBERS)) + text + rest
    if kind < 0.3:
        return data[: 8 + size] + any_bytes(rest, rng)
    if kind < 0.4 and len(rest) >= 4:
        at = rng.randrange(len(rest) // 4) * 4
        new = struct.pack("<f", rng.choice(FLOATS))
        return data[: 8 + size] + rest[:at] + new + rest[at + 4 :]
    changed = json_value(text, rng)
    return struct.pack("<Q", len(changed)) + changed + rest


def gguf(data: bytes, rng: random.Random) -> bytes:
    """Overwrites places near the start of a GGUF file, where its header is, with numbers."""
    end = max(1, data.rfind(b"blk.") + 200)
    changed = bytearray(data)
    for _ in range(rng.randint(1, 3)):
        at = rng.choice((4, 8, 16, rng.randrange(min(600, end)), rng.randrange(end)))
        layout = rng.choice(("<I", "<Q", "<f", "<B"))
        value = rng.choice(FLOATS) if layout == "<f" else rng.choice(NUMBERS)
        if layout != "<f":
            value = int(value) % (1 << 8 * struct.calcsize(layout))
        new = struct.pack(layout, value)
        changed[at : at + len(new)] = new
    return bytes(changed)


TEMPLATES = (
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "{{ 'a' * 10**10 }}",
    "{{ '%100000000000d' % 1 }}",
    "{% macro m(n) %}{{ m(n + 1) }}{{ m(n + 1) }}{% endmacro %}{{ m(0) }}",
    "{{ messages[99].content }}",
    "{{ 1 // 0 }}",
    "{{ raise_exception(messages) }}",
    "{{ ''.__class__.__mro__ }}",
    "{% include 'x' %}",
    "{% generation %}{% endgeneration %}{{ messages }}",
    "{{ " + "(" * 3000 + ")" * 3000 + " }}",
    "{% set x = [[]] %}{% for i in range(9) %}{{ x[0].append(x) }}{% endfor %}{{ x }}",
)
"""Chat templates that do not end, need all memory, or fail."""


def template(data: bytes, rng: random.Random) -> bytes:
    """Replaces a chat template by a hostile one, or damages it."""
    if rng.random() < 0.4:
        return rng.choice(TEMPLATES).encode()
    return any_bytes(data, rng)


YAML = (
    "a: &a [x, x]\nb: &b [*a, *a, *a, *a, *a, *a, *a, *a]\nc: &c [*b, *b, *b, *b, *b, *b, *b]\n"
    "d: &d [*c, *c, *c, *c, *c, *c, *c]\ne: &e [*d, *d, *d, *d, *d, *d]\nf: [*e, *e, *e, *e]\n",
    "a: &a\n  b: *a\n",
    "model: !!python/object/apply:os.system ['true']\n",
    "train: {steps: 1_000_000_000_000_000_000_000}\n",
    "? [complex, key]\n: 1\n",
    "a: 1\na: 2\n",
    "- 1\n- 2\n",
    "%YAML 9.9\n---\na: 1\n",
    "a: 2026-99-99\n",
    "a: " + "9" * 5000 + "\n",
    "[" * 20_000 + "\n",
    "a: !!binary '@@@'\n",
    "a: !!timestamp x\n",
    "a: !!float x\n",
    "\t a: 1\n",
)
"""Documents at the limits of the YAML format."""


def yaml(data: bytes, rng: random.Random) -> bytes:
    """Replaces a YAML file by a hostile one, or damages its values or bytes."""
    kind = rng.random()
    if kind < 0.2:
        return rng.choice(YAML).encode()
    return json_value(data, rng) if kind < 0.7 else any_bytes(data, rng)


def of_json(data: bytes, rng: random.Random) -> bytes:
    """Damages a JSON file: mostly its values, else its bytes."""
    return json_value(data, rng) if rng.random() < 0.7 else any_bytes(data, rng)


def of_tensors(data: bytes, rng: random.Random) -> bytes:
    """Damages a safetensors file: mostly its header, else its bytes."""
    return header(data, rng) if rng.random() < 0.7 else any_bytes(data, rng)


def of_gguf(data: bytes, rng: random.Random) -> bytes:
    """Damages a GGUF file: mostly its header, else its bytes."""
    return gguf(data, rng) if rng.random() < 0.7 else any_bytes(data, rng)


BY_SUFFIX: Mapping[str, Mutation] = {
    ".json": of_json,
    ".jsonl": of_json,
    ".safetensors": of_tensors,
    ".gguf": of_gguf,
    ".jinja": template,
    ".yaml": yaml,
}
"""Suffix of a file's name to the mutation of the file; `any_bytes` damages all others."""
