"""Checks that the API reference in docs/api has every public name and every setting."""

import dataclasses
import re
from pathlib import Path

import qlora_jax
from qlora_jax.config import Config

API = Path(__file__).parents[1] / "docs" / "api"


def test_every_public_name_is_in_the_reference() -> None:
    page = (API / "index.md").read_text("utf-8")
    shown = set(re.findall(r"^::: qlora_jax\.(\w+)$|heading: qlora_jax\.(\w+)", page, re.MULTILINE))
    modules = {path.stem for path in API.glob("*.md")}
    names = {name for pair in shown for name in pair if name}
    assert set(qlora_jax.__all__) <= names | modules


def test_every_section_of_the_config_is_in_the_reference() -> None:
    page = (API / "config.md").read_text("utf-8")
    sections = {
        f.type.__name__ for f in dataclasses.fields(Config) if dataclasses.is_dataclass(f.type)
    }
    assert len(sections) > 5
    assert sections <= set(re.findall(r"\w+", page))
