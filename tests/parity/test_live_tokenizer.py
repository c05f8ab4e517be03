"""Compares token ids with llama.cpp's and transformers', from a GGUF file and a written folder."""

import json
import unicodedata
from pathlib import Path

import gguf
import pytest
from mixed_texts import mixed
from small_tokenizers import builtin_gguf as builtin_gguf
from tokenizers import Tokenizer as Backend

from qlora_jax.text import tokenizer as tokenizers_
from qlora_jax.text.gguf_header import read_header
from qlora_jax.text.gguf_vocabulary import PRE_TOKENIZERS

pytestmark = pytest.mark.parity

TEXTS = mixed(1000)


def write_vocabulary(source: Path, pre: str, file: Path) -> Path:
    """Writes a GGUF file without weights: the source's vocabulary, with pre-tokenizer `pre`."""
    writer = gguf.GGUFWriter(file, "llama")
    for key, value in read_header(source).metadata.items():
        match value:
            case bool():
                writer.add_bool(key, value)
            case int() if key.startswith("tokenizer."):
                writer.add_uint32(key, value)
            case list() if key.startswith("tokenizer."):
                writer.add_array(key, value)
            case str() if key == "tokenizer.ggml.model":
                writer.add_string(key, value)
    writer.add_tokenizer_pre(pre)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return file


def llama_cpp_ids(file: Path, texts: list[str]) -> list[list[int]]:
    llama_cpp = pytest.importorskip("llama_cpp")
    model = llama_cpp.Llama(str(file), vocab_only=True, verbose=False)
    return [model.tokenize(text.encode(), add_bos=False, special=True) for text in texts]


def write_folder(file: Path, family: str, folder: Path) -> Path:
    folder.mkdir()
    tokenizers_.load_tokenizer(file).save(folder)
    (folder / "config.json").write_text(json.dumps({"model_type": family}))
    return folder


def test_smollm2s_ids_are_llama_cpps(builtin_gguf: Path, tmp_path: Path) -> None:
    folder = write_folder(builtin_gguf, "llama", tmp_path / "folder")
    backend = Backend.from_file(str(folder / "tokenizer.json"))
    file, made = tokenizers_.load_tokenizer(builtin_gguf), tokenizers_.load_tokenizer(folder)
    for text, ids in zip(TEXTS, llama_cpp_ids(builtin_gguf, TEXTS)):
        assert file.encode(text) == ids, text
        assert made.encode(text) == ids, text
        assert backend.encode(text, add_special_tokens=False).ids == ids, text


@pytest.mark.parametrize("pre", PRE_TOKENIZERS)
def test_every_pre_tokenizer_cuts_as_llama_cpp_does(builtin_gguf: Path, tmp_path, pre) -> None:
    file = write_vocabulary(builtin_gguf, pre, tmp_path / "vocabulary.gguf")
    # llama.cpp does not apply the NFC normalization that some tokenizers apply.
    texts = [unicodedata.normalize("NFC", text) for text in TEXTS]
    loaded = tokenizers_.load_tokenizer(file)
    for text, ids in zip(texts, llama_cpp_ids(file, texts)):
        assert loaded.encode(text) == ids, text


@pytest.mark.parametrize(("family", "pre"), [("llama", "smollm"), ("qwen2", "qwen2")])
def test_transformers_takes_the_tokenizer_that_is_written(
    builtin_gguf: Path, tmp_path: Path, family: str, pre: str
) -> None:
    transformers = pytest.importorskip("transformers")
    file = write_vocabulary(builtin_gguf, pre, tmp_path / "vocabulary.gguf")
    folder = write_folder(file, family, tmp_path / "folder")
    peer = transformers.AutoTokenizer.from_pretrained(str(folder))
    loaded = tokenizers_.load_tokenizer(file)
    for text in TEXTS:
        ids = loaded.encode(text)
        assert peer.encode(text, add_special_tokens=False) == ids, text
        assert peer.decode(ids) == loaded.decode(ids, skip_special_tokens=False)
