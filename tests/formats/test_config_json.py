import dataclasses
import json
from pathlib import Path

import pytest

from qlora_jax.formats.config_json import to_hugging_face
from qlora_jax.models.config import Rope, from_hugging_face
from qlora_jax.runtime.errors import UserError

MODELS = Path(__file__).parents[1] / "golden" / "models"
KINDS = sorted(p.parent.name for p in MODELS.glob("*/config.json"))


def read(kind: str):
    return from_hugging_face(json.loads((MODELS / kind / "config.json").read_text()), kind)


@pytest.mark.parametrize("kind", KINDS)
def test_every_familys_shapes_are_read_back(kind):
    config = read(kind)
    written = json.loads(json.dumps(to_hugging_face(config)))
    assert from_hugging_face(written, "again") == config
    assert (
        written["architectures"]
        == json.loads((MODELS / kind / "config.json").read_text())["architectures"]
    )


def test_windows_of_a_family_that_has_none_stay_none():
    config = read("mistral")
    plain = dataclasses.replace(config, windows=(None,) * config.num_layers)
    assert from_hugging_face(to_hugging_face(plain), "again").windows == plain.windows


LONGROPE = Rope(
    kind="longrope", original_positions=64, short=(1.0, 1.5), long=(2.0, 4.0), attention_factor=1.1
)
YARN = Rope(
    kind="yarn",
    factor=4.0,
    original_positions=64,
    beta_fast=16.0,
    beta_slow=2.0,
    attention_factor=0.9,
)


@pytest.mark.parametrize(
    ("kind", "rope"),
    [
        ("llama", LONGROPE),
        ("llama", YARN),
        ("llama", dataclasses.replace(YARN, truncate=False, theta=5e5)),
        ("llama", Rope(kind="dynamic", factor=2.0, original_positions=512)),
        ("gemma3", dataclasses.replace(YARN, theta=1e6)),
        ("phi3", dataclasses.replace(LONGROPE, fraction=0.5)),
        ("gpt_neox", dataclasses.replace(YARN, fraction=0.25, theta=2e4)),
    ],
)
def test_scaled_ropes_are_read_back(kind, rope):
    config = read(kind)
    pairs = int(config.head_dim * rope.fraction) // 2
    if rope.kind == "longrope":
        rope = dataclasses.replace(
            rope, short=rope.short * (pairs // 2), long=rope.long * (pairs // 2)
        )
    scaled = dataclasses.replace(config, rope=rope)
    written = json.loads(json.dumps(to_hugging_face(scaled)))
    assert from_hugging_face(written, "again") == scaled
    assert written["rope_scaling"]["rope_type"] == rope.kind


def test_what_would_be_read_as_another_model_is_refused():
    odd = dataclasses.replace(read("llama"), unrotated=(1,))
    with pytest.raises(UserError, match="llama model's shapes cannot be written"):
        to_hugging_face(odd)
    linear = dataclasses.replace(read("phi3"), rope=Rope(kind="linear", factor=2.0, fraction=0.5))
    with pytest.raises(UserError, match="rope scaling 'linear' is not supported"):
        to_hugging_face(linear)
