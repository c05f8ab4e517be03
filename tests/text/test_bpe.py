import pytest

from qlora_jax.runtime.errors import UserError
from qlora_jax.text.bpe import train_bpe
from qlora_jax.text.tokenizer import load_tokenizer

TEXTS = ["low low low low low", "lower lower newest newest newest newest newest newest", "widest é"]


def test_merges_are_the_most_frequent_pairs():
    # Words: newest x6, low x5, lower x2, widest x1; so the pair "we" occurs 8 times, "lo" 7.
    merges = train_bpe(TEXTS, 259 + 2, "t").fast.backend_tokenizer.to_str()
    assert '"merges":[["w","e"],["l","o"]]' in merges.replace(" ", "") or (
        '"merges":["we","lo"]' in merges.replace(" ", "")
    )


def test_every_text_survives():
    tokenizer = train_bpe(TEXTS, 300, "t")
    text = "Zürich 東京\x00\t\n  def f(x): return {}"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert max(tokenizer.encode("\N{SNOWMAN}lowest")) < tokenizer.vocab_size <= 300


def test_equal_texts_give_equal_tokenizers():
    first, second = (train_bpe(iter(TEXTS * 3), 320, "t") for _ in range(2))
    assert first.fast.backend_tokenizer.to_str() == second.fast.backend_tokenizer.to_str()


def test_chats_end_where_generation_stops():
    tokenizer = train_bpe(TEXTS, 300, "t")
    messages = [{"role": "user", "content": "low"}, {"role": "assistant", "content": "newest"}]
    text = tokenizer.render(messages, add_generation_prompt=False)
    assert text == "<|im_start|>user\nlow<|im_end|>\n<|im_start|>assistant\nnewest<|im_end|>\n"
    assert tokenizer.render(messages[:1], add_generation_prompt=True) == text.partition("newest")[0]
    assert set(tokenizer.stop_texts) == {"<|endoftext|>", "<|im_end|>"}


def test_a_folder_gives_the_same_tokenizer(tmp_path):
    tokenizer = train_bpe(TEXTS, 300, "t")
    tokenizer.fast.save_pretrained(tmp_path)
    again = load_tokenizer(tmp_path)
    assert again.encode("lower newest") == tokenizer.encode("lower newest")
    assert (again.eos_id, again.pad_id, again.bos_id) == (tokenizer.eos_id, tokenizer.pad_id, None)
    assert (again.stop_ids, again.template) == (tokenizer.stop_ids, tokenizer.template)


def test_no_room_for_the_bytes():
    with pytest.raises(UserError, match="give 259 or more"):
        train_bpe(TEXTS, 258, "t")
