"""Checks docs/data.md against the code: field names, file endings, examples."""

import json
import re
from pathlib import Path

import pytest

from qlora_jax.data import field_names, files, rows
from qlora_jax.data.records import Chat, Prompt
from qlora_jax.data.values import Fields

PAGE = (Path(__file__).parents[2] / "docs" / "data.md").read_text("utf-8")
BLOCKS = re.findall(r"```json\n(.*?)```", PAGE, re.DOTALL)


def names(table):
    """Returns all names in a nested table of names."""
    return {table} if isinstance(table, str) else {n for part in table for n in names(part)}


@pytest.mark.parametrize("table", [name for name in vars(field_names) if name.isupper()])
def test_every_name_is_on_the_page(table):
    words = set(re.findall(r"\w+", PAGE))
    assert names(getattr(field_names, table)) <= words


def test_every_ending_is_on_the_page():
    assert all(f"`{ending}`" in PAGE for ending in [*files.READERS, files.TEXT])
    assert f"{files.MOST / 2**30:g} GiB unpacked" in PAGE


def test_the_examples_are_read_whole():
    examples = [json.loads(line) for line in BLOCKS[0].splitlines()] + [json.loads(BLOCKS[1])]
    kinds = []
    for row in examples:
        fields = Fields(row, "page")
        kinds.append(type(rows.parse(fields, "auto")))
        assert fields.unread() == []
    assert kinds == [Chat, Chat, Prompt, Chat]
