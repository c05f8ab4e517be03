"""Tokenizers of Hugging Face folders, against tokenizer.json, transformers 4, SentencePiece."""

import io
import json
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import given
from hypothesis import strategies as st
from mixed_texts import PARTS
from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers

from qlora_jax.runtime.errors import UserError
from qlora_jax.text import tokenizer as tokenizers_

TEXTS = st.lists(st.sampled_from(PARTS), max_size=8).map("".join)
SPLIT = r"\p{N}{1,3}| ?\p{L}+|\s+|[^\s\p{L}\p{N}]+"
CLASSES = {
    "GPT2Tokenizer": "opt",
    "GPTNeoXTokenizer": "gpt_neox",
    "Qwen2Tokenizer": "qwen2",
    "LlamaTokenizer": "llama",
    "GemmaTokenizer": "gemma2",
    "PreTrainedTokenizerFast": "qwen2",
    "TokenizersBackend": "qwen3",
    None: "smollm3",
}


def write(folder: Path, backend: Tokenizer | None, config: object = None, **settings) -> Path:
    folder.mkdir(exist_ok=True)
    if backend is not None:
        backend.save(str(folder / "tokenizer.json"))
    settings = {"eos_token": "</s>"} | settings
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    (folder / "config.json").write_text(json.dumps(config or {"model_type": "llama"}))
    return folder


@pytest.fixture(scope="module")
def unusual(make_fast) -> Tokenizer:
    """A tokenizer whose normalizer, pre-tokenizer and decoder belong to no transformers class."""
    backend = make_fast().backend_tokenizer
    backend.normalizer = normalizers.NFD()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Replace("!", "?")])
    return backend


@pytest.mark.parametrize("name", CLASSES)
def test_the_file_is_the_tokenizer_whatever_the_class(unusual, tmp_path, name):
    folder = write(tmp_path, unusual, {"model_type": CLASSES[name]}, tokenizer_class=name)
    loaded = tokenizers_.load_tokenizer(folder)
    own = Tokenizer.from_file(str(folder / "tokenizer.json"))

    @given(TEXTS)
    def check(text: str) -> None:
        expected = own.encode(text, add_special_tokens=False)
        ids, offsets = loaded.encode_with_offsets(text)
        assert ids == expected.ids
        assert offsets.tolist() == [list(pair) for pair in expected.offsets]
        assert loaded.decode(ids, False) == own.decode(expected.ids, skip_special_tokens=False)

    check()


@pytest.mark.parametrize("name", ["LlamaTokenizer", "LlamaTokenizerFast", "GemmaTokenizer"])
def test_a_file_of_pieces_is_the_tokenizer_whatever_the_class(
    sentencepiece_backend, tmp_path, name
):
    folder = write(tmp_path, sentencepiece_backend(), tokenizer_class=name, legacy=False)
    own = Tokenizer.from_file(str(folder / "tokenizer.json"))
    loaded = tokenizers_.load_tokenizer(folder)
    for text in ("hello 123", "\n\n1.", "  two", "", " a"):
        assert loaded.encode(text) == own.encode(text, add_special_tokens=False).ids


def test_a_saved_copy_gives_the_same_tokenizer(unusual, tmp_path):
    loaded = tokenizers_.load_tokenizer(
        write(tmp_path / "a", unusual, tokenizer_class="GPT2Tokenizer")
    )
    (tmp_path / "b").mkdir()
    loaded.save(tmp_path / "b")
    settings = json.loads((tmp_path / "b" / "tokenizer_config.json").read_text("utf-8"))
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert not settings.keys() & {"is_local", "local_files_only", "fix_mistral_regex"}
    again = tokenizers_.load_tokenizer(tmp_path / "b")
    before, after = (t.fast.backend_tokenizer.to_str() for t in (loaded, again))
    assert before == after
    assert (again.eos_id, again.pad_id, again.bos_id, again.stop_ids) == (
        loaded.eos_id,
        loaded.pad_id,
        loaded.bos_id,
        loaded.stop_ids,
    )


def test_tokens_of_the_file_stay_as_they_are_and_others_are_added(unusual, tmp_path):
    backend = Tokenizer.from_str(unusual.to_str())
    backend.add_tokens([AddedToken("<tool>", special=False, rstrip=False)])
    size = backend.get_vocab_size()
    changed = {"content": "<tool>", "special": True, "rstrip": True}
    further = {"content": "<more>", "special": True}
    folder = write(
        tmp_path,
        backend,
        added_tokens_decoder={str(size - 1): changed, str(size): further},
        pad_token="<new pad>",
        additional_special_tokens=["<extra>"],
    )
    loaded = tokenizers_.load_tokenizer(folder)
    ids = loaded.encode("a<tool>  b")
    assert ids == backend.encode("a<tool>  b", add_special_tokens=False).ids
    assert loaded.decode(ids) == "a<tool>  b"
    assert loaded.encode("<more>") == [size]
    assert loaded.decode([size]) == ""
    names = {loaded.fast.convert_ids_to_tokens(i): i for i in range(size, loaded.vocab_size)}
    assert names.keys() == {"<more>", "<new pad>", "<extra>"}
    assert loaded.encode("<extra><new pad>") == [names["<extra>"], names["<new pad>"]]
    assert loaded.pad_id == names["<new pad>"]


def test_older_files_name_tokens_too(unusual, tmp_path):
    size = unusual.get_vocab_size()
    folder = write(tmp_path, unusual)
    (folder / "added_tokens.json").write_text(json.dumps({"<late>": size}))
    (folder / "special_tokens_map.json").write_text(json.dumps({"eos_token": "<|im_end|>"}))
    loaded = tokenizers_.load_tokenizer(folder)
    assert loaded.encode("<late>") == [size]
    assert loaded.stop_texts[0] == "<|im_end|>"


def test_special_tokens_in_text_are_honoured_whatever_the_settings(unusual, tmp_path):
    loaded = tokenizers_.load_tokenizer(write(tmp_path, unusual, split_special_tokens=True))
    assert loaded.encode("</s>") == [loaded.eos_id]


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"tokenizer_config.json": {"chat_template": "a"}}, "a"),
        ({"tokenizer_config.json": {"chat_template": [{"name": "default", "template": "b"}]}}, "b"),
        ({"chat_template.jinja": "c", "tokenizer_config.json": {"chat_template": "a"}}, "c"),
        ({"chat_template.jinja": "c", "additional_chat_templates/tools.jinja": "d"}, "c"),
    ],
)
def test_chat_templates(unusual, tmp_path, files, expected):
    folder = write(tmp_path, unusual)
    (folder / "additional_chat_templates").mkdir()
    for name, content in files.items():
        if isinstance(content, dict):
            content = json.dumps({"eos_token": "</s>"} | content)
        (folder / name).write_text(content)
    assert tokenizers_.load_tokenizer(folder).template == expected


OBEYS = ("LlamaTokenizer", "LlamaTokenizerFast", "CodeLlamaTokenizer", "GemmaTokenizer",
         "GemmaTokenizerFast", "CohereTokenizerFast", "GPTNeoXTokenizerFast")  # fmt: skip
LEAVES = ("PreTrainedTokenizerFast", "GPT2Tokenizer", "Qwen2Tokenizer")


@pytest.mark.parametrize("name", OBEYS + LEAVES)
@pytest.mark.parametrize("setting", [True, False, None])
@pytest.mark.parametrize("in_file", [True, False])
def test_bos_is_added_as_transformers_4_does(make_fast, tmp_path, name, setting, in_file):
    # the reference, if `setting` is given: AutoTokenizer of transformers 4.57.1 on these files
    backend = make_fast(None, "</s>", **({"bos_token": "<s>"} if in_file else {})).backend_tokenizer
    settings = {} if setting is None else {"add_bos_token": setting}
    folder = write(tmp_path, backend, tokenizer_class=name, bos_token="<s>", **settings)
    loaded = tokenizers_.load_tokenizer(folder)
    added = setting if name in OBEYS and setting is not None else in_file
    assert (loaded.bos_id is not None) == added
    loaded.save(tmp_path)
    assert tokenizers_.load_tokenizer(tmp_path).bos_id == loaded.bos_id


@pytest.mark.parametrize(
    ("published", "bos"),
    [
        # tokenizer_class, add_bos_token, and whether tokenizer.json adds BOS: the published files
        (("LlamaTokenizer", True, True), True),  # Llama 2, Mistral
        (("GemmaTokenizer", True, True), True),  # Gemma
        (("LlamaTokenizer", False, False), False),  # Phi-3
        (("PreTrainedTokenizerFast", None, True), True),  # Llama 3
        (("Qwen2Tokenizer", False, False), False),  # Qwen2
    ],
)
def test_bos_of_published_models(make_fast, tmp_path, published, bos):
    name, setting, in_file = published
    backend = make_fast(None, "</s>", **({"bos_token": "<s>"} if in_file else {})).backend_tokenizer
    settings = {} if setting is None else {"add_bos_token": setting}
    folder = write(tmp_path, backend, tokenizer_class=name, bos_token="<s>", **settings)
    assert (tokenizers_.load_tokenizer(folder).bos_id is not None) == bos


def train_pieces(**settings) -> bytes:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(PARTS * 20),
        model_writer=model,
        minloglevel=2,
        num_threads=1,
        **{
            "model_type": "bpe",
            "vocab_size": 420,
            "character_coverage": 0.99,
            "byte_fallback": True,
            "split_digits": True,
            "normalization_rule_name": "identity",
            "remove_extra_whitespaces": False,
            "hard_vocab_limit": False,
        }
        | settings,
    )
    return model.getvalue()


LLAMA = {"tokenizer_class": "LlamaTokenizer"}
GEMMA = {
    "add_dummy_prefix": False,
    "user_defined_symbols": ["▁▁", "▁▁▁", "▁" * 31, "\n", "\n\n", "<html>"],
    "pad_id": 0,
    "eos_id": 1,
    "bos_id": 2,
    "unk_id": 3,
}


def pieces_folder(folder: Path, proto: bytes, settings) -> Path:
    (folder / "tokenizer.model").write_bytes(proto)
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


@pytest.mark.parametrize(
    ("trained", "settings", "bos"),
    [
        ({}, LLAMA, 1),
        ({}, LLAMA | {"legacy": False, "add_bos_token": False}, None),
        (GEMMA, {"tokenizer_class": "GemmaTokenizer"}, 2),
        ({"byte_fallback": False}, LLAMA, 1),
    ],
    ids=["llama", "not legacy", "gemma", "no bytes"],
)
def test_a_file_of_pieces_alone_gives_sentencepieces_ids(tmp_path, trained, settings, bos, capfd):
    proto = train_pieces(**trained)
    loaded = tokenizers_.load_tokenizer(pieces_folder(tmp_path, proto, settings))
    own = sentencepiece.SentencePieceProcessor(model_proto=proto)

    @given(TEXTS)
    def check(text: str) -> None:
        ids = own.encode(text)
        assert loaded.encode(text) == ids
        if own.unk_id() not in ids:
            assert loaded.decode(ids, False) == own.decode(ids)

    check()
    assert (loaded.bos_id, loaded.eos_id) == (bos, own.eos_id())
    assert loaded.fast.unk_token_id == own.unk_id()
    assert "[transformers]" not in "".join(capfd.readouterr())


def test_after_a_special_token_the_space_in_front_is_as_legacy_says(tmp_path):
    proto = train_pieces()
    own = sentencepiece.SentencePieceProcessor(model_proto=proto)
    legacy = tokenizers_.load_tokenizer(pieces_folder(tmp_path, proto, LLAMA))
    assert legacy.encode("x<s>hello") == [*own.encode("x"), 1, *own.encode("hello")]
    loaded = tokenizers_.load_tokenizer(pieces_folder(tmp_path, proto, LLAMA | {"legacy": False}))
    ids = loaded.encode("x<s> hello")
    assert ids == [*own.encode("x"), 1, *own.encode("hello")]
    assert len(loaded.encode("x<s>hello")) > len(ids) - 1
    assert loaded.decode(loaded.encode("x<s>hello"), False) == "x<s>hello"


def test_tokens_beside_pieces_have_the_ids_that_they_are_given(tmp_path):
    proto = train_pieces()
    size = sentencepiece.SentencePieceProcessor(model_proto=proto).get_piece_size()
    tokens = {"300": {"content": "[INST]", "special": True}, str(size): {"content": "<pad>"}}
    settings = LLAMA | {"added_tokens_decoder": tokens, "pad_token": "<pad>"}
    loaded = tokenizers_.load_tokenizer(pieces_folder(tmp_path, proto, settings))
    assert loaded.encode("[INST]") == [300]
    assert loaded.pad_id == size
    tokens[str(size + 5)] = {"content": "<gap>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match=rf"'<gap>' has the id {size + 5} in .* id {size + 1} with"):
        tokenizers_.load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("trained", "says"),
    [
        ({"model_type": "unigram"}, "of another type than BPE"),
        ({"normalization_rule_name": "nmt_nfkc"}, "with the normalization nmt_nfkc"),
        ({"remove_extra_whitespaces": True}, "that removes spaces"),
        ({"user_defined_symbols": ["<a>"]}, "with user-defined pieces and a space put in front"),
    ],
)
def test_unknown_pieces_are_refused(tmp_path, trained, says):
    folder = pieces_folder(tmp_path, train_pieces(**trained), LLAMA)
    with pytest.raises(UserError, match=says) as e:
        tokenizers_.load_tokenizer(folder)
    assert str(e.value).startswith(f"{folder / 'tokenizer.model'}: a SentencePiece model ")
    assert str(e.value).endswith("is not supported; give the folder a tokenizer.json")


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("tokenizer.model", b"\xff not a model"),
        ("tokenizer.model", b""),
        ("tokenizer.json", b"{}"),
        ("tokenizer_config.json", b"{"),
        ("tokenizer_config.json", b"[]"),
        ("tokenizer_config.json", b'{"added_tokens_decoder": 3}'),
        ("tokenizer_config.json", b'{"post_processor": "x"}'),
        ("tokenizer_config.json", b'{"eos_token": "</s>", "chat_template": 1}'),
        ("added_tokens.json", b'{"a": "b"}'),
        ("special_tokens_map.json", b"{"),
    ],
)
@pytest.mark.parametrize("pieces", [True, False])
def test_damaged_files_are_one_line(unusual, tmp_path, capfd, file, content, pieces):
    write(tmp_path, unusual)
    (tmp_path / "added_tokens.json").write_text("{}")
    if pieces:
        (tmp_path / "tokenizer.json").unlink()
        (tmp_path / "tokenizer.model").write_bytes(train_pieces())
    elif file == "tokenizer.model":
        return
    (tmp_path / file).write_bytes(content)
    with pytest.raises(UserError) as e:
        tokenizers_.load_tokenizer(tmp_path)
    assert str(tmp_path) in str(e.value)
    assert "\n" not in str(e.value)
    assert "[transformers]" not in "".join(capfd.readouterr())


@pytest.fixture(scope="module")
def smol(builtin_gguf, tmp_path_factory):
    """SmolLM2's tokenizer from its GGUF file, and from a folder saved from that tokenizer."""
    folder = tmp_path_factory.mktemp("smol")
    gguf = tokenizers_.load_tokenizer(builtin_gguf)
    gguf.save(folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text("utf-8"))
    # the class in the published folder; transformers 5 rebuilds tokenizers of this class
    settings["tokenizer_class"] = "GPT2Tokenizer"
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return gguf, tokenizers_.load_tokenizer(folder)


@pytest.mark.parametrize(
    ("text", "pieces"), [("\n\n1.", ["ĊĊ", "1", "."]), ("hello 123", ["hello", "Ġ", *"123"])]
)
def test_smollm2_cuts_digits_and_newlines_as_it_was_trained(smol, text, pieces):
    for tokenizer in smol:
        assert tokenizer.fast.convert_ids_to_tokens(tokenizer.encode(text)) == pieces


@given(TEXTS | st.text(st.characters(exclude_categories=["Cs"])))
def test_smollm2s_folder_gives_the_ids_of_its_file(smol, text):
    gguf, folder = smol
    ids = gguf.encode(text)
    assert folder.encode(text) == ids
    assert gguf.decode(ids, False) == folder.decode(ids, False)


@given(TEXTS)
def test_smollm2s_text_survives(smol, text):  # its vocabulary lacks bytes that UTF-8 never uses
    for tokenizer in smol:
        assert tokenizer.decode(tokenizer.encode(text), False) == text
