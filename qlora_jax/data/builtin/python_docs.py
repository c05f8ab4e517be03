"""A built-in data set: the docstrings of the running Python's standard library."""

import ast
import contextlib
import functools
import hashlib
import importlib
import inspect
import re
import sysconfig
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from qlora_jax.data.records import Chat, Prompt, Record, Text

QUESTION = "What does `{name}` do?"
MAX_ANSWER = 600
MIN_ANSWER = 20
SKIPPED = frozenset(
    (
        "antigravity",
        "dist-packages",
        "distutils",
        "encodings",
        "ensurepip",
        "idlelib",
        "lib2to3",
        "msilib",
        "pydoc_data",
        "site-packages",
        "test",
        "tests",
        "this",
        "turtledemo",
    )
)
# Modules written in C, which cannot be parsed. Importing them has no side effect.
COMPILED = (
    "array",
    "atexit",
    "binascii",
    "builtins",
    "cmath",
    "datetime",
    "errno",
    "faulthandler",
    "fcntl",
    "gc",
    "itertools",
    "marshal",
    "math",
    "mmap",
    "resource",
    "select",
    "sys",
    "syslog",
    "termios",
    "time",
    "unicodedata",
    "zlib",
)
COMPILED_PART = (
    ("posix", "os"),
    ("_collections", "collections"),
    ("_functools", "functools"),
    ("_io", "io"),
    ("_socket", "socket"),
    ("_ssl", "ssl"),
    ("_struct", "struct"),
)
"""Compiled parts of modules, each with the public module name."""
DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)


def records(format: str = "auto", dropped: Counter[str] | None = None) -> list[Record]:
    """Returns one record for each documented public function, class and method of Python's library.

    Python sources are parsed and never imported. The order of questions is shuffled but always
    the same, so that the first n records are a representative sample.

    Args:
      format: auto and chat give conversations that ask `What does `shutil.copytree` do?`; prompt
        gives the same as prompt and completion; text gives whole docstrings and the language
        reference, without questions.
      dropped: counters of skipped answers; updated. An answer that occurs more than once is
        skipped each time, and so is an answer shorter than 20 characters.
    """
    dropped = Counter() if dropped is None else dropped
    if format == "text":
        topics = [Text(text=t, where=f"python-docs {name}") for name, t in _topics().items()]
        return [*texts(documented(), "python-docs"), *topics]
    return questions(documented(), "python-docs", format, dropped)


def texts(docs: Mapping[str, str], source: str) -> list[Record]:
    """Returns one text for each docstring: the name, then the whole docstring."""
    return [Text(text=f"{name}\n\n{doc}\n", where=f"{source} {name}") for name, doc in docs.items()]


def questions(
    docs: Mapping[str, str], source: str, format: str, dropped: Counter[str]
) -> list[Record]:
    """Returns one question with its answer for each name, shuffled reproducibly; see `records`."""
    answers = {name: answer(doc) for name, doc in docs.items()}
    uses = Counter(answers.values())
    dropped["short"] += sum(len(a) < MIN_ANSWER for a in answers.values())
    dropped["answer occurs twice"] += sum(
        uses[a] > 1 for a in answers.values() if len(a) >= MIN_ANSWER
    )
    return [
        _record(format, QUESTION.format(name=name), text, f"{source} {name}")
        for name, text in sorted(answers.items(), key=lambda item: _mix(item[0]))
        if len(text) >= MIN_ANSWER and uses[text] == 1
    ]


@functools.cache
def documented() -> Mapping[str, str]:
    """Returns the cleaned docstring for each dotted public name, sorted by name."""
    root = Path(sysconfig.get_path("stdlib"))
    found: dict[str, str] = {}
    for path, module in modules(root):
        found.update(parse(path, module))
    for name, public in (*((m, m) for m in COMPILED), *COMPILED_PART):
        with contextlib.suppress(ImportError):
            for key, doc in _inspect(importlib.import_module(name), public):
                found.setdefault(key, doc)
    return MappingProxyType(dict(sorted(found.items())))


def modules(folder: Path, package: str = "") -> Iterator[tuple[Path, str]]:
    """Yields (file, dotted name) of the public modules below a folder in order, without tests."""
    for path in sorted(folder.rglob("*.py")):
        if module := _module(Path(package) / path.relative_to(folder)):
            yield path, module


def parse(path: Path, module: str) -> Iterator[tuple[str, str]]:
    """Yields (dotted name, docstring) of the definitions in a source file, without import."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError, OSError):
        return
    yield from _definitions(tree.body, module)


def answer(doc: str) -> str:
    """Returns the leading prose of a docstring, at most 600 characters, one paragraph per line.

    The prose ends before the first paragraph that is a list, an example or a table, or that
    introduces one. A signature at the start is skipped.
    """
    kept: list[str] = []
    for paragraph in re.split(r"\n\s*\n", doc.strip()):
        lines = paragraph.splitlines()
        if not kept and re.match(r"[\w.]+\(.*\)( ?->.*)?$", lines[0]):
            lines = [line.strip() for line in lines[1:]]
            if not lines:
                continue
        if not _is_prose(lines):
            break
        text = " ".join(" ".join(lines).split())
        if sum(map(len, kept)) + len(kept) + len(text) > MAX_ANSWER or text.endswith(":"):
            break
        kept.append(text)
    return "\n".join(kept)


def _record(format: str, question: str, text: str, where: str) -> Record:
    if format == "prompt":
        return Prompt(prompt=f"{question}\n", completion=text, where=where)
    turns = ({"role": "user", "content": question}, {"role": "assistant", "content": text})
    return Chat(messages=turns, where=where)


def _mix(name: str) -> bytes:
    return hashlib.sha256(name.encode()).digest()


def _is_prose(lines: list[str]) -> bool:
    marks = (" ", "\t", ">>>", "- ", "* ", "+-", "|", "::", ".. ", "==", "--", "@", ":param")
    return bool(lines) and not any(line.startswith(marks) for line in lines)


def _module(path: Path) -> str | None:
    parts = [*path.parts[:-1], path.stem]
    if parts[-1] == "__init__":
        parts.pop()
    public = all(p.isidentifier() and not p.startswith("_") and p not in SKIPPED for p in parts)
    return ".".join(parts) if parts and public else None


def _definitions(body: list[ast.stmt], prefix: str) -> Iterator[tuple[str, str]]:
    for node in body:
        if isinstance(node, DEFINITIONS):
            if node.name.startswith("_"):
                continue
            name = f"{prefix}.{node.name}"
            if (doc := ast.get_docstring(node)) and not doc.isspace():
                yield name, doc
            if isinstance(node, ast.ClassDef):
                yield from _definitions(node.body, name)
        elif isinstance(node, ast.If | ast.Try):
            yield from _definitions([*node.body, *node.orelse], prefix)


def _inspect(module: Any, public: str) -> Iterator[tuple[str, str]]:
    prefix = "" if public == "builtins" else f"{public}."
    for name, value in _public(module):
        if not (inspect.isroutine(value) or inspect.isclass(value)):
            continue
        if doc := inspect.getdoc(value):
            yield prefix + name, doc
        if inspect.isclass(value):
            for method, member in _public(value):
                if inspect.isroutine(member) and (doc := getattr(member, "__doc__", None)):
                    yield f"{prefix}{name}.{method}", inspect.cleandoc(doc)


def _public(holder: Any) -> list[tuple[str, Any]]:
    return sorted((n, v) for n, v in vars(holder).items() if not n.startswith("_"))


def _topics() -> dict[str, str]:
    try:
        from pydoc_data.topics import topics
    except ImportError:
        return {}
    return {f"topic {name}": text for name, text in sorted(topics.items())}
