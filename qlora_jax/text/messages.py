"""The types of a conversation's turn and of the further input of a chat template."""

from collections.abc import Mapping
from typing import Any

Message = Mapping[str, Any]
"""A turn: `role` is a string, `content` is a string or None. Only the chat template reads further
keys, such as `tool_calls`, `reasoning_content` or `name`."""
Variables = Mapping[str, Any]
"""Further input of a chat template by name, such as `tools`, `documents` or
`enable_thinking`."""
REASONING = ("reasoning_content", "reasoning", "thinking")
"""Keys of a turn that hold its reasoning; most templates read the first key."""
