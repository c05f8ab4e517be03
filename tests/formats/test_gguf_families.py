"""GGUF files of every family, written like llama.cpp's converter, against the HF folders."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from safetensors.numpy import load_file

from qlora_jax.formats.gguf import open_gguf
from qlora_jax.formats.huggingface import open_folder
from qlora_jax.models.config import Rope
from qlora_jax.runtime.errors import UserError

ARCHITECTURES = {
    "mistral_window": "llama",
    "qwen3": "qwen3",
    "smollm3": "smollm3",
    "olmo2": "olmo2",
    "gemma": "gemma",
    "gemma2": "gemma2",
    "gemma3": "gemma3",
    "phi3": "phi3",
    "gpt_neox": "gptneox",
}
PERMUTED = ("llama", "smollm3")
GEMMAS = ("gemma", "gemma2", "gemma3")
UNSAID = {
    # a GGUF file has neither the attention scale nor the list of layers without rotation
    "gemma2": {"attention_scale": 16**-0.5},
    "gemma3": {"attention_scale": 16**-0.5},
    "smollm3": {"unrotated": ()},
}


def converted(name: str, weight: np.ndarray, architecture: str, raw: dict[str, Any]) -> np.ndarray:
    """Returns the content that the file holds for a tensor; permutes rows one by one."""
    heads = raw["num_attention_heads"]
    if architecture in PERMUTED and name.endswith(("q_proj.weight", "k_proj.weight")):
        heads = heads if "q_proj" in name else raw["num_key_value_heads"]
        size = len(weight) // heads
        half = size // 2
        order = [
            h * size + i + j * half for h in range(heads) for i in range(half) for j in range(2)
        ]
        return weight[order]
    if "query_key_value" in name:
        size = len(weight) // heads // 3
        order = [
            h * 3 * size + part * size + i
            for part in range(3)
            for h in range(heads)
            for i in range(size)
        ]
        return weight[order]
    if architecture in GEMMAS and name.endswith("norm.weight"):
        return weight + 1
    return weight


def write(
    path: Path,
    folder: Path,
    architecture: str,
    drop: str = "",
    extra: Mapping[str, np.ndarray] | None = None,
    **metadata: Any,
) -> dict[str, np.ndarray]:
    """Writes the folder's model as a GGUF file; returns the folder's weights."""
    raw = json.loads((folder / "config.json").read_text())
    weights = load_file(folder / "model.safetensors")
    rope = raw["rope_parameters"]
    rope = rope.get("full_attention", rope)
    head_dim = raw.get("head_dim") or raw["hidden_size"] // raw["num_attention_heads"]
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(raw["max_position_embeddings"])
    writer.add_embedding_length(raw["hidden_size"])
    writer.add_block_count(raw["num_hidden_layers"])
    writer.add_feed_forward_length(raw["intermediate_size"])
    writer.add_head_count(raw["num_attention_heads"])
    writer.add_head_count_kv(raw["num_key_value_heads"])
    writer.add_key_length(head_dim)
    if "layer_norm_eps" in raw:
        writer.add_layer_norm_eps(raw["layer_norm_eps"])
        writer.add_parallel_residual(raw["use_parallel_residual"])
    else:
        writer.add_layer_norm_rms_eps(raw["rms_norm_eps"])
    writer.add_rope_dimension_count(int(head_dim * rope.get("partial_rotary_factor", 1)))
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    if raw.get("sliding_window"):
        writer.add_sliding_window(raw["sliding_window"])
    if architecture == "gemma3":
        local = [kind == "sliding_attention" for kind in raw["layer_types"]]
        writer.add_sliding_window_pattern(local)
        writer.add_rope_freq_base_swa(raw["rope_parameters"]["sliding_attention"]["rope_theta"])
    if architecture == "gemma2":
        writer.add_attn_logit_softcapping(raw["attn_logit_softcapping"])
        writer.add_final_logit_softcapping(raw["final_logit_softcapping"])
    for key, value in metadata.items():
        add = writer.add_float32 if isinstance(value, float) else writer.add_uint32
        add(f"{architecture}.{key.replace('__', '.')}", value)
    known = next(a for a, n in gguf.MODEL_ARCH_NAMES.items() if n == architecture)
    names = gguf.get_tensor_name_map(known, raw["num_hidden_layers"])
    for name, weight in weights.items():
        stored = np.ascontiguousarray(converted(name, weight, architecture, raw))
        to = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if to != drop:
            writer.add_tensor(to, stored)
    for name, tensor in (extra or {}).items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return weights


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_file_is_the_folder_it_was_made_from(tmp_path: Path, models: Path, name: str) -> None:
    path = tmp_path / "m.gguf"
    weights = write(path, models / name, ARCHITECTURES[name])
    checkpoint, original = open_gguf(path), open_folder(models / name)
    assert checkpoint.names() == original.names()
    for key, weight in weights.items():
        # the file holds w + 1 for gemma's norms, so that w + 1 - 1 rounds once
        atol = 2.0**-23 if ARCHITECTURES[name] in GEMMAS and weight.ndim == 1 else 0
        np.testing.assert_allclose(checkpoint.read(key), weight, rtol=0, atol=atol)
    epsilon = float(np.float32(original.config.norm_eps))  # the file holds it in float32
    expected = dataclasses.replace(original.config, norm_eps=epsilon, **UNSAID.get(name, {}))
    assert checkpoint.config == expected


def test_of_an_untied_file_the_head_is_read(tmp_path: Path, models: Path) -> None:
    write(tmp_path / "m.gguf", models / "gpt_neox", "gptneox", drop="output.weight")
    assert open_gguf(tmp_path / "m.gguf").config.tie_embeddings


def test_a_window_pattern_as_a_number(tmp_path: Path, models: Path) -> None:
    write(tmp_path / "m.gguf", models / "gemma2", "gemma2", attention__sliding_window_pattern=1)
    assert open_gguf(tmp_path / "m.gguf").config.windows == (None, None)


def test_a_window_that_the_family_has_not_is_refused(tmp_path: Path, models: Path) -> None:
    path = tmp_path / "m.gguf"
    write(path, models / "qwen3", "qwen3", attention__sliding_window=8)
    with pytest.raises(UserError, match=r"qwen3.attention.sliding_window is 8; sliding") as e:
        open_gguf(path)
    assert str(e.value).startswith(f"{path}: ")
    assert "\n" not in str(e.value)


LONGROPE = {
    "rope_factors_long.weight": np.array([2, 4.5], np.float32),
    "rope_factors_short.weight": np.array([1, 1.5], np.float32),
}


def test_longrope_is_read_from_its_tables(tmp_path: Path, models: Path) -> None:
    path = tmp_path / "m.gguf"
    original = {"rope__scaling__original_context_length": 64, "rope__scaling__attn_factor": 1.25}
    write(path, models / "phi3", "phi3", extra=LONGROPE, **original)
    assert open_gguf(path).config.rope == Rope(
        fraction=0.5,
        kind="longrope",
        original_positions=64,
        short=(1, 1.5),
        long=(2, 4.5),
        attention_factor=1.25,
    )


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (
            {"rope_factors_long.weight": np.ones(4, np.float32)},
            r"has shape \(4,\); expected \(2,\)",
        ),
        (
            {"rope_factors_long.weight": np.ones(2, np.float32)},
            "rope scaling 'longrope' without rope_factors_short.weight",
        ),
        (
            {"rope_factors_short.weight": np.ones(2, np.float32)},
            "rope scaling 'linear' beside rope_factors_short.weight is not supported",
        ),
        (
            {**LONGROPE, "rope_freqs.weight": np.ones(2, np.float32)},
            "rope scaling 'longrope' beside rope_freqs.weight is not supported",
        ),
    ],
)
def test_half_a_longrope_is_refused(tmp_path: Path, models: Path, extra, message) -> None:
    path = tmp_path / "m.gguf"
    write(path, models / "phi3", "phi3", extra=extra)
    with pytest.raises(UserError, match=f"m.gguf: .*{message}"):
        open_gguf(path)
