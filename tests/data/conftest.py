"""Fixtures for tests of records: a small real tokenizer and data settings."""

import pytest
from small_tokenizers import make_fast as make_fast
from small_tokenizers import make_tokenizer as make_tokenizer
from small_tokenizers import sentencepiece_backend as sentencepiece_backend
from small_tokenizers import tokenizer as tokenizer

from qlora_jax.config import DataConfig


@pytest.fixture(scope="session")
def data_config():
    def make(source="data.jsonl", **more):
        return DataConfig(source=source, **more)

    return make
