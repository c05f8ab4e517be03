"""Compares our reading of RoPE settings, and the rotations, with transformers'."""

import copy
import functools
import json

import jax.numpy as jnp
import numpy as np
import pytest
from huggingface_hub.errors import StrictDataclassError
from pairs import our_logits, ours, their_logits, theirs, tokens, torch, transformers

from qlora_jax.formats.config_json import to_hugging_face
from qlora_jax.models.config import from_hugging_face
from qlora_jax.models.rope import by_layer, rotations, segment_lengths
from qlora_jax.runtime.errors import UserError

pytestmark = pytest.mark.parity

SHAPE = {
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 128,
    "vocab_size": 320,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
}
OWN = {
    "gemma": {"head_dim": 32},
    "gemma2": {"head_dim": 32, "sliding_window": 8},
    "gemma3_text": {
        "head_dim": 32,
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "gpt_neox": {"num_key_value_heads": 4, "rotary_pct": 0.5},
    "qwen3": {"head_dim": 32},
    "phi3": {"original_max_position_embeddings": 64},
}
"""Settings that a family's tiny config needs beside `SHAPE`."""

FAMILIES = (
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "smollm3",
    "olmo2",
    "gemma",
    "gemma2",
    "gemma3_text",
    "phi3",
    "gpt_neox",
)
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
SCALINGS = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
    "llama3": LLAMA3,
    "yarn": YARN,
    "yarn-untruncated": YARN | {"truncate": False},
    "yarn-betas": YARN | {"beta_fast": 8, "beta_slow": 2.5},
    "yarn-attention": YARN | {"attention_factor": 0.7},
    "yarn-mscale": YARN | {"mscale": 0.7, "mscale_all_dim": 1.2},
    "yarn-one-mscale": YARN | {"mscale": 0.7, "beta_fast": 0},
    "yarn-ratio": YARN | {"factor": None},
    "yarn-no-original": {"rope_type": "yarn", "factor": 4.0},
    "longrope": {"rope_type": "longrope"},
    "longrope-factor": {"rope_type": "longrope", "factor": 2.5},
    "longrope-attention": {"rope_type": "longrope", "attention_factor": 1.3},
}
POSITIONS = (3, 64, 65, 256, 300)
"""Lengths on both sides of the scalings' original 64 and the models' 256 positions."""


def scaling_of(family: str, name: str) -> dict:
    scaling = SCALINGS[name]
    if scaling["rope_type"] != "longrope":
        return scaling
    head_dim = OWN.get(family, {}).get("head_dim", 16)
    pairs = head_dim // (4 if family == "gpt_neox" else 2)
    factors = {
        "short_factor": [1 + 0.1 * i for i in range(pairs)],
        "long_factor": [2 + 0.5 * i for i in range(pairs)],
    }
    return {"original_max_position_embeddings": 64} | scaling | factors


def their_config(family: str, settings: dict):
    raw = copy.deepcopy(SHAPE | OWN.get(family, {}) | settings)
    return transformers.AutoConfig.for_model(family, **raw)


@functools.cache
def embedding_class(family: str) -> type:
    model = transformers.AutoModelForCausalLM.from_config(their_config(family, {}))
    (found,) = {type(m) for name, m in model.named_modules() if name.endswith("rotary_emb")}
    return found


def their_rotations(family: str, settings: dict, lengths=POSITIONS) -> list[dict]:
    """Returns transformers' cosines and sines by kind of layer, one entry for each length.

    Each length has a new embedding, because dynamic scalings keep state between calls.
    """
    found = []
    for length in lengths:
        config = their_config(family, settings)
        emb = embedding_class(family)(config)
        places = torch.arange(length)[None]
        x = torch.zeros(1)
        if family == "gemma3_text":
            kinds = {kind: emb(x, places, kind) for kind in sorted(set(config.layer_types))}
        else:
            kinds = {"full_attention": emb(x, places)}
        # transformers stores each cosine and sine twice; one half is enough.
        halves = {
            kind: [t[0, :, : t.shape[-1] // 2].numpy() for t in pair]
            for kind, pair in kinds.items()
        }
        found.append(halves)
    return found


def our_config(family: str, settings: dict):
    raw = {"model_type": family} | SHAPE | OWN.get(family, {}) | settings
    return from_hugging_face(raw, "config.json")


def our_rotations(config, lengths=POSITIONS) -> list[dict]:
    found = []
    for length in lengths:
        places = jnp.arange(length, dtype=jnp.int32)[None]
        sizes = segment_lengths(jnp.ones_like(places), places) if config.varying_rope else None
        turned = rotations(config, places, sizes)
        ropes, index = by_layer(config)
        kinds = {"full_attention": turned}
        if config.local_rope is not None:
            layers = {bool(window): i for window, i in zip(config.windows, index)}
            kinds = {
                "full_attention": [t[layers[False]] for t in turned],
                "sliding_attention": [t[layers[True]] for t in turned],
            }
        elif len(ropes) > 1:
            kinds = {"full_attention": [t[index[0]] for t in turned]}
        found.append({k: [np.asarray(t)[0, :, 0] for t in pair] for k, pair in kinds.items()})
    return found


def assert_same_rotations(mine: list[dict], expected: list[dict]) -> None:
    for own, other in zip(mine, expected, strict=True):
        assert own.keys() == other.keys()
        for kind, pair in other.items():
            for a, b in zip(own[kind], pair, strict=True):
                np.testing.assert_allclose(a, b, rtol=0, atol=2e-4)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", SCALINGS)
def test_every_kind_in_every_family(family, name):
    settings = {"rope_scaling": scaling_of(family, name)}
    allowed = family != "phi3" or SCALINGS[name]["rope_type"] in ("default", "longrope")
    if not allowed:
        if SCALINGS[name]["rope_type"] == "yarn":
            settings["rope_scaling"] = settings["rope_scaling"] | {"short_factor": [1.0]}
        with pytest.raises(Exception, match=r"rope_parameters|longrope"):
            their_rotations(family, settings, (3,))
        with pytest.raises(UserError):
            our_config(family, settings)
        return
    config = our_config(family, settings)
    expected = their_rotations(family, settings)
    assert_same_rotations(our_rotations(config), expected)
    if name == "default":
        return
    plain = their_rotations(family, {})
    assert any(
        np.abs(a["full_attention"][0] - b["full_attention"][0]).max() > 1e-2
        for a, b in zip(expected, plain)
    )


LINEAR = {"rope_type": "linear", "factor": 4.0}
LONG = {"short_factor": [1.0 + i for i in range(8)], "long_factor": [3.0 + i for i in range(8)]}
READ_ALIKE = {
    "scaling beside parameters": (
        "llama",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 5e4}, "rope_scaling": LINEAR},
    ),
    "empty scaling beside parameters": (
        "llama",
        {"rope_parameters": LINEAR | {"rope_theta": 5e4}, "rope_scaling": {}},
    ),
    "old names": ("llama", {"rope_theta": 5e4, "rope_scaling": {"type": "linear", "factor": 2}}),
    "both types": ("llama", {"rope_scaling": {"rope_type": "default", "type": "linear"}}),
    "theta within and beside": ("llama", {"rope_theta": 3.0, "rope_scaling": {"rope_theta": 7e3}}),
    "factor of default": ("llama", {"rope_scaling": {"rope_type": "default", "factor": 9}}),
    "original beside and within": (
        "llama",
        {"rope_scaling": YARN, "original_max_position_embeddings": 32},
    ),
    "original of llama3 beside": (
        "llama",
        {"rope_scaling": LLAMA3, "original_max_position_embeddings": 32},
    ),
    "original of linear beside": (
        "llama",
        {"rope_scaling": LINEAR, "original_max_position_embeddings": 32},
    ),
    "fraction beside": ("llama", {"partial_rotary_factor": 0.5}),
    "fraction within": ("llama", {"rope_parameters": {"partial_rotary_factor": 0.5}}),
    "fraction null": ("llama", {"partial_rotary_factor": None, "rope_scaling": LINEAR}),
    "whole fraction and scaling": (
        "llama",
        {"partial_rotary_factor": 1.0, "rope_scaling": LINEAR},
    ),
    "smollm3's own theta": ("smollm3", {"rope_scaling": YARN}),
    "neox: names of its own": (
        "gpt_neox",
        {"rotary_emb_base": 2e4, "rotary_pct": 0.25, "rope_theta": 3.0, "rope_scaling": YARN},
    ),
    "neox: scaling beside parameters": (
        "gpt_neox",
        {
            "rope_parameters": {"rope_theta": 5e4, "partial_rotary_factor": 1.0},
            "rope_scaling": LINEAR,
        },
    ),
    "phi3: fraction within and beside": (
        "phi3",
        {"partial_rotary_factor": 0.25, "rope_parameters": {"partial_rotary_factor": 0.5}},
    ),
    "phi3: odd channels": ("phi3", {"partial_rotary_factor": 0.32}),
    "phi3: default original": (
        "phi3",
        {
            "max_position_embeddings": 8192,
            "original_max_position_embeddings": 4096,
            "rope_scaling": {"type": "longrope"} | LONG,
        },
    ),
    "phi3: original within is not read": (
        "phi3",
        {"rope_scaling": {"type": "longrope", "original_max_position_embeddings": 16} | LONG},
    ),
    "phi3: yarn is longrope": ("phi3", {"rope_scaling": {"type": "yarn"} | LONG}),
    "phi3: su is longrope": (
        "phi3",
        {"rope_scaling": {"type": "su", "original_max_position_embeddings": 64} | LONG},
    ),
    "gemma3: scaling updates full attention": (
        "gemma3_text",
        {
            "rope_parameters": {
                "full_attention": {"rope_type": "default", "rope_theta": 5e5},
                "sliding_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 3e4},
            },
            "rope_scaling": LINEAR,
        },
    ),
    "gemma3: old names": (
        "gemma3_text",
        {"rope_theta": 5e5, "rope_local_base_freq": 2e4, "rope_scaling": LINEAR},
    ),
    "gemma3: type is not read": ("gemma3_text", {"rope_scaling": {"type": "linear", "factor": 4}}),
    "gemma3: flat parameters are not read": (
        "gemma3_text",
        {"rope_parameters": LINEAR | {"rope_theta": 77.0}},
    ),
    "gemma3: one kind of layer": (
        "gemma3_text",
        {"rope_parameters": {"sliding_attention": LINEAR}, "rope_theta": 9e5},
    ),
    "gemma3: original beside is not read": (
        "gemma3_text",
        {"rope_scaling": YARN, "original_max_position_embeddings": 32},
    ),
    "gemma3: truncate is read outside": (
        "gemma3_text",
        {
            "rope_parameters": {
                "truncate": False,
                "full_attention": YARN | {"rope_theta": 1e6},
                "sliding_attention": YARN | {"rope_theta": 1e4},
            }
        },
    ),
}


@pytest.mark.parametrize("name", READ_ALIKE)
def test_settings_are_read_alike(name):
    family, settings = READ_ALIKE[name]
    expected = their_rotations(family, settings)
    assert_same_rotations(our_rotations(our_config(family, settings)), expected)


REFUSED_BY_BOTH = {
    "unknown": ("llama", {"rope_scaling": {"type": "ntk", "factor": 2}}),
    "null": ("llama", {"rope_scaling": {"rope_type": None, "type": "linear", "factor": 4}}),
    "theta null": ("llama", {"rope_theta": None}),
    "theta null within": ("llama", {"rope_parameters": {"rope_theta": None}}),
    "no factor": ("llama", {"rope_scaling": {"rope_type": "linear"}}),
    "factor null": ("llama", {"rope_scaling": {"rope_type": "linear", "factor": None}}),
    "text": ("llama", {"rope_scaling": {"rope_type": "linear", "factor": "4"}}),
    "no yarn factor": ("llama", {"rope_scaling": {"rope_type": "yarn"}}),
    "too few divisors": (
        "llama",
        {"rope_scaling": {"rope_type": "longrope"} | LONG, "head_dim": 8},
    ),
    "fraction and scaling": ("llama", {"partial_rotary_factor": 0.5, "rope_scaling": LINEAR}),
    "not an object": ("llama", {"rope_scaling": True}),
    "by kind of layer": ("qwen2", {"rope_parameters": {"full_attention": LINEAR}}),
    "gemma2: by kind of layer": ("gemma2", {"rope_parameters": {"full_attention": LINEAR}}),
    "gemma3: scaling beside flat parameters": (
        "gemma3_text",
        {"rope_parameters": {"rope_type": "default"}, "rope_scaling": LINEAR},
    ),
    "phi3: linear": ("phi3", {"rope_scaling": LINEAR}),
    "phi3: fraction null": ("phi3", {"partial_rotary_factor": None}),
}


@pytest.mark.parametrize("name", REFUSED_BY_BOTH)
def test_what_transformers_fails_on_is_refused(name):
    family, settings = REFUSED_BY_BOTH[name]
    failed = False
    try:
        model = transformers.AutoModelForCausalLM.from_config(their_config(family, settings))
        model(input_ids=torch.zeros((1, 4), dtype=torch.long))
    except (KeyError, TypeError, ValueError, RuntimeError, StrictDataclassError):
        failed = True
    assert failed
    with pytest.raises(UserError):
        our_config(family, settings)


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("llama", "linear"),
        ("llama", "yarn"),
        ("llama", "dynamic"),
        ("qwen2", "longrope"),
        ("smollm3", "yarn"),
        ("gemma3_text", "dynamic"),
        ("gemma3_text", "yarn-attention"),
        ("phi3", "longrope"),
        ("gpt_neox", "yarn"),
    ],
)
def test_logits_of_a_scaling_written_into_a_saved_folder(tmp_path, family, name):
    """transformers 5 saves rope_parameters; model cards tell users to add rope_scaling by hand."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(their_config(family, {})).float()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=0.1)
    model.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    raw = json.loads(file.read_text())
    assert raw["rope_parameters"]
    plain = theirs(tmp_path)
    file.write_text(json.dumps(raw | {"rope_scaling": scaling_of(family, name)}))
    mine = ours(tmp_path)
    for length in (48, 280):
        ids = tokens(mine, 1, length=length)
        expected = their_logits(theirs(tmp_path), ids)
        np.testing.assert_allclose(our_logits(mine, ids), expected, atol=2e-4, rtol=0)
    assert np.abs(expected - their_logits(plain, ids)).max() > 1e-2


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", SCALINGS)
def test_what_is_written_is_read_alike(family, name):
    if family == "phi3" and SCALINGS[name]["rope_type"] not in ("default", "longrope"):
        return
    scaling = scaling_of(family, name)
    if family == "gemma3_text":
        scaling = {key: value for key, value in scaling.items() if key != "truncate"}
    config = our_config(family, {"rope_scaling": scaling})
    written = to_hugging_face(config)
    assert written.pop("model_type") == family
    assert_same_rotations(our_rotations(config), their_rotations(family, written))
