import dataclasses
import json
from pathlib import Path

import pytest

from qlora_jax.formats.config_json import to_hugging_face
from qlora_jax.models.config import from_hugging_face
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


def test_what_would_be_read_as_another_model_is_refused():
    odd = dataclasses.replace(read("llama"), unrotated=(1,))
    with pytest.raises(UserError, match="llama model's shapes cannot be written"):
        to_hugging_face(odd)
