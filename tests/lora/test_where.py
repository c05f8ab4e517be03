"""Choice by path: an expression matches the whole path, a name matches whole components."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_jax.lora.where import LISTED, chosen
from qlora_jax.runtime.errors import UserError

PARTS = {"ffw_norm.w": 1, "layers.0.attn.query.w": 2, "layers.0.mlp.up.w": 3, "w": 4}


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        (r"w", {"w"}),
        (r".*attn.*", {"layers.0.attn.query.w"}),
        (r"layers\.\d+\.(attn|mlp)\..*", {"layers.0.attn.query.w", "layers.0.mlp.up.w"}),
        (["query", "mlp.up"], {"layers.0.attn.query.w", "layers.0.mlp.up.w"}),
        (["w"], set(PARTS)),
        (["layers.0"], {"layers.0.attn.query.w", "layers.0.mlp.up.w"}),
        (lambda path, part: part > 2, {"layers.0.mlp.up.w", "w"}),
    ],
)
def test_choice(where, expected):
    assert chosen(where, PARTS, "weights").keys() == expected


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("query", "matches none of the weights; there are ffw_norm.w, layers.0.attn.query.w"),
        (["query", "uery"], "'uery' names none of the weights; there are ffw_norm.w"),
        (lambda path, part: False, "matches none of the weights"),
        ("(", "is not a regular expression"),
        ([], "matches none of the weights"),
    ],
)
def test_refused(where, message):
    with pytest.raises(UserError, match="where: ") as error:
        chosen(where, PARTS, "weights")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_long_lists_are_cut():
    parts = {f"layers.{i}.w": i for i in range(LISTED + 5)}
    with pytest.raises(UserError, match=f"layers.{LISTED - 1}.w and 5 more"):
        chosen("nothing", parts, "weights")


@given(st.lists(st.sampled_from("abc"), min_size=1, max_size=5), st.data())
def test_a_name_is_consecutive_components(components, data):
    path = ".".join(components)
    start = data.draw(st.integers(0, len(components) - 1))
    stop = data.draw(st.integers(start + 1, len(components)))
    assert chosen([".".join(components[start:stop])], {path: 0}, "weights") == {path: 0}
