import json
import os
import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from qlora_jax.formats.huggingface import open_folder
from qlora_jax.formats.peft import Replaced, check_fits, read_adapter, write_adapter
from qlora_jax.lora.arithmetic import adapter_difference
from qlora_jax.lora.spec import SCALINGS
from qlora_jax.lora.weights import LoraWeights
from qlora_jax.models.weight_shapes import adaptable
from qlora_jax.runtime import json_files
from qlora_jax.runtime.errors import UserError

Q0, Q1 = "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"
UP1 = "model.layers.1.mlp.up_proj"
ROW = np.ones(64, np.float32)


def make(rank: int, alpha: float, dtype: type = np.float32) -> LoraWeights:
    """Makes a random adapter of a linear from 64 to 32 features."""
    random = np.random.default_rng(rank)
    a = random.normal(size=(64, rank)).astype(dtype)
    b = random.normal(size=(rank, 32)).astype(dtype)
    return LoraWeights(a, b, alpha, alpha)


def factor(adapter: LoraWeights, scaling: str) -> float:
    return SCALINGS[scaling](adapter.alpha, adapter.rank)


def config(folder: Path) -> dict:
    return json.loads((folder / "adapter_config.json").read_text())


@pytest.fixture
def reference(models: Path, tmp_path: Path) -> Path:
    """A copy of an adapter that PEFT wrote; a test may damage it."""
    return Path(shutil.copytree(models / "llama" / "peft_lora", tmp_path / "reference"))


def edit_config(folder: Path, **changes: object) -> None:
    (folder / "adapter_config.json").write_text(json.dumps(config(folder) | changes))


@pytest.mark.parametrize(
    ("name", "scaling"), [("peft_lora", "alpha/r"), ("peft_rslora", "alpha/sqrt(r)")]
)
def test_what_peft_wrote_survives_reading_and_writing(
    models: Path, tmp_path: Path, name: str, scaling: str
) -> None:
    original = models / "llama" / name
    adapter = read_adapter(original)
    assert adapter.scaling == scaling
    assert len(adapter.adapters) == 21
    assert {(a.rank, a.alpha) for a in adapter.adapters.values()} == {(8, 16)}
    assert adapter.adapters["model.layers.0.mlp.down_proj"].a.shape == (128, 8)
    write_adapter(
        tmp_path / "out",
        adapter.adapters,
        base_name="llama",
        scaling=adapter.scaling,
        modules=adaptable(open_folder(models / "llama").config),
    )
    before = load_file(original / "adapter_model.safetensors")
    after = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert before.keys() == after.keys()
    for key, tensor in before.items():
        np.testing.assert_array_equal(after[key], tensor)
    theirs, ours = config(original), config(tmp_path / "out")
    assert sorted(theirs.pop("target_modules")) == ours.pop("target_modules")
    assert ours == {key: theirs[key] for key in ours}


def test_the_models_revision_is_recorded(tmp_path: Path) -> None:
    for revision in (None, "v2"):
        out = tmp_path / str(revision)
        write_adapter(out, {Q0: make(4, 8)}, base_name="m", revision=revision)
        assert config(out)["revision"] == revision


def test_tensors_are_the_transposes(tmp_path: Path) -> None:
    adapter = make(4, 8)
    write_adapter(tmp_path / "a", {Q0: adapter}, base_name="m")
    tensors = load_file(tmp_path / "a" / "adapter_model.safetensors")
    prefix = f"base_model.model.{Q0}"
    np.testing.assert_array_equal(tensors[f"{prefix}.lora_A.weight"], adapter.a.T)
    np.testing.assert_array_equal(tensors[f"{prefix}.lora_B.weight"], adapter.b.T)


def test_other_ranks_and_alphas_become_patterns(tmp_path: Path) -> None:
    adapters = {Q0: make(4, 8), Q1: make(4, 8), UP1: make(2, 6.5)}
    write_adapter(tmp_path / "a", adapters, base_name="m")
    written = config(tmp_path / "a")
    assert (written["r"], written["lora_alpha"]) == (4, 8)
    assert written["rank_pattern"] == {UP1: 2}
    assert written["alpha_pattern"] == {UP1: 6.5}
    for path, adapter in read_adapter(tmp_path / "a").adapters.items():
        assert (adapter.rank, adapter.alpha) == (adapters[path].rank, adapters[path].alpha)


def test_rank_zero_is_left_out(tmp_path: Path) -> None:
    adapters = {Q0: make(4, 8), Q1: make(0, 8)}
    write_adapter(tmp_path / "a", adapters, base_name="m")
    read = read_adapter(tmp_path / "a").adapters
    assert list(read) == [Q0]
    np.testing.assert_array_equal(read[Q0].a, adapters[Q0].a)
    np.testing.assert_array_equal(read[Q0].b, adapters[Q0].b)


def test_constant_scaling_keeps_the_factor_at_every_rank(tmp_path: Path) -> None:
    adapters = {Q0: make(4, 0.5), UP1: make(8, 0.5)}
    write_adapter(tmp_path / "a", adapters, base_name="m", scaling="constant")
    read = read_adapter(tmp_path / "a")
    assert read.scaling == "alpha/r"
    assert {factor(a, read.scaling) for a in read.adapters.values()} == {0.5}


def test_factors() -> None:
    adapter = make(16, 32)
    assert factor(adapter, "alpha/r") == 2
    assert factor(adapter, "alpha/sqrt(r)") == 8
    assert factor(adapter, "constant") == 32


UP0 = "model.layers.0.mlp.up_proj"


@pytest.mark.parametrize(
    ("modules", "paths", "targets"),
    [
        ([Q0, Q1, UP0, UP1, "lm_head"], [Q0, Q1], ["q_proj"]),
        ([Q0, Q1, UP0, UP1, "lm_head"], [Q0, Q1, "lm_head"], ["lm_head", "q_proj"]),
        ([Q0, Q1, UP0, UP1], [Q0], [Q0]),
        ([Q0, Q1, UP0, UP1], [Q1], [Q1]),
        ([Q0, Q1, UP0, UP1], [Q0, Q1, UP1], [UP1, Q0, Q1]),
        (None, [Q0, Q1], [Q0, Q1]),
    ],
)
def test_short_target_names_only_where_they_claim_no_more(
    tmp_path, modules, paths, targets
) -> None:
    adapters = {path: make(4, 8) for path in paths}
    write_adapter(tmp_path / "a", adapters, base_name="m", modules=modules)
    assert sorted(config(tmp_path / "a")["target_modules"]) == sorted(targets)


def test_bfloat16_adapters(tmp_path: Path) -> None:
    adapter = make(4, 8, dtype=ml_dtypes.bfloat16)
    write_adapter(tmp_path / "a", {Q0: adapter}, base_name="m", dropout=0.1)
    read = read_adapter(tmp_path / "a")
    assert read.dropout == 0.1
    assert read.adapters[Q0].a.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(read.adapters[Q0].a, adapter.a)


def test_patterns_match_by_suffix_and_expression_as_in_peft(reference: Path) -> None:
    edit_config(reference, alpha_pattern={"layers.1.mlp.up_proj": 3, ".*[qk]_proj": 5, "q_proj": 7})
    read = read_adapter(reference).adapters
    assert read["model.layers.1.mlp.up_proj"].alpha == 3
    assert read["model.layers.0.mlp.up_proj"].alpha == 16
    assert read[Q0].alpha == 5


def test_writing_again_replaces_the_adapter(tmp_path: Path) -> None:
    write_adapter(tmp_path / "a", {Q0: make(4, 8)}, base_name="m")
    write_adapter(tmp_path / "a", {UP1: make(2, 8)}, base_name="m")
    assert list(read_adapter(tmp_path / "a").adapters) == [UP1]
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_a_failed_write_leaves_the_old_adapter(tmp_path: Path, monkeypatch) -> None:
    write_adapter(tmp_path / "a", {Q0: make(4, 8)}, base_name="m")

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("killed")

    monkeypatch.setattr("qlora_jax.formats.peft.write.save", fail)
    with pytest.raises(RuntimeError):
        write_adapter(tmp_path / "a", {UP1: make(2, 8)}, base_name="m")
    assert list(read_adapter(tmp_path / "a").adapters) == [Q0]
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_a_failed_swap_puts_the_old_adapter_back(tmp_path: Path, monkeypatch) -> None:
    write_adapter(tmp_path / "a", {Q0: make(4, 8)}, base_name="m")
    replace = os.replace

    def fail(source: Path, target: Path) -> None:
        if Path(source).name == "new":
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(KeyboardInterrupt):
        write_adapter(tmp_path / "a", {UP1: make(2, 8)}, base_name="m")
    assert list(read_adapter(tmp_path / "a").adapters) == [Q0]


def test_never_replaces_other_files(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"holds notes.txt"):
        write_adapter(tmp_path, {Q0: make(4, 8)}, base_name="m")
    with pytest.raises(UserError, match="a file is in the way"):
        write_adapter(tmp_path / "notes.txt", {Q0: make(4, 8)}, base_name="m")
    with pytest.raises(UserError, match="nothing to write"):
        write_adapter(tmp_path / "a", {Q0: make(0, 8)}, base_name="m")


def without(key: str, *more: tuple[str, np.ndarray]):
    def damage(folder: Path) -> None:
        path = folder / "adapter_model.safetensors"
        tensors = load_file(path)
        tensors = {k: v for k, v in tensors.items() if key not in k} | dict(more)
        save_file(tensors, path)

    return damage


def setting(**changes: object):
    return lambda folder: edit_config(folder, **changes)


def truncate(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-5])


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (without(f"{Q0}.lora_A"), rf"missing: base_model.model.{Q0}.lora_A.weight"),
        (without("lora"), "missing: every tensor"),
        (
            without("nothing", (f"base_model.model.{Q0}.lora_magnitude_vector", np.ones(64))),
            "unexpected tensors: .*lora_magnitude_vector",
        ),
        (truncate, "truncated or damaged"),
        (
            lambda f: (f / "adapter_model.safetensors").unlink(),
            "reference: no adapter_model.safetensors in it; give a folder in PEFT's format",
        ),
        (
            lambda f: (f / "adapter_config.json").unlink(),
            "reference: no adapter_config.json in it; give a folder in PEFT's format",
        ),
        (
            lambda f: (f / "adapter_config.json").rename(f / "config.json"),
            "no adapter_config.json in it; it is a model, not an adapter; give it as model.path",
        ),
        (lambda f: (f / "adapter_config.json").write_text("{"), "not valid JSON"),
        (lambda f: (f / "adapter_config.json").write_text("[]"), "not a JSON object"),
        (setting(r=4), r"has A \[8, 128\] and B \[64, 8\], but adapter_config.json says rank 4"),
        (setting(peft_type="IA3"), "peft_type 'IA3' is not supported"),
        (setting(use_dora=True), f"missing: .*{Q0}.lora_magnitude_vector"),
        (setting(lora_bias=True), "lora_bias is set"),
        (setting(bias="some"), "bias 'some': Input should be 'none', 'all' or 'lora_only'"),
        (setting(lora_alpha=None), "lora_alpha None: Input should be a valid number"),
        (setting(lora_alpha="8"), "lora_alpha '8': Input should be a valid number"),
        (setting(lora_alpha=True), "lora_alpha True: Input should be a valid number"),
        (setting(lora_alpha=float("nan")), "lora_alpha nan: Input should be a finite number"),
        (setting(r=8.5), "r 8.5: Input should be a valid integer"),
        (setting(target_modules=None), "target_modules.* None"),
        (setting(target_modules=[]), "target_modules.*at least 1 item"),
        (setting(target_modules=[1]), "target_modules.* 1: Input should be a valid string"),
        (setting(exclude_modules=3), "exclude_modules.* 3: Input should be a valid"),
        (setting(layers_to_transform="1"), "layers_to_transform.* '1'"),
        (setting(layers_to_transform=[-1]), "layers_to_transform.* -1"),
        (setting(rank_pattern=["q_proj"]), r"rank_pattern.*\['q_proj'\]"),
        (setting(alpha_pattern={"q_proj": "2"}), "alpha_pattern.q_proj '2'"),
        (setting(modules_to_save="lm_head"), "modules_to_save 'lm_head'"),
        (setting(use_dora="yes"), "use_dora 'yes': Input should be a valid boolean"),
        (setting(lora_dropout="0.1"), "lora_dropout '0.1'"),
        (setting(ensure_weight_tying=1), "ensure_weight_tying 1"),
        (setting(base_model_name_or_path=7), "base_model_name_or_path 7"),
        (setting(init_lora_weights=[]), r"init_lora_weights \[\] changes the base"),
        (setting(use_something_new=True), "use_something_new True is not known, and may change"),
        (setting(new_config={"a": 1}), r"new_config \{'a': 1\} is not known"),
        (
            without("nothing", ("base_model.model.model.embed_tokens.lora_embedding_A", ROW)),
            "missing: .*embed_tokens.lora_embedding_B",
        ),
        (
            without("nothing", ("base_model.model.model.embed_tokens.lora_A.weight", ROW)),
            "unexpected tensors: .*embed_tokens.lora_A.weight",
        ),
        (
            without("nothing", (f"base_model.model.{Q0}.lora_embedding_A", ROW)),
            f"unexpected tensors: .*{Q0}.lora_embedding_A",
        ),
        (
            without("nothing", (f"base_model.model.{Q0}.base_layer.bias", ROW)),
            "unexpected tensors: .*base_layer.bias",
        ),
        (setting(init_lora_weights="pissa"), "'pissa' changes the base weights"),
    ],
)
def test_unusable_adapters_are_refused(reference: Path, damage, says: str) -> None:
    damage(reference)
    with pytest.raises(UserError, match=says) as e:
        read_adapter(reference)
    assert str(reference) in str(e.value)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (PermissionError(13, "Permission denied"), "not readable by this user; change"),
        (OSError(5, "Input/output error"), "cannot be read: Input/output error"),
    ],
)
def test_a_config_that_cannot_be_read_is_named(tmp_path: Path, monkeypatch, error, says) -> None:
    def refused(path: Path, **_: object) -> str:
        raise error

    monkeypatch.setattr(json_files, "_bytes", refused)
    (tmp_path / "adapter_config.json").touch()
    with pytest.raises(UserError, match=f"^{tmp_path}/adapter_config.json: {says}"):
        read_adapter(tmp_path)


MORE = ["llama/peft_dora", "llama/peft_dora_patterns", "llama/peft_saved"]
MORE += ["llama_rope_linear_biases/peft_biases"]


@pytest.mark.parametrize("name", MORE)
def test_all_that_peft_wrote_survives_to_the_byte(models: Path, tmp_path: Path, name: str) -> None:
    read = read_adapter(models / name)
    write_adapter(
        tmp_path / "out",
        read.adapters,
        base_name=read.base_name,
        scaling=read.scaling,
        replaced=read.replaced,
    )
    before = load_file(models / name / "adapter_model.safetensors")
    after = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert before.keys() == after.keys()
    for key, tensor in before.items():
        assert (tensor.dtype, tensor.shape) == (after[key].dtype, after[key].shape)
        assert tensor.tobytes() == after[key].tobytes()
    theirs, ours = config(models / name), config(tmp_path / "out")
    decided = ("target_modules", "rank_pattern", "alpha_pattern", "r", "lora_alpha")
    same = [key for key in ours if key not in decided]
    assert {k: ours[k] for k in same} == {k: theirs[k] for k in same}
    again = read_adapter(tmp_path / "out").adapters
    assert {p: (a.rank, a.alpha) for p, a in again.items()} == {
        p: (a.rank, a.alpha) for p, a in read.adapters.items()
    }


def test_modules_to_save_are_those_that_end_in_a_name(models: Path) -> None:
    names = read_adapter(models / "llama" / "peft_saved").replaced.tensors.keys()
    layers = [
        f"model.layers.{i}.{norm}_layernorm.weight"
        for i in range(3)
        for norm in ("input", "post_attention")
    ]
    outer = ["lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"]
    assert sorted(names) == sorted(layers + outer)


@pytest.mark.parametrize("scaling", ["alpha/r", "alpha/sqrt(r)", "constant"])
def test_a_difference_is_the_update_less_the_first_one(scaling) -> None:
    now, start = make(4, 8), make(4, 8)
    start = start._replace(a=start.a + 1, b=start.b - 2)
    made = adapter_difference(now, start, scaling)
    expected = factor(now, scaling) * (now.a @ now.b - start.a @ start.b)
    np.testing.assert_allclose(
        factor(made, scaling) * made.a @ made.b, expected, rtol=1e-4, atol=1e-3
    )
    assert (made.rank, made.a.shape, made.b.shape) == (8, (64, 8), (8, 32))
    with pytest.raises(ValueError, match="differ in rank"):
        adapter_difference(now, make(2, 8), scaling)


@pytest.mark.parametrize(
    "changes",
    [
        {"target_modules": ["q_proj", "c_attn", "query_key_value"], "drop": ("q_proj",)},
        {"target_modules": "all-linear", "drop": ("_proj",)},
        {"target_modules": "ALL-linear", "exclude_modules": ["up_proj"], "drop": ("_proj",)},
        {"modules_to_save": ["score"]},
        {"rank_pattern": None, "alpha_pattern": None, "fan_in_fan_out": True},
        {"some_number_of_a_later_version": 3, "some_flag": False, "some_config": {}},
    ],
)
def test_settings_that_match_nothing_in_the_model_are_no_fault(models, reference, changes) -> None:
    """PEFT 0.21 loads an adapter with each of these settings."""
    kept = changes.pop("drop", None)
    excluded = changes.get("exclude_modules", [])
    if kept:
        path = reference / "adapter_model.safetensors"
        tensors = {
            name: tensor
            for name, tensor in load_file(path).items()
            if any(part in name for part in kept) and not any(part in name for part in excluded)
        }
        save_file(tensors, path)
    edit_config(reference, **changes)
    check_fits(read_adapter(reference), open_folder(models / "llama").config, reference)


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (without("layers.2."), r"incomplete: .*file has no tensors .*model.layers.2.mlp.down_proj"),
        (without(f"{UP1}.lora"), f"incomplete: .*file has no tensors for them: {UP1}; export"),
        (setting(target_modules=["q_proj"]), "modules that adapter_config.json does not cover: "),
        (setting(exclude_modules="model.*up_proj"), f"does not cover: {UP0}, "),
        (setting(layers_to_transform=[0, 1]), "does not cover: model.layers.2."),
        (setting(layers_to_transform=1), "does not cover: model.layers.0."),
        (setting(layers_to_transform=1, layers_pattern="h"), "does not cover: model.layers.0."),
        (setting(modules_to_save=["lm_head"]), "file lacks them: lm_head.weight; export"),
        (setting(modules_to_save=["mlp"]), r"file lacks them: model.layers.0.mlp.down_proj.weight"),
        (setting(target_modules="(a"), "target_modules: .*is not a regular expression"),
    ],
)
def test_what_the_settings_cover_is_compared_with_the_file(models, reference, damage, says) -> None:
    damage(reference)
    with pytest.raises(UserError, match=says) as e:
        check_fits(read_adapter(reference), open_folder(models / "llama").config, reference)
    assert str(reference) in str(e.value)
    assert "\n" not in str(e.value)


def test_tensors_that_peft_saves_twice_are_read_once(models: Path, tmp_path: Path) -> None:
    """PEFT saves a fully trained module twice with `bias` all or `save_embedding_layers`."""
    folder = Path(shutil.copytree(models / "llama" / "peft_saved", tmp_path / "saved"))
    before = read_adapter(folder)
    path, key = folder / "adapter_model.safetensors", "base_model.model.lm_head"
    tensors = load_file(path)
    tensors[f"{key}.original_module.weight"] = np.zeros((256, 64), np.float32)
    tensors[f"{key}.modules_to_save.weight"] = tensors[f"{key}.weight"]
    save_file(tensors, path)
    after = read_adapter(folder)
    assert after.replaced.tensors.keys() == before.replaced.tensors.keys()
    for name, tensor in before.replaced.tensors.items():
        np.testing.assert_array_equal(after.replaced.tensors[name], tensor)
    tensors[f"{key}.modules_to_save.weight"] = tensors[f"{key}.weight"] + 1
    save_file(tensors, path)
    with pytest.raises(UserError, match=r"lm_head\.weight is there twice, with different values"):
        read_adapter(folder)


def test_dora_of_the_head_is_refused(models: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(models / "llama" / "peft_dora", tmp_path / "dora"))
    path, key = folder / "adapter_model.safetensors", "base_model.model.lm_head"
    head = {
        f"{key}.lora_A.weight": np.ones((8, 64), np.float32),
        f"{key}.lora_B.weight": np.ones((256, 8), np.float32),
        f"{key}.lora_magnitude_vector": np.ones(256, np.float32),
    }
    save_file(load_file(path) | head, path)
    with pytest.raises(UserError, match="use_dora with an adapter of lm_head is not supported"):
        read_adapter(folder)


@pytest.mark.parametrize(
    ("modules", "ties", "one"),
    [((), False, True), ((), True, True), (("lm_head",), False, False), (("lm_head",), True, True)],
)
def test_a_matrix_that_was_saved_as_it_was_is_both(modules, ties, one) -> None:
    tensors = {"lm_head.weight": np.zeros((2, 2))}
    assert Replaced(tensors, modules, "none", ties).one_for_both == one
