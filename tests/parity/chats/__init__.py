"""Conversations under published chat templates: right, refused by a clear line, or wrong."""
