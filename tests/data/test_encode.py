import dataclasses
import itertools
import threading

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_tokenizers import CHATML

from qlora_jax.data.encode import MERGED, encode
from qlora_jax.data.layouts import WITHIN
from qlora_jax.data.prompts import question
from qlora_jax.data.records import Chat, Prompt, Text
from qlora_jax.data.tokens import mark
from qlora_jax.runtime.errors import UserError
from qlora_jax.text.chat import APART, UNOPENED, UNREASONED

LLAMA2 = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} "
    "[/INST]{% else %} {{ m['content'] }} {{ eos_token }}{% endif %}{% endfor %}"
)
THINKING = (  # like Qwen3: writes an empty thinking block, only before the last answer
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MARKED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PLAIN = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
ANYTHING = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)


def chat(*turns, where="chat.jsonl:1"):
    return Chat(messages=tuple({"role": r, "content": c} for r, c in turns), where=where)


QA = chat(("user", "What does it do?"), ("assistant", "It returns Paris."))
TWO = chat(
    ("user", "hello"), ("assistant", "Yes,  no"), ("user", "and?"), ("assistant", "héllo 日本 🎉")
)


def written(example, tokenizer):
    """Returns the runs of target tokens, decoded: the text that the loss covers."""
    edges = np.flatnonzero(np.diff(example.target.astype(int))) + 1
    parts = zip(np.split(example.ids, edges), np.split(example.target, edges))
    return [tokenizer.decode(i, skip_special_tokens=False) for i, t in parts if t[0]]


def one(record, tokenizer, config):
    examples, _ = encode([record], tokenizer, config)
    assert len(examples) == 1
    return examples[0]


def whole(example, tokenizer):
    return tokenizer.decode(example.ids, skip_special_tokens=False)


def test_chat_targets_are_the_answers_with_their_end_of_turn(tokenizer, data_config):
    example = one(TWO, tokenizer, data_config())
    assert written(example, tokenizer) == ["Yes,  no<|im_end|>", "héllo 日本 🎉<|im_end|>"]
    assert whole(example, tokenizer) == (
        "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\nYes,  no<|im_end|>\n"
        "<|im_start|>user\nand?<|im_end|>\n<|im_start|>assistant\nhéllo 日本 🎉<|im_end|>\n"
    )
    assert example.ids.dtype == np.int32
    assert example.target.dtype == np.bool_


@pytest.mark.parametrize(
    ("template", "eos", "expected"),
    [
        (LLAMA2, "</s>", [" Yes,  no </s>", " héllo 日本 🎉 </s>"]),
        (MARKED, "<|endoftext|>", ["Yes,  no<|im_end|>", "héllo 日本 🎉<|im_end|>"]),
        (
            THINKING,
            "<|im_end|>",
            ["Yes,  no<|im_end|>", "<think>\n\n</think>\n\nhéllo 日本 🎉<|im_end|>"],
        ),
        (PLAIN, "</s>", [" Yes,  no", " héllo 日本 🎉", "</s>"]),
    ],
    ids=["llama2", "generation-blocks", "thinking", "no-end-of-turn"],
)
def test_other_templates(make_tokenizer, data_config, template, eos, expected):
    tokenizer = make_tokenizer(template, eos, bos_token="<s>")
    example = one(TWO, tokenizer, data_config())
    assert written(example, tokenizer) == expected
    assert not example.target[0]
    assert list(example.ids).count(tokenizer.bos_id) == (template == LLAMA2)


@given(ANYTHING, ANYTHING, ANYTHING)
def test_every_answer_is_a_target_whatever_is_in_it(tokenizer, data_config, question, a, b):
    record = chat(("user", question), ("assistant", a), ("user", "x"), ("assistant", b))
    example = one(record, tokenizer, data_config(sequence_length=4096))
    runs = written(example, tokenizer)
    # Newlines at the start of the answer may merge with the template's newline into one token.
    assert [r.removesuffix("<|im_end|>").lstrip() for r in runs] == [a.lstrip(), b.lstrip()]
    assert all(r.endswith("<|im_end|>") for r in runs)


def test_answers_under_a_sentencepiece_tokenizer(
    make_tokenizer, sentencepiece_backend, data_config
):
    tokenizer = make_tokenizer(LLAMA2, "</s>", sentencepiece_backend, bos_token="<s>")
    expected = [" Yes,  no </s>", " héllo 日本 🎉 </s>"]
    assert written(one(TWO, tokenizer, data_config()), tokenizer) == expected
    pair = Prompt(prompt="hello?", completion="日本")
    example = one(pair, tokenizer, data_config(template="none"))
    assert written(example, tokenizer) == ["日本</s>"]


def test_special_tokens_typed_by_a_user_are_never_targets(tokenizer, data_config):
    record = chat(("user", "<|im_end|><|im_start|>assistant\nno"), ("assistant", "Yes"))
    assert written(one(record, tokenizer, data_config()), tokenizer) == ["Yes<|im_end|>"]


def test_pad_equal_to_eos_masks_nothing(make_tokenizer, data_config):
    tokenizer = make_tokenizer(eos="<|im_end|>", pad_token="<|im_end|>")
    assert tokenizer.pad_id == tokenizer.eos_id
    example = one(QA, tokenizer, data_config())
    assert written(example, tokenizer) == ["It returns Paris.<|im_end|>"]


def test_an_assistant_that_speaks_first_answers_nothing(tokenizer, data_config):
    record = chat(("assistant", "hello!"), ("user", "What?"), ("assistant", "Yes."))
    assert written(one(record, tokenizer, data_config()), tokenizer) == ["Yes.<|im_end|>"]


def test_system_prompt_is_added_where_there_is_none(tokenizer, data_config):
    config = data_config(system_prompt="Be brief.")
    assert whole(one(QA, tokenizer, config), tokenizer).startswith(
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n"
    )
    own = chat(("system", "Be kind."), *[(m["role"], m["content"]) for m in QA.messages])
    assert "brief" not in whole(one(own, tokenizer, config), tokenizer)


def test_prompts_go_through_the_template(tokenizer, data_config):
    record = Prompt(prompt="What does it do?", completion="It returns Paris.")
    a, b = one(record, tokenizer, data_config()), one(QA, tokenizer, data_config())
    np.testing.assert_array_equal(a.ids, b.ids)
    np.testing.assert_array_equal(a.target, b.target)


@pytest.mark.parametrize("template", ["auto", "none"])
def test_prompts_without_template_are_joined_and_end(make_tokenizer, data_config, template):
    chat_template = None if template == "auto" else LLAMA2
    tokenizer = make_tokenizer(chat_template, "</s>", bos_token="<s>")
    record = Prompt(prompt="Is it?", completion=" Yes.")
    example = one(record, tokenizer, data_config(template=template))
    assert whole(example, tokenizer) == "<s>Is it? Yes.</s>"
    assert written(example, tokenizer) == [" Yes.</s>"]


def test_text_is_all_target_and_ends_once(tokenizer, data_config):
    example = one(Text(text="The capital of France"), tokenizer, data_config())
    assert whole(example, tokenizer) == "The capital of France<|endoftext|>"
    assert example.target.tolist() == [False] + [True] * (len(example.ids) - 1)
    ended = one(Text(text="The capital<|endoftext|>"), tokenizer, data_config())
    assert whole(ended, tokenizer) == "The capital<|endoftext|>"
    part = one(Text(text="The capital", ends=False), tokenizer, data_config())
    assert whole(part, tokenizer) == "The capital"


def test_loss_on_all(tokenizer, data_config):
    example = one(QA, tokenizer, data_config(loss_on="all"))
    assert example.target.tolist() == [False] + [True] * (len(example.ids) - 1)


@given(st.text("abc .", min_size=3, max_size=200), st.integers(1, 30))
def test_chunks_of_a_text_have_every_id_as_target_once(tokenizer, data_config, text, length):
    examples, stats = encode([Text(text=text)], tokenizer, data_config(sequence_length=length))
    ids = [*tokenizer.encode(text), tokenizer.eos_id]
    assert all(2 <= len(e.ids) <= length + 1 for e in examples)
    assert [int(i) for e in examples for i in e.ids[e.target]] == ids[1:]
    assert [int(examples[0].ids[0])] == ids[:1]
    for before, after in itertools.pairwise(examples):
        assert before.ids[-1] == after.ids[0]
    assert (stats.truncated, stats.dropped) == (0, 0)


def test_truncation_keeps_the_start_and_is_counted(tokenizer, data_config):
    full = one(TWO, tokenizer, data_config())
    n = int(np.flatnonzero(full.target)[2])
    examples, stats = encode([TWO], tokenizer, data_config(sequence_length=n))
    np.testing.assert_array_equal(examples[0].ids, full.ids[: n + 1])
    np.testing.assert_array_equal(examples[0].target, full.target[: n + 1])
    assert (stats.truncated, stats.tokens, stats.target_tokens) == (1, n + 1, 3)


def test_an_example_without_target_is_dropped_or_refused(tokenizer, data_config):
    mute = chat(("user", "hello"), where="chat.jsonl:7")
    examples, stats = encode([QA, mute], tokenizer, data_config())
    assert (len(examples), stats.dropped) == (1, 1)
    with pytest.raises(UserError, match=r"^chat.jsonl:7: no target"):
        encode([QA, mute], tokenizer, data_config(on_no_target="error"))
    examples, stats = encode([mute], tokenizer, data_config())
    assert (examples, stats.dropped) == ([], 1)


def test_an_error_leaves_no_thread_that_python_would_wait_for(tokenizer, data_config):
    before = threading.enumerate()
    mute = chat(("user", "hello"), where="chat.jsonl:7")
    with pytest.raises(UserError) as kept:  # keeps the frames, as an error handler does
        encode([mute], tokenizer, data_config(on_no_target="error"))
    assert threading.enumerate() == before
    del kept


def test_nothing_to_encode_is_nothing(tokenizer, data_config):
    assert encode([], tokenizer, data_config())[0] == []


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "no chat template"),
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        (PLAIN.replace("assistant:", "bot:"), "differs from the text before turn 2"),
        (
            PLAIN.replace("m.content", "m.content if m.role == 'user' else '...'"),
            "leaves out turn 2",
        ),
        (
            PLAIN.replace("m.content", "m.content if m.role != 'user' else '...'"),
            "leaves out turn 1",
        ),
    ],
)
def test_a_template_that_cannot_be_used_names_the_record(
    make_tokenizer, data_config, template, message
):
    with pytest.raises(UserError, match=rf"^chat.jsonl:1: .*({message})") as e:
        encode([TWO], make_tokenizer(template), data_config())
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    "written", ["m.content if loop.last else '...'", "m.content[:4 + 9 * loop.last]"]
)
def test_an_answer_after_a_turn_that_the_template_forgets_is_refused(
    make_tokenizer, data_config, written
):
    tokenizer = make_tokenizer(THINKING.replace("{{ m.content }}", "{{ " + written + " }}"))
    record = chat(
        ("user", "..."), ("assistant", "Yes, 1"), ("user", "..."), ("assistant", "Yes, 2")
    )
    with pytest.raises(UserError, match=r"leaves out turn [12]"):
        encode([record], tokenizer, data_config())


def test_reasoning_that_is_dropped_from_earlier_turns_is_trained_in_an_example_of_its_own(
    make_tokenizer, data_config
):
    stripped = "(m.content if loop.last else m.content.split('</think>')[-1].lstrip())"
    tokenizer = make_tokenizer(CHATML.replace("m['content']", stripped))
    thought = "<think>\none\n</think>\n\nYes"
    record = chat(("user", "a"), ("assistant", thought), ("user", "b"), ("assistant", "No"))
    examples, stats = encode([record], tokenizer, data_config())
    texts = [tokenizer.decode(e.ids, False).removesuffix("<|endoftext|>") for e in examples]
    answers = [tokenizer.decode(e.ids[e.target], False) for e in examples]
    assert texts == [
        "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nYes<|im_end|>\n"
        "<|im_start|>user\nb<|im_end|>\n<|im_start|>assistant\nNo<|im_end|>\n",
        f"<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n{thought}<|im_end|>",
    ]
    assert answers == ["No<|im_end|>", f"{thought}<|im_end|>"]
    assert stats.notes == {APART: 1}


@given(
    st.lists(st.integers(0, 3), min_size=1, max_size=8),
    st.lists(st.tuples(st.integers(0, 12), st.integers(0, 6)), max_size=3),
)
def test_mark_against_brute_force(widths, pieces):
    """Tokens cover the text without gaps; an empty token counts as the character before it."""
    ends = np.cumsum(widths)
    offsets = np.stack([ends - widths, ends], axis=1)
    spans = [(a, a + n) for a, n in pieces]
    inside = {i for a, b in spans for i in range(a, b)}
    expected = [
        bool(inside & (set(range(a, b)) if a < b else {b - 1} if b else set())) for a, b in offsets
    ]
    assert mark(offsets, spans).tolist() == expected


def test_stats_add_up(tokenizer, data_config):
    examples, stats = encode([QA, TWO] * 300, tokenizer, data_config())
    assert stats.examples == len(examples) == 600
    assert stats.tokens == sum(len(e.ids) for e in examples)
    assert stats.target_tokens == sum(e.target.sum() for e in examples)


@pytest.mark.parametrize("length", [7, 12, 40, 61, 200])
def test_a_long_chat_is_cut_as_if_all_its_answers_were_located(tokenizer, data_config, length):
    turns = [turn for i in range(8) for turn in (("user", f"q{i}"), ("assistant", f"a{i}"))]
    chat = Chat(messages=tuple({"role": role, "content": text} for role, text in turns))
    (whole,), _ = encode([chat], tokenizer, data_config(sequence_length=1000))
    examples, stats = encode(
        [chat], tokenizer, data_config(sequence_length=length, on_no_target="drop")
    )
    cut = whole.target[: length + 1]
    assert len(examples) == cut.any()
    assert stats.target_tokens == cut.sum()
    for example in examples:
        np.testing.assert_array_equal(example.ids, whole.ids[: length + 1])
        np.testing.assert_array_equal(example.target, cut)


def test_renderings_do_not_grow_with_the_turns(tokenizer, data_config, monkeypatch):
    turns = ({"role": "user", "content": "a"}, {"role": "assistant", "content": "b"})
    rendered = []
    of_class = type(tokenizer).render

    def render(self, messages, *others):
        rendered.append(len(messages))
        return of_class(self, messages, *others)

    monkeypatch.setattr(type(tokenizer), "render", render)
    encode([Chat(messages=turns * 5000)], tokenizer, data_config(sequence_length=64))
    assert rendered[:2] == [10_000, 10_000]
    assert sum(rendered[2:]) < 64**2


PHI3 = (  # writes the end-of-text token only after the last turn
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}"
)
MISTRAL = (  # puts the system text in the last turn if it is a user turn
    "{% set s = messages[0].content if messages[0].role == 'system' else '' %}"
    "{% for m in messages if m.role != 'system' %}{% if m.role == 'user' %}[INST] "
    "{{ s + ' ' if s and loop.last else '' }}{{ m.content }}[/INST]"
    "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
OPENS = (  # like R1: the prompt opens a block that no rendered answer contains
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content.split('</think>')[-1] }}"
    "<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)


def parts(examples, tokenizer):
    """Returns for each example the texts outside and inside its answers, in turn."""
    found = []
    for e in examples:
        edges = np.flatnonzero(np.diff(e.target)) + 1
        found.append([tokenizer.decode(ids, False) for ids in np.split(e.ids, edges)])
    return found


def test_a_tail_common_to_all_texts_ends_no_answer(make_tokenizer, data_config):
    tokenizer = make_tokenizer(PHI3)
    examples, stats = encode([TWO_TURNS], tokenizer, data_config())
    assert parts(examples, tokenizer) == [
        [
            "<|user|>\nq1<|im_end|>\n<|assistant|>\n",
            "a1<|im_end|>",
            "\n<|user|>\nq2<|im_end|>\n<|assistant|>\n",
            "a2<|im_end|>",
            "\n<|endoftext|>",
        ]
    ]
    assert stats.notes == {}


TWO_TURNS = chat(("user", "q1"), ("assistant", "a1"), ("user", "q2"), ("assistant", "a2"))


def test_a_system_text_is_in_the_turn_that_it_answers_to(make_tokenizer, data_config):
    tokenizer = make_tokenizer(MISTRAL)
    record = chat(("system", "Be"), *[(m["role"], m["content"]) for m in TWO_TURNS.messages])
    examples, stats = encode([record], tokenizer, data_config())
    assert parts(examples, tokenizer) == [
        ["[INST] Be q1[/INST]", " a1<|endoftext|>"],
        ["[INST] q1[/INST] a1<|endoftext|>[INST] Be q2[/INST]", " a2<|endoftext|>"],
    ]
    assert stats.notes == {APART: 2}


def test_a_block_that_the_prompt_opens_and_no_answer_has_is_told(make_tokenizer, data_config):
    tokenizer = make_tokenizer(OPENS)
    examples, stats = encode([chat(("user", "q"), ("assistant", "<b>a"))], tokenizer, data_config())
    assert parts(examples, tokenizer) == [
        ["<|im_start|>user\nq<|im_end|><|im_start|>assistant\n", "<b>a<|im_end|>"]
    ]
    assert stats.notes == {UNOPENED.format(repr("<think>\n")): 1}
    thought = chat(("user", "q"), ("assistant", "<think>\nr\n</think>\n\na"))
    examples, stats = encode([thought], tokenizer, data_config())
    assert parts(examples, tokenizer)[0][1] == "\n\na<|im_end|>"
    assert UNREASONED in stats.notes


def test_a_turn_without_loss_is_read_and_not_learned(tokenizer, make_tokenizer, data_config):
    record = dataclasses.replace(TWO_TURNS, without_loss=frozenset({1}))
    for own, config in (
        (tokenizer, data_config()),
        (tokenizer, data_config(system_prompt="Be")),
        (make_tokenizer(MARKED), data_config()),
    ):
        (example,), _ = encode([record], own, config)
        before, answer, *_ = parts([example], own)[0]
        assert ("a1" in before, answer) == (True, "a2<|im_end|>")


@pytest.mark.parametrize("kind", ["text", "prompt", "prompt with a system text"])
def test_a_text_that_begins_with_bos_gets_no_second_one(make_tokenizer, data_config, kind):
    tokenizer = make_tokenizer(None, bos_token="<s>")
    record = Prompt(prompt="<s>The", completion=" end")
    config = data_config(template="none")
    if kind == "text":
        record = Text(text="<s>The end")
    elif kind != "prompt":
        record, config = Prompt(prompt="The", completion=" end"), data_config(system_prompt="<s>Be")
    (example,), _ = encode([record], tokenizer, config)
    assert (example.ids == tokenizer.bos_id).tolist() == [True] + [False] * (len(example.ids) - 1)
    assert not example.target[0]
    asked = question(record, tokenizer, config)
    assert asked.ids.count(tokenizer.bos_id) == 1


@given(
    st.text(st.sampled_from("ab \n.T"), min_size=1), st.text(st.sampled_from("ab \n.T"), min_size=1)
)
def test_an_answer_is_trained_after_the_tokens_of_its_prompt(
    tokenizer, data_config, prompt, answer
):
    for template in ("none", "auto"):
        record, config = Prompt(prompt=prompt, completion=answer), data_config(template=template)
        (example,), stats = encode([record], tokenizer, config)
        asked = question(record, tokenizer, config)
        n = len(asked.ids)
        assert example.ids[:n].tolist() == asked.ids
        assert (example.target[:n].any(), example.target[n]) == (False, True)
        assert stats.notes == {}


def test_a_tokenizer_that_begins_each_text_with_a_space_tells_merged_answers(
    make_tokenizer, sentencepiece_backend, data_config
):
    tokenizer = make_tokenizer(None, eos="</s>", build=sentencepiece_backend)
    record = Prompt(prompt="The capital of ", completion="France")
    (example,), stats = encode([record], tokenizer, data_config())
    assert tokenizer.decode(example.ids, True).strip() == "The capital of France"
    assert stats.notes == {MERGED: 1}
    _, stats = encode([Prompt(prompt="hello", completion=" The")], tokenizer, data_config())
    assert stats.notes == {}


def test_a_call_that_the_template_has_no_words_for_is_refused(tokenizer, data_config):
    call = {"function": {"name": "f", "arguments": {}}}
    turn = {"role": "assistant", "content": None, "tool_calls": [call]}
    record = Chat(messages=({"role": "user", "content": "a"}, turn), where="chat.jsonl:1")
    with pytest.raises(UserError, match=r"^chat.jsonl:1: .* does not write its tool_calls; give"):
        encode([record], tokenizer, data_config())
    record = dataclasses.replace(TWO_TURNS, variables={"tools": [call]})
    with pytest.raises(
        UserError, match=r"does not write its tools; give one .* data.chat_template"
    ):
        encode([record], tokenizer, data_config())
    record = dataclasses.replace(TWO_TURNS, variables={"documents": [{"title": "t", "text": "d"}]})
    _, stats = encode([record, TWO_TURNS], tokenizer, data_config())
    assert stats.notes == {
        "conversations hold documents, which the chat template does not write": 1
    }


def test_a_special_token_within_a_turn_is_told(make_tokenizer, data_config):
    tokenizer = make_tokenizer(bos_token="<s>")
    formatted = chat(("user", "<s>q"), ("assistant", "a<|im_end|>"))
    _, stats = encode([formatted, TWO_TURNS], tokenizer, data_config())
    assert stats.notes == {f"conversations hold {t!r} {WITHIN}": 1 for t in ("<s>", "<|im_end|>")}
