import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_jax.runtime.errors import UserError
from qlora_jax.text import gguf_vocabulary
from qlora_jax.text import tokenizer as tokenizers_

LLAMA2 = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} "
    "[/INST]{% else %} {{ m['content'] }} {{ eos_token }}{% endif %}{% endfor %}"
)


def test_special_ids_of_a_chatml_tokenizer(tokenizer):
    vocabulary = tokenizer.fast.get_vocab()
    assert tokenizer.eos_id == vocabulary["<|endoftext|>"]
    assert set(tokenizer.stop_ids) == {vocabulary["<|endoftext|>"], vocabulary["<|im_end|>"]}
    assert tokenizer.pad_id == vocabulary["<pad>"]
    assert tokenizer.bos_id is None
    assert tokenizer.vocab_size == len(vocabulary)


def test_a_bos_that_the_tokenizer_adds_is_found_and_not_added_by_encode(make_tokenizer):
    tokenizer = make_tokenizer(LLAMA2, "</s>", bos_token="<s>")
    assert tokenizer.bos_id == tokenizer.fast.get_vocab()["<s>"]
    assert tokenizer.encode("hello")[0] != tokenizer.bos_id
    assert tokenizer.stop_ids == (tokenizer.eos_id,)


def test_no_template_means_eos_alone_stops(make_tokenizer):
    tokenizer = make_tokenizer(None)
    assert not tokenizer.has_chat_template
    assert tokenizer.stop_ids == (tokenizer.eos_id,)


def test_named_pad_token_wins_over_the_fallbacks(make_tokenizer):
    tokenizer = make_tokenizer(pad_token="<s>")
    assert tokenizer.pad_id == tokenizer.fast.get_vocab()["<s>"]


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_decode_inverts_encode(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=False) == text


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_offsets_agree_with_ids_and_cover_everything_but_spaces(tokenizer, text):
    ids, offsets = tokenizer.encode_with_offsets(text)
    assert ids == tokenizer.encode(text)
    assert offsets.shape == (len(ids), 2)
    covered = {i for start, end in offsets for i in range(start, end)}
    assert {i for i, c in enumerate(text) if not c.isspace()} <= covered


def test_truncation_and_padding_saved_with_the_tokenizer_are_ignored(make_fast):
    fast = make_fast()
    fast.backend_tokenizer.enable_truncation(3)
    fast.backend_tokenizer.enable_padding(length=64)
    assert len(tokenizers_.wrap(fast, "x").encode("hello hello hello hello")) not in (3, 64)


def test_load_reads_a_folder_and_its_generation_config(make_fast, tmp_path):
    fast = make_fast()
    fast.save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, 4]}))
    tokenizer = tokenizers_.load_tokenizer(tmp_path)
    assert set(tokenizer.stop_ids) == {0, 4, fast.get_vocab()["<|im_end|>"]}
    text = "hello Paris  <|im_end|>\n"
    assert tokenizer.encode(text) == fast(text, add_special_tokens=False)["input_ids"]


def test_eos_unknown_to_the_tokenizer_comes_from_the_model_config(make_fast, tmp_path):
    make_fast(eos=None).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="eos_token"):
        tokenizers_.load_tokenizer(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 4, "model_type": "llama"}))
    assert tokenizers_.load_tokenizer(tmp_path).eos_id == 4


def test_a_folder_without_a_tokenizer(tmp_path):
    with pytest.raises(UserError, match=r"no tokenizer\.json"):
        tokenizers_.load_tokenizer(tmp_path)
    with pytest.raises(UserError, match="no such folder"):
        tokenizers_.load_tokenizer(tmp_path / "absent")


def test_load_reads_a_gguf_file_through_its_own_reader(make_fast, monkeypatch):
    fast = make_fast()
    files = {Path("a/model.gguf"): fast}
    monkeypatch.setattr(gguf_vocabulary, "load_fast_tokenizer", files.__getitem__)
    assert tokenizers_.load_tokenizer("a/model.gguf").fast is fast


def test_a_missing_gguf_file(tmp_path):
    with pytest.raises(UserError, match=r"absent\.gguf"):
        tokenizers_.load_tokenizer(tmp_path / "absent.gguf")


def test_a_damaged_tokenizer(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{ not json")
    with pytest.raises(UserError, match="cannot be loaded") as e:
        tokenizers_.load_tokenizer(tmp_path)
    assert "\n" not in str(e.value)


def test_render_without_a_template_names_the_remedy(make_tokenizer):
    with pytest.raises(UserError, match=r"^test-tokenizer: the tokenizer has no chat template"):
        make_tokenizer(None).render([{"role": "user", "content": "x"}], True)


def test_a_template_that_refuses_is_the_users_error(make_tokenizer):
    tokenizer = make_tokenizer("{{ raise_exception('no system turns') }}")
    with pytest.raises(UserError, match="no system turns"):
        tokenizer.render([{"role": "system", "content": "x"}], False)


def test_a_template_that_prints_the_date_gives_the_same_text_every_day(make_tokenizer):
    tokenizer = make_tokenizer("{{ strftime_now('%d %b %Y') }}{{ messages[0].content }}")
    assert tokenizer.render([{"role": "user", "content": "x"}], False) == "26 Jul 2024x"


def test_importing_says_nothing_and_leaves_transformers_alone():
    code = (
        "import sys, qlora_jax.data.encode, qlora_jax.data.sources, qlora_jax.data.loader;"
        "assert 'transformers' not in sys.modules and 'datasets' not in sys.modules;"
        "from qlora_jax.text.tokenizer import load_tokenizer\n"
        "try: load_tokenizer('.')\nexcept ValueError: pass\n"
        "from qlora_jax.runtime.quiet import quiet_transformers"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


class PanicException(BaseException):
    """An exception with the name of the one that Rust code raises on a panic."""


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (PanicException("index out of bounds"), UserError),
        (KeyError("model"), UserError),
        (KeyboardInterrupt(), KeyboardInterrupt),
        (SystemExit(3), SystemExit),
    ],
)
def test_what_ends_loading(make_tokenizer, tmp_path, monkeypatch, error, expected) -> None:
    from transformers import PreTrainedTokenizerFast

    make_tokenizer().fast.save_pretrained(tmp_path)

    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(PreTrainedTokenizerFast, "from_pretrained", fail)
    with pytest.raises(expected) as caught:
        tokenizers_.load_tokenizer(tmp_path)
    if expected is UserError:
        assert str(tmp_path) in str(caught.value)


def saved(tokenizer, folder, change):
    """Saves the tokenizer, changes its tokenizer.json with `change`, and returns the folder."""
    tokenizer.fast.save_pretrained(str(folder))
    file = folder / "tokenizer.json"
    tree = json.loads(file.read_text("utf-8"))
    change(tree)
    file.write_text(json.dumps(tree), "utf-8")
    return folder


def test_dropout_of_merges_is_switched_off_and_said(tokenizer, tmp_path):
    folder = saved(tokenizer, tmp_path, lambda tree: tree["model"].update(dropout=0.9))
    said = []
    loaded = tokenizers_.load_tokenizer(folder, said.append)
    text = "What does the function return? " * 20
    assert [loaded.encode(text) for _ in range(5)] == [tokenizer.encode(text)] * 5
    (line,) = said
    assert line.startswith(f"warning: {folder}: dropout of tokenizer.json")


def test_names_of_settings_are_not_printed_amid_results(tokenizer, tmp_path, capfd):
    tokenizer.fast.save_pretrained(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    token = {"content": "<new>", "special": True, "no such\x1b[2J": 1}
    settings = json.loads(path.read_text()) | {"added_tokens_decoder": {"9999": token}}
    path.write_text(json.dumps(settings))
    assert "<new>" in tokenizers_.load_tokenizer(tmp_path).fast.get_vocab()
    os.write(1, b"ours")
    assert tuple(capfd.readouterr()) == ("ours", "")


def test_two_tokens_with_one_id_are_refused(tokenizer, tmp_path):
    def share(tree):
        first, second = list(tree["model"]["vocab"])[-2:]
        tree["model"]["vocab"][second] = tree["model"]["vocab"][first]
        tree["model"]["merges"] = []

    folder = saved(tokenizer, tmp_path, share)
    with pytest.raises(UserError, match=r"1 of the tokenizer's \d+ tokens have the id of another"):
        tokenizers_.load_tokenizer(folder)


def test_half_a_character_is_refused(tokenizer):
    for encode in (tokenizer.encode, tokenizer.encode_with_offsets):
        with pytest.raises(UserError, match="no UTF-8, or half a character"):
            encode("a\udcff")


def test_a_template_of_a_file_takes_the_place_of_the_tokenizers(make_fast, tmp_path):
    file = tmp_path / "own.jinja"
    file.write_text("{% for m in messages %}{{ m.role }}: {{ m.content }}</s>{% endfor %}")
    tokenizer = tokenizers_.wrap(make_fast(), "test", template=str(file))
    assert tokenizer.render([{"role": "user", "content": "x"}], False) == "user: x</s>"
    assert tokenizer.stop_texts == ("<|endoftext|>", "</s>")
    tokenizer.save(tmp_path / "out")
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == file.read_text()


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "no such file"), (b"\xff", "not UTF-8"), (b"a" * 2**20 + b"a", "over 1048576")],
)
def test_a_template_of_a_file_that_is_none_is_refused(make_fast, tmp_path, content, message):
    file = tmp_path / "own.jinja"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(UserError, match=rf"data.chat_template: .*own.jinja: {message}"):
        tokenizers_.wrap(make_fast(), "test", template=str(file))
