"""Builds settings from plain nested dicts, and describes a wrong value in an error message."""

import dataclasses
import json
import os
import re
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from qlora_jax.config.schema import all_settings, names, nearest, sections
from qlora_jax.config.settings import Config, ModelSettings
from qlora_jax.runtime.errors import UserError

S = TypeVar("S", bound=ModelSettings)

_ADAPTERS: Mapping[type, TypeAdapter[Any]] = {t: TypeAdapter(t) for t in (Config, ModelSettings)}
SURROGATES = re.compile("[\ud800-\udfff]")
"""Characters by which Python replaces the bytes of a file name that are not UTF-8."""


def from_settings(settings: Mapping[str, Any], where: str) -> Config:
    """Builds a Config from a dict that has the form of a YAML config.

    Args:
      settings: nested dict. A section may be one word or a list, as in `load_config`. A path may be
        a `Path`.
      where: source of the settings, for errors.

    Raises:
      UserError: as `from_tree`.
    """
    return from_tree(expand(_texts(settings)), where)


def from_tree(tree: Mapping[str, Any], where: str) -> Config:
    """Builds a Config from plain nested dicts.

    Args:
      tree: section to settings, each section a dict.
      where: source of the settings, such as a file, for errors.

    Raises:
      UserError: a key is unknown or missing, or a value is wrong. The message names `where`, the
        key and the fault.
    """
    config = _validated(Config, tree, where)
    if config.train.steps is not None and config.train.epochs is not None:
        raise UserError(
            f"{where}: train.steps {config.train.steps} and train.epochs {config.train.epochs:g} "
            "are both given; keep one (--train.steps=null or --train.epochs=null takes one back)"
        )
    for key, value in flatten(to_tree(config)):
        if SURROGATES.search(json.dumps(value, ensure_ascii=False)):
            raise UserError(
                f"{where}: {key} {value!r} is not UTF-8 text and cannot be saved; rename it"
            )
    return config


def model_settings(tree: Mapping[str, Any], where: str) -> ModelSettings:
    """Builds the settings of a model, without those of a run, from plain nested dicts.

    Args:
      tree: section to settings, each section a dict.
      where: source of the settings, for errors.

    Raises:
      UserError: as `from_tree`.
    """
    return _validated(ModelSettings, tree, where)


def section(name: str, values: Mapping[str, Any]) -> Any:
    """Builds one section of a config, such as `LoraConfig`.

    Args:
      name: name of the section, such as "lora".
      values: settings of the section; all other settings keep their defaults.

    Raises:
      UserError: a key is unknown, or a value has the wrong type.
    """
    try:
        return sections()[name](**values)
    except ValidationError as e:
        raise UserError(_explain(e, name)) from None


def _validated(cls: type[S], tree: Mapping[str, Any], where: str) -> S:
    try:
        return _ADAPTERS[cls].validate_python(dict(tree))
    except ValidationError as e:
        raise UserError(f"{where}: {_explain(e)}") from None


def to_tree(config: Config) -> dict[str, Any]:
    """Returns the config as plain nested dicts, with every default written out."""
    return dataclasses.asdict(config)


def flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields each setting's dotted key and value."""
    for key, value in tree.items():
        if isinstance(value, Mapping) and f"{prefix}{key}" in sections():
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _texts(value: Any) -> Any:
    """Returns plain values in which each path object is replaced by its text."""
    if isinstance(value, Mapping):
        return {key: _texts(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_texts(each) for each in value]
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def expand(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the settings with each section as a dict, also one given as one word or a list."""
    known, kinds = sections(), {s.key: s.type for s in all_settings()}

    def whole(key: str, value: Any) -> Any:
        if key not in known:
            return value
        if is_none(key, value):
            return {}
        first = names(known[key])[0]
        lists = "list[str]" in kinds[f"{key}.{first}"].split(" | ")
        fills = isinstance(value, str) or (lists and isinstance(value, list))
        return {first: value} if fills else value

    return {key: whole(key, value) for key, value in tree.items()}


def is_none(section: str, value: Any) -> bool:
    """Checks if a section is given as `none` or null, so that all its settings are defaults."""
    first = f"{section}.{names(sections()[section])[0]}"
    text = any(s.key == first and ("str" in s.type or "null" in s.type) for s in all_settings())
    return not text and (value is None or value == "none")


def _explain(error: ValidationError, *within: str) -> str:
    problems = error.errors()
    unknown = [
        p for p in problems if p["type"] in ("unexpected_keyword_argument", "extra_forbidden")
    ]
    problem = (unknown or problems)[0]
    location = [*within, *(str(x) for x in problem["loc"])]
    key = ".".join(location)
    if unknown:
        return f"unknown key {key}; the nearest known one is {nearest(key)}"
    if problem["type"] in ("missing", "missing_argument", "missing_keyword_only_argument"):
        return f"{key} is missing; add it to the file or give --{key}=..."
    schema = {s.key: s for s in all_settings()}
    key = next(
        (
            ".".join(location[:n])
            for n in range(len(location), 0, -1)
            if ".".join(location[:n]) in schema
        ),
        key,
    )
    expected = f" (expected: {schema[key].type})" if key in schema else ""
    message = problem["msg"][0].lower() + problem["msg"][1:]
    return f"{key}: {message}, not {problem['input']!r}{expected}"
