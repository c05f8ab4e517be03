"""A turn of a conversation, as data sets, chat templates and requests hold it."""

from typing import TypedDict


class Message(TypedDict):
    """One turn of a conversation."""

    role: str
    content: str
