"""From a config to a model: configs refused before weights are read, and the models built."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from qlora_jax import config as configs
from qlora_jax.formats.huggingface import open_folder
from qlora_jax.models import trees
from qlora_jax.quant import dequantize
from qlora_jax.runtime.errors import UserError
from qlora_jax.train import pretrained
from qlora_jax.train.examples import read_data
from qlora_jax.train.setup import load_run_model, open_model

pytestmark = pytest.mark.quick


@pytest.fixture
def make_config(tiny_model, chats):
    """Makes a config of the tiny model; arguments are settings, with __ for the dot."""

    def make(**changes):
        tree = {
            "model": {"path": str(tiny_model)},
            "data": {"source": str(chats), "sequence_length": 64, "eval_fraction": 0.25},
            "output": "run",
            "lora": {"rank": 4},
        }
        for key, value in changes.items():
            *parents, last = key.split("__")
            node = tree
            for name in parents:
                node = node.setdefault(name, {})
            node[last] = value
        return configs.from_tree(tree, "test")

    return make


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (
            {"data__sequence_length": 513},
            r"data.sequence_length 513 is beyond the 512 positions of .*; give 512 or less",
        ),
        ({"quant__codebook": "nf5"}, "nf5.* nf4"),
        ({"quant__block_size": 48}, "block_size 48 is not allowed; allowed: 32, 64"),
        ({"lora__target_modules": ["q_porj"]}, "lora.target_modules .*q_porj.* q_proj"),
        ({"lora__target_modules": ".*nothing"}, "lora.target_modules '.*nothing' matches no"),
        ({"lora__rank_pattern": {"q_porj": 2}}, "lora.rank_pattern: 'q_porj' matches no linear"),
    ],
)
def test_what_cannot_be_is_refused_before_any_weight_is_read(
    make_config, tiny_model, monkeypatch, changes, says
):
    def read(*args):
        raise AssertionError("a weight was read")

    monkeypatch.setattr(type(open_folder(tiny_model)), "read", read)
    with pytest.raises(UserError, match=says) as e:
        open_model(make_config(**changes))
    assert "\n" not in str(e.value)


def test_the_codebook_is_not_looked_at_where_nothing_is_quantized(make_config):
    open_model(make_config(method="lora", quant__codebook="nf5"))


def test_targets_are_not_looked_at_where_every_weight_is_trained(make_config):
    open_model(make_config(method="full", lora__target_modules=["q_porj"]))


def test_a_sequence_as_long_as_the_model_allows(make_config):
    checkpoint, text = open_model(make_config(data__sequence_length=512))
    assert checkpoint.config.max_positions == 512
    assert text.vocab_size <= checkpoint.config.vocab_size


@pytest.fixture
def wide_tokenizer(tiny_model, tmp_path):
    """The tiny model with a token beyond its 256 embeddings, as Gemma 3's text models have."""
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    path = folder / "tokenizer.json"
    tree = json.loads(path.read_text(encoding="utf-8"))
    more = {"id": 256, "content": "<|more|>", "special": True}
    tree["added_tokens"].append(tree["added_tokens"][0] | more)
    tree["model"]["vocab"] |= {f"<|{i}|>": i for i in range(len(tree["model"]["vocab"]), 256)}
    path.write_text(json.dumps(tree), encoding="utf-8")
    return folder


def test_a_token_beyond_the_embedding_is_refused_where_it_is_used(
    make_config, wide_tokenizer, tmp_path
):
    config = make_config(model__path=str(wide_tokenizer))
    _, text = open_model(config)
    assert text.vocab_size == 257
    assert read_data(config, text, 512).train
    used = tmp_path / "used.jsonl"
    texts = ("before", "and <|more|> of it")
    used.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    config = make_config(
        model__path=str(wide_tokenizer), data__source=str(used), data__eval_fraction=0.0
    )
    data = read_data(config, text, 512)
    assert (len(data.train), data.found.bad.count) == (1, 1)
    config = dataclasses.replace(
        config, data=dataclasses.replace(config.data, on_bad_record="error")
    )
    says = r"used\.jsonl:2: the text holds the token '<\|more\|>' with the id 256, and the model h"
    with pytest.raises(UserError, match=says) as e:
        read_data(config, text, 512)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("role", ["eos_token", "bos_token"])
def test_an_end_of_every_text_beyond_the_embedding_is_refused(make_config, wide_tokenizer, role):
    path = wide_tokenizer / "tokenizer_config.json"
    tree = json.loads(path.read_text("utf-8")) | {role: "<|more|>"}
    tree |= {"tokenizer_class": "LlamaTokenizer", "add_bos_token": role == "bos_token"}
    path.write_text(json.dumps(tree))
    with pytest.raises(
        UserError, match=r"model: every text has the token '<\|more\|>' with the id"
    ):
        open_model(make_config(model__path=str(wide_tokenizer)))


def test_padding_and_stops_beyond_the_embedding_are_not_used(make_config, wide_tokenizer):
    path = wide_tokenizer / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | {"pad_token": "<|more|>"}))
    (wide_tokenizer / "generation_config.json").write_text('{"eos_token_id": [256, 3]}')
    _, text = open_model(make_config(model__path=str(wide_tokenizer)))
    assert text.pad_id == text.eos_id
    assert 3 in text.stop_ids
    assert max(text.stop_ids) < 256
    with pytest.raises(UserError, match=r"'<\|more\|>' with the id 256"):
        text.encode_with_offsets("<|more|>")


def test_examples_questions_and_what_was_left_out(make_config):
    config = make_config(train__samples=2)
    _, text = open_model(config)
    data = read_data(config, text, 512)
    assert len(data.train) + len(data.held_out[""]) + sum(data.dropped.values()) == 24
    assert 2 <= len(data.held_out[""]) < 12
    assert data.stats.examples == len(data.train)
    assert [q.prompt.startswith("What does ") for q in data.questions] == [True, True]
    held_out = [text.decode(e.ids) for e in data.held_out[""]]
    assert all(any(q.prompt in row for row in held_out) for q in data.questions)
    shown = [text.decode(e.ids) for e in data.train]
    assert not any(q.prompt in row for row in shown for q in data.questions)


def test_a_prompt_without_room_for_an_answer_is_no_question(make_config):
    config = make_config(train__samples=2, train__sample_tokens=24)
    _, text = open_model(config)
    longest = max(len(q.ids) for q in read_data(config, text, 512).questions)
    assert len(read_data(config, text, longest + 24).questions) == 2
    assert all(len(q.ids) < longest for q in read_data(config, text, longest + 23).questions)
    assert read_data(config, text, 24).questions == []


def test_a_held_out_part_without_a_target_leaves_the_training(make_config, tmp_path):
    path = tmp_path / "mute.jsonl"
    path.write_text(json.dumps({"prompt": "hello " * 200, "completion": "yes"}) + "\n")
    config = make_config(data__eval_source=str(path))
    data = read_data(config, open_model(config)[1], 512)
    assert data.train
    assert data.held_out == {}
    assert data.dropped["no target"] == 1


def test_examples_without_a_target_are_counted(make_config):
    # prompts have 38 to 44 tokens, so 41 leaves no room for some answers
    config = make_config(data__sequence_length=41)
    data = read_data(config, open_model(config)[1], 512)
    left = len(data.train) + len(data.held_out[""])
    assert 0 < left < 24
    assert data.dropped == {"no target": 24 - left}
    assert data.stats.examples == len(data.train)
    assert 0 < data.stats.dropped < 24 - left


@pytest.mark.parametrize(
    ("method", "storage", "adapter"),
    [
        ("qlora", "bfloat16", "float32"),
        ("qlora", "float32", "bfloat16"),
        ("lora", "bfloat16", "float32"),
        ("lora", "float16", "float16"),
        ("full", "bfloat16", "float32"),
        ("full", "float32", "bfloat16"),
    ],
)
def test_dtypes_are_those_of_the_config(make_config, method, storage, adapter):
    config = make_config(
        method=method,
        model__storage_dtype=storage,
        lora__dtype=adapter,
        lora__target_modules=["q_proj"],
    )
    model, specs = load_run_model(config, open_model(config)[0], pytest.fail)
    _, trained, frozen = trees.split(model, method)
    types = {path: str(x.dtype) for path, x in trees.flatten(trained).items()}
    assert set(types.values()) == {adapter}
    if method == "full":
        assert len(types) == 12
        assert not specs
        assert not trees.flatten(frozen)
        return
    assert sorted(types) == ["runs.0.q_proj.adapter.a", "runs.0.q_proj.adapter.b"]
    assert len(specs) == 3
    for path, x in trees.flatten(frozen).items():
        linear = "_proj.weight" in path
        if path.endswith("adapter.scale"):
            assert x.dtype == jnp.float32
        elif method == "qlora" and linear:
            part = path.rpartition(".")[2]
            expected = "uint8" if part in ("codes", "scales") else "float32"
            assert str(x.dtype) == expected, path
        else:
            assert str(x.dtype) == storage, path


@pytest.mark.parametrize("method", ["qlora", "lora", "full"])
def test_weights_are_those_of_the_files(make_config, tiny_model, method):
    config = make_config(method=method, model__storage_dtype="float32")
    model, _ = load_run_model(config, open_model(config)[0], pytest.fail)
    stored, decoded = load_file(tiny_model / "model.safetensors"), jax.jit(dequantize)
    np.testing.assert_array_equal(model.embed.get_value(), stored["model.embed_tokens.weight"])
    for path, linear, i in model.walk():
        weight = linear.weight.get_value()
        if method == "qlora":
            exact = stored[f"{path}.weight"].T
            error = np.abs(np.asarray(decoded(weight))[i] - exact)
            # half of NF4's widest gap (0.304 absmax), plus the rounding of absmax to 8 bits
            assert error.max() <= 0.16 * np.abs(exact).max()
            assert error.max() > 0
        else:
            np.testing.assert_array_equal(weight[i], stored[f"{path}.weight"].T)


@pytest.mark.parametrize("method", ["qlora", "lora", "full"])
def test_an_attention_kernel_that_is_not_trusted_is_not_used(make_config, monkeypatch, method):
    asked, lines = [], []

    def trusted(kind, device, warn):
        asked.append(kind)
        warn("warning: wrong")
        return "xla"

    monkeypatch.setattr(pretrained, "trusted_attention", trusted)
    config = make_config(method=method, model__compute_dtype="float16")
    model, _ = load_run_model(config, open_model(config)[0], lines.append)
    assert lines == ["warning: wrong"]
    assert [run.attention for run in model.runs] == ["xla"]
    (kind,), decoder = asked, model.config
    assert (kind.dtype, kind.head_size) == ("float16", decoder.head_dim)
    assert kind.group * decoder.num_kv_heads == decoder.num_heads


def test_a_rank_above_the_full_one_is_warned_about_by_name(make_config):
    config = make_config(
        method="lora",
        lora__target_modules=["k_proj", "q_proj"],
        lora__rank_pattern={"layers.1.self_attn.k_proj": 33},
    )
    lines = []
    load_run_model(config, open_model(config)[0], lines.append)
    assert len(lines) == 1
    assert lines[0].startswith("warning: the rank is above min(in, out) of 1 linears")
    assert lines[0].endswith("model.layers.1.self_attn.k_proj")
    config = make_config(method="lora", lora__target_modules=["k_proj"], lora__rank=32)
    load_run_model(config, open_model(config)[0], pytest.fail)


def test_adapters_follow_from_the_seed(make_config):
    def a(seed):
        config = make_config(method="lora", lora__target_modules=["q_proj"], train__seed=seed)
        model, _ = load_run_model(config, open_model(config)[0], pytest.fail)
        return np.asarray(model.runs[0].q_proj.adapter.a.get_value())

    np.testing.assert_array_equal(a(3), a(3))
    assert (a(3) != a(4)).mean() > 0.99


def test_a_folder_is_opened_once(make_config, tiny_model):
    checkpoint, text = open_model(make_config())
    assert checkpoint.path == open_folder(tiny_model).path
    assert text.source == str(tiny_model)
    assert jax.tree.leaves(text.decode(text.encode("a ü"))) == ["a ü"]
