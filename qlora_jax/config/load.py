"""Reads a config from YAML and from `--a.b=c` arguments, and writes a config as YAML."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError

from qlora_jax.config.schema import all_settings, names, sections
from qlora_jax.config.settings import Config
from qlora_jax.config.tree import expand, flatten, from_tree, is_none, to_tree
from qlora_jax.runtime import json_files, paths
from qlora_jax.runtime.errors import UserError

EXAMPLES = "configs"
"""The repository's folder of example configs; the installed package does not have it."""


def load_config(path: str | Path, overrides: Mapping[str, str] | None = None) -> Config:
    """Reads a config from a YAML file and replaces settings by the overrides.

    Args:
      path: YAML file. If a section is one word or a list, this is the section's first setting:
        `model: a.gguf` means `model: {path: a.gguf}`, `data: my.jsonl` means
        `data: {source: my.jsonl}`. `mesh: none` gives a section its default settings.
      overrides: dotted key to new value as text, such as `{"lora.rank": "8"}`. If the setting is
        text, the value is taken literally, and null or an empty value means None. For any other
        setting, the value is read as YAML. An override of a section, such as
        `{"model": "a.gguf"}`, keeps the other settings of the section.

    Raises:
      UserError: the file is missing or malformed, a key is unknown (the message names the nearest
        known key), or a value has the wrong type.
    """
    path = Path(path)
    try:
        tree = _read_yaml(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        raise UserError(_no_file(path)) from None
    except OSError as e:
        raise paths.unreadable(path, e) from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: not a text file; a config is YAML") from None
    except MarkedYAMLError as e:
        line = e.problem_mark.line + 1 if e.problem_mark else "?"
        raise UserError(f"{path}:{line}: not valid YAML: {e.problem}; correct it") from None
    except (YAMLError, ValueError) as e:
        raise UserError(f"{path}: not valid YAML: {str(e).splitlines()[0]}; correct it") from None
    if not isinstance(tree, dict):
        raise UserError(
            f"{path}: a config is a mapping; give it keys of these: {', '.join(names(Config))}"
        )
    tree = expand(tree)
    for key, text in (overrides or {}).items():
        _override(tree, key, text)
    return from_tree(tree, str(path))


def _no_file(path: Path) -> str:
    """Returns the message for a config file that does not exist."""
    told = f"{path}: no such config file; give a YAML file or a run directory"
    if path.parts[:1] == (EXAMPLES,) and not Path(EXAMPLES).is_dir():
        return (
            f"{told}. The examples in {EXAMPLES}/ are part of the repository, not of the installed "
            "package: start the command in a clone of the repository, or copy the file from there"
        )
    return told


def changed(config: Config, overrides: Mapping[str, str]) -> Config:
    """Returns the config with some settings replaced.

    Args:
      config: config to start from.
      overrides: dotted key to new value as text, as in `load_config`.

    Raises:
      UserError: a key is unknown, or a value has the wrong type.
    """
    tree = to_tree(config)
    for key, text in overrides.items():
        _override(tree, key, text)
    return from_tree(tree, "the command line")


def parse_overrides(arguments: Sequence[str]) -> dict[str, str]:
    """Turns `["--lora.rank=8", "--train.steps", "50"]` into `{"lora.rank": "8", ...}`.

    Raises:
      UserError: an argument does not have this form, or has no value.
    """
    overrides: dict[str, str] = {}
    rest = list(arguments)
    while rest:
        argument = rest.pop(0)
        if not argument.startswith("--"):
            raise UserError(
                f"unexpected argument {argument!r}; settings are given as --section.key=value"
            )
        key, equals, value = argument[2:].partition("=")
        if not equals:
            if not rest:
                raise UserError(f"--{key} has no value; write --{key}=VALUE")
            value = rest.pop(0)
        overrides[key] = value
    return overrides


def dump(config: Config, path: Path) -> None:
    """Writes the config as YAML."""
    with path.open("w", encoding="utf-8") as f:
        writer = YAML()
        writer.default_flow_style = False
        writer.allow_unicode = False  # True writes U+0085 unescaped; YAML reads a space
        writer.dump(to_tree(config), f)


def digest(config: Config) -> str:
    """Returns the SHA-256 of the config's values, as hex."""
    return json_files.digest(to_tree(config))


def difference(a: Config, b: Config) -> list[str]:
    """Returns the settings that differ between two configs, as `key: value in a → value in b`."""
    left, right = dict(flatten(to_tree(a))), dict(flatten(to_tree(b)))
    return [
        f"{k}: {left.get(k)} → {right.get(k)}"
        for k in sorted(left.keys() | right.keys())
        if left.get(k) != right.get(k)
    ]


def _override(tree: dict[str, Any], key: str, text: str) -> None:
    kinds = {s.key: s.type for s in all_settings()}
    if key in sections():
        _override_section(tree, key, text, kinds)
        return
    *parents, last = _steps(key, kinds)
    for name in parents:
        if (node := tree.get(name)) is None:
            node = tree[name] = {}
        if not isinstance(node, dict):
            raise UserError(
                f"--{key}: {name} is a single value, {node!r}, and has no keys; give --{name}=VALUE"
            )
        tree = node
    tree[last] = _value(text, kinds.get(key, ""))


def _override_section(
    tree: dict[str, Any], section: str, text: str, kinds: Mapping[str, str]
) -> None:
    value = _parse(text)
    if is_none(section, value):
        tree[section] = {}
        return
    if not isinstance(value, dict):
        first = f"{section}.{names(sections()[section])[0]}"
        value = _value(text, kinds[first])
    value, before = expand({section: value})[section], tree.get(section)
    both = isinstance(value, dict) and isinstance(before, dict)
    tree[section] = before | value if both else value


def _steps(key: str, kinds: Mapping[str, str]) -> list[str]:
    # The keys of a setting that is a mapping are module paths, which contain dots.
    for name, kind in kinds.items():
        if "dict[" in kind and key.startswith(f"{name}."):
            return [*name.split("."), key.removeprefix(f"{name}.")]
    return key.split(".")


def _value(text: str, kind: str) -> Any:
    kinds = kind.split(" | ")
    if "str" not in kinds:
        return _parse(text)
    if text in ("", "null") and "null" in kinds:
        return None
    value = _parse(text)
    known = {"list[str]": list, "dict[str, str]": dict}
    return value if any(k in kinds and isinstance(value, t) for k, t in known.items()) else text


def _parse(text: str) -> Any:
    try:
        return _read_yaml(text)
    except (YAMLError, ValueError):
        return text


def _read_yaml(text: str) -> Any:
    """Parses YAML of plain values; raises YAMLError, or ValueError for a date such as May 45."""
    try:
        return YAML(typ="safe").load(text)
    except RecursionError:
        raise YAMLError("nested too deeply") from None
