"""Fixtures for tests of texts: a small real tokenizer."""

from small_tokenizers import builtin_gguf as builtin_gguf
from small_tokenizers import make_fast as make_fast
from small_tokenizers import make_tokenizer as make_tokenizer
from small_tokenizers import sentencepiece_backend as sentencepiece_backend
from small_tokenizers import tokenizer as tokenizer
