"""Positions of the contents in a rendered conversation, found by mark characters."""

from hypothesis import given
from hypothesis import strategies as st

from qlora_jax.text.content_positions import FIRST_MARK, locate_contents

contents = st.text(st.sampled_from("ab \n</think>é🌞"), max_size=12)


@given(st.lists(contents, max_size=5), st.booleans())
def test_the_ends_are_where_the_contents_were_joined(texts, trimmed):
    """The template joins contents, trimmed or unchanged, so that the test knows their ends."""
    messages = [{"role": "user", "content": text} for text in texts]

    def render(turns):
        written = [m["content"].strip() if trimmed else m["content"] for m in turns]
        return "".join(f"[{text}]" for text in written)

    placed = locate_contents(messages, render)
    ends, at = {}, 0
    for turn, text in enumerate(texts):
        written = text.strip() if trimmed else text
        if text.strip():
            ends[turn] = at + 1 + len(written.rstrip())
            assert placed.start(turn, text) == ends[turn] - len(text.strip())
        at += len(written) + 2
    assert (placed.text, placed.ends, placed.known) == (render(messages), ends, True)


def test_a_content_that_is_left_out_has_no_end():
    messages = [{"role": "tool", "content": "out"}, {"role": "user", "content": "in"}]
    placed = locate_contents(
        messages, lambda turns: "".join(m["content"] for m in turns if m["role"] == "user")
    )
    assert (placed.text, placed.ends) == ("in", {1: 2})


def test_a_template_that_reads_the_mark_gives_no_places():
    placed = locate_contents(
        [{"role": "user", "content": "word"}], lambda turns: str(len(turns[0]["content"]))
    )
    assert (placed.text, placed.ends, placed.known) == ("4", {}, False)


def test_a_text_with_such_characters_gives_no_places():
    text = f"a{chr(FIRST_MARK + 7)}"
    placed = locate_contents([{"role": "user", "content": text}], lambda turns: turns[0]["content"])
    assert (placed.text, placed.known) == (text, False)
