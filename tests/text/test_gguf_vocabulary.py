import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gguf
import pytest
from gguf import TokenType

from qlora_jax.runtime.errors import UserError
from qlora_jax.text.gguf_header import read_header
from qlora_jax.text.gguf_vocabulary import (
    PRE_TOKENIZERS,
    build,
    load_fast_tokenizer,
    merges_from_scores,
    read_vocabulary,
)

GOLDEN = json.loads(
    (Path(__file__).parents[1] / "golden" / "models" / "tokenizers.json").read_text("utf-8")
)
BYTES = ["<|end|>", "<think>", "a", "b", "c", "1", "2", "3", "4", "Ġ", "ab", "abc", "Ġa", "12"]


def byte_level(**changes: Any) -> dict[str, Any]:
    """Returns GGUF metadata of a vocabulary of single bytes and four merges."""
    types = [TokenType.CONTROL, TokenType.USER_DEFINED] + [TokenType.NORMAL] * (len(BYTES) - 2)
    metadata = {
        "model": "gpt2",
        "pre": "gpt-2",
        "tokens": BYTES,
        "token_type": types,
        "merges": ["a b", "ab c", "Ġ a", "1 2"],
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    return {f"tokenizer.ggml.{k}": v for k, v in (metadata | changes).items() if v is not None}


def sentencepiece(**changes: Any) -> dict[str, Any]:
    golden = {k: v for k, v in GOLDEN["sentencepiece"].items() if k != "cases"}
    metadata = {"model": "llama", "bos_token_id": 1, "eos_token_id": 2, **golden}
    return {f"tokenizer.ggml.{k}": v for k, v in (metadata | changes).items()}


def built(metadata: dict[str, Any], where: str = ""):
    return build(read_vocabulary(metadata, where), where)


def pieces(tokenizer, text: str) -> list[str]:
    return tokenizer.encode(text, add_special_tokens=False).tokens


@pytest.mark.parametrize("pre", GOLDEN["byte_level"])
def test_ids_are_llama_cpps(builtin_gguf: Path, pre: str) -> None:
    tokenizer = built(read_header(builtin_gguf).metadata | {"tokenizer.ggml.pre": pre}, "golden")
    for case in GOLDEN["byte_level"][pre]:
        encoding = tokenizer.encode(case["text"], add_special_tokens=False)
        assert encoding.ids == case["ids"], case["text"]
        assert tokenizer.decode(encoding.ids, skip_special_tokens=False) == case["text"]


@pytest.mark.parametrize("case", GOLDEN["sentencepiece"]["cases"], ids=lambda case: case["text"])
def test_ids_are_sentencepieces(case) -> None:
    tokenizer = built(sentencepiece(), "golden")
    ids = tokenizer.encode(case["text"], add_special_tokens=False).ids
    assert ids == case["ids"]
    assert tokenizer.decode(ids) == case["text"]


def test_the_builtin_tokenizer(builtin_gguf: Path) -> None:
    tokenizer = load_fast_tokenizer(builtin_gguf)
    assert len(tokenizer) == 49152
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    assert tokenizer.encode("<|im_start|>user\n")[0] == 1
    assert tokenizer.encode("bye<|im_end|>")[-1] == 2
    assert tokenizer.tokenize("in 2024") == ["in", "Ġ", "2", "0", "2", "4"]
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    assert tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert tokenizer.decode([1, 19556, 2], skip_special_tokens=True) == "Hello"


def test_offsets_point_into_the_text(builtin_gguf: Path) -> None:
    text = "naïve 12 🙂 done"
    encoding = load_fast_tokenizer(builtin_gguf)(text, return_offsets_mapping=True)
    starts, ends = zip(*encoding["offset_mapping"])
    assert min(starts) == 0
    assert max(ends) == len(text)
    assert "".join(text[s:e] for s, e in encoding["offset_mapping"][-1:]).strip() == "done"


def write(path: Path, merges: Sequence[str] = ("a b", "ab c", "Ġ a", "1 2")) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(BYTES)
    writer.add_token_types(byte_level()["tokenizer.ggml.token_type"])
    writer.add_token_merges(merges)
    writer.add_eos_token_id(0)
    writer.add_chat_template("{{ messages[0].content }}")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


def test_what_the_tokenizers_library_refuses_is_one_line(tmp_path: Path) -> None:
    path = write(tmp_path / "t.gguf", merges=["a zzz"])
    with pytest.raises(UserError, match=r"t\.gguf: the tokenizer cannot be loaded \(.*zzz"):
        load_fast_tokenizer(path)


def test_a_file_is_read_into_a_transformers_tokenizer(tmp_path: Path) -> None:
    tokenizer = load_fast_tokenizer(write(tmp_path / "t.gguf"))
    assert tokenizer.encode("abc a<|end|>") == [11, 12, 0]
    assert tokenizer.eos_token == "<|end|>"
    assert tokenizer.bos_token is None
    assert tokenizer.all_special_ids == [0]
    assert tokenizer.apply_chat_template([{"content": "hi"}], tokenize=False) == "hi"


def test_digits_are_cut_as_the_pre_tokenizer_says() -> None:
    cut = {pre: pieces(built(byte_level(pre=pre)), "1234") for pre in ("gpt-2", "smollm", "qwen2")}
    assert cut == {
        "gpt-2": ["12", "3", "4"],
        "smollm": ["1", "2", "3", "4"],
        "qwen2": ["1", "2", "3", "4"],
    }
    groups = built(byte_level(pre="llama-bpe")).pre_tokenizer.pre_tokenize_str("12341")
    assert [text for text, _ in groups] == ["123", "41"]


CL100K = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
NEMO = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
O200K = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@pytest.mark.parametrize(
    ("pre", "published"),
    [
        ("llama-bpe", CL100K),
        ("dbrx", CL100K),
        ("smaug-bpe", CL100K),
        ("qwen2", CL100K.replace(r"\p{N}{1,3}", r"\p{N}")),
        ("tekken", NEMO),
        ("gpt-4o", O200K),
    ],
)
def test_text_is_cut_by_the_published_expression(pre: str, published: str) -> None:
    assert PRE_TOKENIZERS[pre].split == published


@pytest.mark.parametrize("pre", ["olmo", "mpt", "qwen2"])
def test_letters_are_composed_where_the_published_file_says_so(pre: str) -> None:
    assert built(byte_level(pre=pre)).normalizer.normalize_str("e\u0301") == "é"


def test_llama_bpe_takes_whole_words_past_the_merges() -> None:
    merges = {"merges": ["a b"]}
    assert pieces(built(byte_level(pre="llama-bpe", **merges)), "abc") == ["abc"]
    assert pieces(built(byte_level(pre="gpt-2", **merges)), "abc") == ["ab", "c"]


def test_added_tokens_stay_whole_and_only_control_is_special() -> None:
    tokenizer = built(byte_level())
    assert pieces(tokenizer, "a<think>b<|end|>") == ["a", "<think>", "b", "<|end|>"]
    ids = tokenizer.encode("a<think><|end|>").ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == "a<think>"


@pytest.mark.parametrize(
    ("metadata", "ids"),
    [
        (byte_level(), [2]),
        (byte_level(add_bos_token=True), [0, 2]),
        (byte_level(add_eos_token=True), [2, 0]),
        (byte_level(pre="llama-bpe"), [0, 2]),
        (byte_level(pre="tekken"), [0, 2]),
        (byte_level(pre="smaug-bpe"), [2]),
        (byte_level(pre="dbrx"), [2]),
        (byte_level(pre="llama-bpe", add_bos_token=False), [2]),
        (byte_level(add_bos_token=True, bos_token_id=None), [2]),
    ],
)
def test_ends_are_added_as_the_file_says(metadata, ids) -> None:
    tokenizer = built(metadata)
    assert tokenizer.encode("a").ids == ids
    assert tokenizer.encode("a", add_special_tokens=False).ids == [2]


def test_sentencepiece_adds_bos_unless_told_otherwise() -> None:
    assert built(sentencepiece()).encode("x").ids[0] == 1
    assert built(sentencepiece(add_bos_token=False)).encode("x").ids[0] != 1


def test_merges_come_best_score_first() -> None:
    scores = {"a": -9.0, "b": -9.0, "c": -9.0, "bc": -1.0, "ab": -2.0, "abc": -3.0}
    assert merges_from_scores(scores) == [("b", "c"), ("a", "b"), ("a", "bc"), ("ab", "c")]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"pre": "default"}, "pre-tokenizer 'default' is not known, .* Hugging Face folder; known"),
        ({"pre": "pixtral"}, "pre-tokenizer 'pixtral' is not known, .*; known: gpt-2, smollm, st"),
        ({"pre": None}, "pre-tokenizer None is not known"),
        ({"model": "gemma4"}, "tokenizer 'gemma4' is not supported"),
        ({"model": "t5"}, "tokenizer 't5' is not supported"),
        ({"model": "bert"}, "tokenizer 'bert' is not supported; supported: gpt2, llama"),
        ({"model": "llama"}, "metadata tokenizer.ggml.scores is missing"),
        ({"merges": None}, "metadata tokenizer.ggml.merges is missing"),
        ({"merges": ["ab"]}, "merges.0 'ab': .*two tokens with a space between"),
        ({"tokens": []}, "tokens .*at least 1 item"),
        ({"tokens": [*BYTES, "abc", "abc"]}, "tokens .*'abc' is there 3 times"),
        ({"tokens": [1, 2]}, "tokens.0 1: Input should be a valid string"),
        ({"token_type": [1]}, "token_type has 1 entries for 14 tokens"),
        ({"token_type": [99] * 14}, "token_type.0 99: .*less than or equal to"),
        ({"eos_token_id": 14}, "eos_token_id is 14, but there are 14 tokens"),
        ({"eos_token_id": -2}, "eos_token_id -2: "),
        ({"bos_token_id": "a"}, "bos_token_id 'a': Input should be a valid integer"),
        ({"add_bos_token": "yes"}, "add_bos_token 'yes': "),
    ],
)
def test_unknown_tokenizers_are_refused(changes, says: str) -> None:
    with pytest.raises(UserError, match=says) as e:
        built(byte_level(**changes), "m.gguf")
    assert str(e.value).startswith("m.gguf: ")
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("none", [-1, 2**32 - 1])
def test_llama_cpps_number_for_no_token_is_none(none: int) -> None:
    vocabulary = read_vocabulary(byte_level(eos_token_id=none, padding_token_id=none), "")
    assert vocabulary.eos_token_id is None
    assert vocabulary.padding_token_id is None
