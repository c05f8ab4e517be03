import functools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from qlora_jax.config import QuantConfig
from qlora_jax.formats.huggingface import open_folder
from qlora_jax.formats.load import load_model
from qlora_jax.formats.peft.plain import read_plain
from qlora_jax.lora import Adapter
from qlora_jax.lora.bank import Bank, with_rows
from qlora_jax.lora.weights import LoraWeights
from qlora_jax.models.adapters import attach_bank, put_adapter
from qlora_jax.runtime.errors import UserError

pytestmark = pytest.mark.quick

NAMES = ["peft_lora", "peft_rslora", "peft_patterns"]
SLOTS, BASE = 4, 4
COMPILED = "/jax/core/compile/backend_compile_duration"


@functools.partial(jax.jit, static_argnums=0)
def logits(structure, weights, tokens):
    model = nnx.merge(structure, weights)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    hidden = model.hidden(tokens, jnp.ones_like(tokens), positions, dtype=jnp.float32)
    return model.logits(hidden)


def compute(model, tokens, rows):
    structure, weights = nnx.split(model)
    return np.asarray(logits(structure, with_rows(weights, rows), tokens))


def banked(models, quant=None, dtype=jnp.float32):
    model = load_model(open_folder(models / "llama"), quant=quant, dtype=jnp.float32)
    attach_bank(model, slots=SLOTS, rank=16, dtype=dtype)
    return model


@pytest.fixture(scope="module")
def adapters(models):
    model = load_model(open_folder(models / "llama"), quant=None, dtype=jnp.float32)
    return [read_plain(models / "llama" / name, model) for name in NAMES]


@pytest.fixture(scope="module")
def reference(models):
    """Tokens, and logits: PEFT's with each adapter, then transformers' of the base."""
    base = np.load(models / "llama" / "reference.npz")
    under = [np.load(models / "llama" / name / "reference.npz")["logits"] for name in NAMES]
    return base["tokens"], [*under, base["logits"]]


def test_rows_of_one_batch_are_pefts_logits_under_their_adapters(models, adapters, reference):
    tokens, expected = reference
    model = banked(models)
    slots = [2, 0, 3]
    for slot, updates in zip(slots, adapters):
        put_adapter(model, slot, updates)
    kinds = [1, 3, 0, 2, 0, 1, 2, 3]
    batch = np.stack([tokens[i % 2] for i in range(len(kinds))])
    rows = [[*slots, BASE][kind] for kind in kinds]
    found = compute(model, batch, rows)
    for i, kind in enumerate(kinds):
        np.testing.assert_allclose(found[i], expected[kind][i % 2], rtol=1e-4, atol=1e-4)


def test_over_a_quantized_base_too(models, adapters, reference):
    tokens, _ = reference
    together, alone = (banked(models, QuantConfig()) for _ in range(2))
    for slot, updates in enumerate(adapters):
        put_adapter(together, slot, updates)
    found = compute(together, tokens[[0, 0, 0, 0]], [0, 1, 2, BASE])
    for i, updates in enumerate([*adapters, {}]):
        put_adapter(alone, 0, updates)
        own = compute(alone, tokens[:1], [0])[0]
        np.testing.assert_allclose(found[i], own, rtol=1e-4, atol=1e-4)
    assert np.abs(found[0] - found[3]).max() > 0.1


def single(bank, adapter_index, x):
    """Returns the output of an `Adapter` that holds the values of one slot."""
    a, b, s = (v.get_value()[0, adapter_index] for v in (bank.a, bank.b, bank.scale))
    return Adapter(a, b, s, [None])(x, None)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_it_rounds_where_a_single_adapter_does(dtype):
    random = np.random.default_rng(0)
    bank = Bank(1, 40, 24, 2, 8, dtype)
    for slot, r in enumerate((8, 3)):
        bank.put(
            slot, [LoraWeights(random.normal(size=(40, r)), random.normal(size=(r, 24)), 1.0, 0.3)]
        )
    x = jnp.asarray(random.normal(size=(3, 5, 40)), dtype)
    structure, weights = nnx.split(bank)
    layer = jax.tree.map(lambda v: v[0], with_rows(weights, [1, 2, 0]))
    y = np.asarray(nnx.merge(structure, layer)(x), np.float32)
    step = float(jnp.finfo(dtype).eps) * np.abs(y).max()
    for row, slot in enumerate((1, 2, 0)):
        own = np.asarray(single(bank, slot, x[row : row + 1])[0], np.float32)
        np.testing.assert_allclose(y[row], own, rtol=0, atol=2 * step)
    assert not y[1].any()


def test_a_neighbours_nan_does_not_reach_a_row(models, adapters, reference):
    tokens, _ = reference
    model = banked(models)
    put_adapter(model, 0, adapters[0])
    clean = compute(model, tokens, [0, BASE])
    broken = {p: u._replace(a=u.a * np.nan, b=u.b * np.nan) for p, u in adapters[1].items()}
    put_adapter(model, 1, broken)
    np.testing.assert_array_equal(compute(model, tokens, [0, BASE]), clean)
    assert np.isnan(compute(model, tokens, [1, BASE])[0]).any()


def test_loading_unloading_and_switching_compile_nothing(models, adapters, reference):
    tokens, _ = reference
    model = banked(models)
    put_adapter(model, 0, adapters[0])
    compute(model, tokens, [0, BASE])
    compiled = []

    def note(event, *_, **__):
        compiled.append(event) if event == COMPILED else None

    jax.monitoring.register_event_duration_secs_listener(note)
    try:
        before = logits._cache_size()
        for slot, updates in ((1, adapters[1]), (0, adapters[2]), (3, {})):
            put_adapter(model, slot, updates)
        results = [compute(model, tokens, rows) for rows in ([1, 0], [BASE, 3], [0, 1])]
        assert logits._cache_size() == before
        assert not compiled
        jax.jit(lambda x: x + 12345)(1.0)
        assert compiled, "the listener hears nothing"
    finally:
        jax.monitoring.clear_event_listeners()
    assert not np.allclose(results[0], results[1])


def test_another_adapter_replaces_all_of_the_one_before(models, adapters, reference):
    tokens, expected = reference
    model = banked(models)
    for updates in (adapters[0], adapters[2]):
        put_adapter(model, 1, updates)
    np.testing.assert_allclose(compute(model, tokens, [1, 1]), expected[2], rtol=1e-4, atol=1e-4)
    put_adapter(model, 1, {})
    np.testing.assert_array_equal(
        compute(model, tokens, [1, 1]), compute(model, tokens, [BASE, BASE])
    )


def test_a_rank_above_the_banks_is_refused(models, adapters):
    model = load_model(open_folder(models / "llama"), quant=None, dtype=jnp.float32)
    attach_bank(model, slots=1, rank=4, dtype=jnp.float32)
    with pytest.raises(UserError, match="rank 8 is above the largest allowed rank, 4"):
        put_adapter(model, 0, adapters[0])


@pytest.fixture
def folder(models, tmp_path):
    return shutil.copytree(models / "llama" / "peft_lora", tmp_path / "peft_lora")


def test_an_adapter_of_another_model_is_refused(models, folder):
    other = load_model(open_folder(models / "llama_rope_llama3"), quant=None, dtype=jnp.float32)
    with pytest.raises(UserError, match="peft_lora: belongs to another model") as refused:
        read_plain(folder, other)
    assert "q_proj (adapter [64, 64], model [32, 32])" in str(refused.value)


def test_an_embedding_that_was_saved_as_it_was_is_no_hindrance(models, folder):
    base = open_folder(models / "llama")
    model = load_model(base, quant=None, dtype=jnp.bfloat16)
    file = folder / "adapter_model.safetensors"
    tensors, key = load_file(file), "base_model.model.model.embed_tokens.weight"
    tensors[key] = base.read("model.embed_tokens.weight")
    save_file(tensors, file)
    assert read_plain(folder, model).keys() == model.linears().keys()
    tensors[key][3, 5] += 1
    save_file(tensors, file)
    with pytest.raises(UserError, match=r"embed_tokens\.weight was trained beside the adapters"):
        read_plain(folder, model)


def test_dora_is_refused(folder):
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"use_dora": True}))
    with pytest.raises(UserError, match="peft_lora") as refused:
        read_plain(folder)
    assert "dora" in str(refused.value).lower()
    assert "\n" not in str(refused.value)


def test_values_that_are_not_finite_are_refused(folder):
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    name = sorted(tensors)[0]
    tensors[name] = np.full_like(tensors[name], np.nan)
    save_file(tensors, file)
    with pytest.raises(UserError, match="holds NaN or Inf; export the adapter again"):
        read_plain(folder)


def test_a_run_directorys_adapter_is_found(folder, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    shutil.move(folder, run / "adapter")
    assert read_plain(run).keys() == read_plain(run / "adapter").keys()
