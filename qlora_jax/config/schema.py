"""Lists every setting with key, type, default and documentation, and finds the nearest key."""

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal

from qlora_jax.config.settings import Config


@dataclasses.dataclass(frozen=True)
class Setting:
    """Description of one setting, which `--help` prints.

    Attributes:
      key: dotted key, such as "lora.rank".
      type: type in words, such as "int" or "str | null".
      doc: documentation in one line.
      default: default value as text, or "required".
    """

    key: str
    type: str
    doc: str
    default: str


def all_settings(cls: type = Config, prefix: str = "") -> Iterator[Setting]:
    """Yields every setting with its type, default and documentation.

    Args:
      cls: dataclass whose settings are listed: `Config` or a section.
      prefix: text in front of each key.
    """
    for name, info in cls.__pydantic_fields__.items():  # type: ignore[attr-defined]
        if dataclasses.is_dataclass(info.annotation):
            yield from all_settings(typing.cast(type, info.annotation), f"{prefix}{name}.")
        else:
            default = (
                "required"
                if info.is_required()
                else str(info.get_default(call_default_factory=True))
            )
            yield Setting(prefix + name, _type_name(info.annotation), _doc(cls, name), default)


def _doc(cls: type, name: str) -> str:
    # pydantic keeps the string under a field only in the class that declares the field, so the
    # base classes are searched too.
    owners = (vars(owner).get("__pydantic_fields__", {}) for owner in cls.__mro__)
    docs = (fields[name].description for fields in owners if name in fields)
    return " ".join(next((doc for doc in docs if doc), "").split())


def is_known(key: str) -> bool:
    """Checks if a dotted key is a setting, a section or an entry of a setting that is a mapping."""
    schema = {s.key: s.type for s in all_settings()}
    return (
        key in schema
        or key in sections()
        or any(key.startswith(f"{k}.") for k, kind in schema.items() if "dict[" in kind)
    )


def nearest(key: str, more: Sequence[str] = ()) -> str:
    """Returns the setting, section or name in `more` that is most similar to a mistyped key."""
    known = [s.key for s in all_settings()] + list(sections()) + list(more)

    def likeness(other: str) -> tuple[float, float]:
        whole = difflib.SequenceMatcher(None, key, other).ratio()
        last = difflib.SequenceMatcher(None, key.split(".")[-1], other.split(".")[-1]).ratio()
        return max(whole, last), whole

    return max(known, key=likeness)


def sections() -> dict[str, type]:
    """Returns the dataclass of each section by the section's name."""
    return {f.name: f.type for f in dataclasses.fields(Config) if dataclasses.is_dataclass(f.type)}  # type: ignore[misc]


def names(cls: type) -> list[str]:
    """Returns the names of a section's settings; those without a default come first."""
    fields = cls.__pydantic_fields__  # type: ignore[attr-defined]
    return sorted(fields, key=lambda name: not fields[name].is_required())


def _type_name(annotation: Any) -> str:
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        return _type_name(args[0])
    if origin is Literal:
        return " | ".join(str(a) for a in args)
    if origin in (types.UnionType, typing.Union):
        return " | ".join("null" if a is type(None) else _type_name(a) for a in args)
    if origin is not None:
        return f"{origin.__name__}[{', '.join(_type_name(a) for a in args)}]"
    return getattr(annotation, "__name__", str(annotation))
