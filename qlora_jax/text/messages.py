"""A turn of a conversation, as data sets, chat templates and requests hold it."""

from collections.abc import Mapping
from typing import Any

Message = Mapping[str, Any]
"""A turn: `role`, a string; `content`, a string or None; and further keys that only the chat
template reads, such as `tool_calls`, `reasoning_content` or `name`."""
Variables = Mapping[str, Any]
"""Further input of a chat template, by the names that the template uses: `tools`, `documents`,
`enable_thinking`."""
REASONING = ("reasoning_content", "reasoning", "thinking")
"""Keys of a turn that name its reasoning; most templates read the first."""
