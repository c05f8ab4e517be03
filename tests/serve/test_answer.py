import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from qlora_jax.serve.answer import Answer

ALPHABET = "ab€é "


def decode(ids):
    return bytes(ids).decode("utf-8", "replace")


def told(ids, cuts, stop):
    """Feeds ids in parts of sizes `cuts`; returns the pieces, the token count and `stopped`."""
    answer = Answer(decode, stop)
    pieces = []
    for part in cuts:
        pieces.append(answer.add(ids[:part]))
        ids = ids[part:]
        if answer.stopped:
            break
    else:
        pieces.append(answer.add(ids))
    pieces.append(answer.finish())
    return pieces, answer.tokens, answer.stopped


texts = st.text(ALPHABET, max_size=12)
garbage = st.binary(max_size=12)
stops = st.lists(st.text(ALPHABET, min_size=1, max_size=3), max_size=3)


@given(texts.map(str.encode) | garbage, st.lists(st.integers(0, 4), max_size=8), stops)
@example(b" aa", [], ["a", " aa"])  # " aa" starts earlier, "a" is complete earlier
def test_the_pieces_are_the_text_up_to_the_first_stop_however_the_ids_come(data, cuts, stop):
    pieces, tokens, stopped = told(list(data), cuts, stop)
    ends = [n for n in range(len(data) + 1) if any(s in decode(data[:n]) for s in stop)]
    needed = min(ends, default=len(data))
    text = decode(data[:needed])
    places = [text.find(s) for s in stop if s in text]
    assert "".join(pieces) == text[: min(places, default=len(text))]
    assert (tokens, stopped) == (needed, bool(ends))


@pytest.mark.parametrize(
    ("ids", "stop", "first"),
    [
        (b"ab", [], "ab"),
        ("a€".encode()[:2], [], "a"),
        (b"ab", ["bc"], "a"),
        (b"abab", ["abc", "bax"], "ab"),
        (b"abab", ["b"], "a"),
    ],
)
def test_what_is_certain_is_told_at_once(ids, stop, first):
    assert Answer(decode, stop).add(list(ids)) == first


def test_nothing_follows_a_stop():
    answer = Answer(decode, ["b"])
    assert answer.add(list(b"abc")) == "a"
    assert answer.add(list(b"xyz")) == answer.finish() == ""
    assert answer.tokens == 2
