"""Encodes conversations under published chat templates: right, refused clearly, or wrong.

The references are the text that transformers writes and the marks of TRL's training templates.
"""
