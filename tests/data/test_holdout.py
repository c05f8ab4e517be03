from hypothesis import given
from hypothesis import strategies as st

from qlora_jax.data.builtin.passages import passages
from qlora_jax.data.holdout import hold_out
from qlora_jax.data.records import Chat, Text

TEXTS = st.lists(st.text("ab \n", max_size=4), max_size=30)
FRACTIONS = st.floats(0.001, 0.999)


def records(texts):
    return [Text(text=t) for t in texts]


def sides(texts, fraction):
    train, held = hold_out(records(texts), fraction)
    return {t.text for t in train}, {t.text for t in held}


@given(TEXTS, FRACTIONS)
def test_nothing_is_lost_and_no_text_is_on_both_sides(texts, fraction):
    train, held = hold_out(records(texts), fraction)
    assert sorted(r.text for r in train + held) == sorted(texts)
    assert not {" ".join(r.text.split()) for r in train} & {" ".join(r.text.split()) for r in held}


@given(TEXTS, FRACTIONS, st.randoms())
def test_order_and_repetition_do_not_matter(texts, fraction, random):
    other = texts + texts[: len(texts) // 2]
    random.shuffle(other)
    assert sides(texts, fraction) == sides(other, fraction)


@given(TEXTS, FRACTIONS)
def test_neither_side_is_empty_when_there_are_two_texts(texts, fraction):
    if len({" ".join(t.split()) for t in texts}) >= 2:
        train, held = sides(texts, fraction)
        assert train
        assert held


def test_share_is_about_the_fraction():
    _, held = hold_out(records(map(str, range(10_000))), 0.05)
    assert 400 < len(held) < 600


def test_zero_holds_nothing_out():
    assert hold_out(records("ab"), 0.0) == (records("ab"), [])


def test_the_split_is_the_same_forever():
    _, held = hold_out(records(map(str, range(40))), 0.1)
    assert [r.text for r in held] == ["9", "39"]


def test_conversations_that_say_the_same_stay_on_the_side_that_what_is_said_decides():
    def chat(text, variables, **keys):
        turn = {"role": "user", "content": text}
        return Chat(messages=({**turn, **keys},), variables=variables)

    said = [f"user: {n}" for n in range(40)]
    _, held = hold_out(records(said), 0.1)
    assert held
    for variables, keys in (({}, {}), ({"tools": [1]}, {}), ({}, {"name": "x"})):
        _, chats = hold_out([chat(str(n), variables, **keys) for n in range(40)], 0.1)
        assert [r.spoken for r in chats] == [r.text for r in held]


@given(st.text("a .\n", max_size=300), st.integers(1, 20))
def test_passages_join_to_the_text_and_keep_their_size(text, size):
    pieces = list(passages(text, size))
    assert "".join(pieces) == text
    assert all(size <= len(p) <= 2 * size for p in pieces[:-1])


def test_passages_end_at_the_best_break_in_range():
    text = "one two. three\nfour\n\nfive six seven eight nine ten eleven twelve"
    assert next(passages(text, 15)) == "one two. three\nfour\n\n"
    assert next(passages(text, 10)) == "one two. three\n"
    assert next(passages(text, 8)) == "one two. three\n"
    assert next(passages(text, 5)) == "one two. "
