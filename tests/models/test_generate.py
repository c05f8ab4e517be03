import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from scipy.stats import chisquare
from selection import mostly_slow

from qlora_jax.config import QuantConfig
from qlora_jax.formats.peft.plain import read_plain
from qlora_jax.models.adapters import attach_bank, put_adapter
from qlora_jax.models.decoder import empty_cache
from qlora_jax.models.generate import (
    CHUNK,
    RowState,
    Sampling,
    draw,
    generate,
    generate_chunk,
    padded_size,
    prefill,
)
from qlora_jax.quant import nbytes
from qlora_jax.runtime.errors import UserError

pytestmark = pytest.mark.quick

PAD = 0
PROMPTS = [[5, 17, 201], [9], list(range(40, 104)), [5, 17, 201]]
NEW = 30
write = functools.partial(generate, max_new_tokens=NEW, stop_ids=(), pad_id=PAD, dtype=jnp.float32)


@pytest.fixture(scope="module")
def model(open_model):
    return open_model("llama")


@functools.partial(jax.jit, static_argnums=0)
def last_logits(structure, weights, tokens, length):
    """Returns each row's logits at position length - 1, from a full forward pass."""
    model = nnx.merge(structure, weights)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    hidden = model.hidden(tokens, jnp.ones_like(tokens), positions, dtype=jnp.float32)
    last = jnp.take_along_axis(hidden, (length - 1)[:, None, None], axis=1)
    return model.logits(last[:, 0])


def without_cache(model, prompts, new):
    """Returns greedy continuations, computed by full forward passes only."""
    structure, weights = nnx.split(model)
    rows = [list(p) for p in prompts]
    for _ in range(new):
        tokens = np.full((len(rows), 96), PAD, np.int32)
        for row, ids in zip(tokens, rows):
            row[: len(ids)] = ids
        logits = last_logits(structure, weights, tokens, np.array([len(r) for r in rows]))
        for ids, best in zip(rows, np.argmax(logits, axis=-1)):
            ids.append(int(best))
    return [ids[len(p) :] for ids, p in zip(rows, prompts)]


@pytest.mark.parametrize(
    "name",
    mostly_slow(["mistral_window", "gemma3", "opt"], "gemma3"),
)
def test_greedy_is_the_argmax_of_full_passes(open_model, name):
    model = open_model(name, QuantConfig())
    prompts = [[i % model.config.vocab_size for i in p] for p in PROMPTS]
    assert write(model, prompts) == without_cache(model, prompts, NEW)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_does_not_depend_on_the_others(model, temperature):
    options = {"temperature": temperature, "top_p": 0.9, "seed": 4}
    together = write(model, PROMPTS, **options)
    assert write(model, [PROMPTS[1]], **options) == [together[1]]
    backwards = write(model, PROMPTS[::-1], **options)
    assert backwards[1:3] == together[2:0:-1]
    assert (together[0] == together[3]) == (temperature == 0)


def test_seed_decides_the_text(model):
    texts = [write(model, PROMPTS, temperature=1.0, seed=s) for s in (7, 7, 8, -1)]
    assert texts[0] == texts[1]
    assert all(a != b for other in texts[2:] for a, b in zip(texts[0], other))


def test_the_least_top_p_and_temperature_are_greedy(model):
    best = write(model, PROMPTS)
    assert write(model, PROMPTS, temperature=2.0, top_p=0.0) == best
    assert write(model, PROMPTS, temperature=2.0, top_p=1e-6) == best
    assert write(model, PROMPTS, temperature=1e-30) == best


def test_a_row_ends_before_its_stop_id(model):
    best = write(model, PROMPTS)
    stops = {best[0][4], best[1][CHUNK + 2]}
    ended = write(model, PROMPTS, stop_ids=stops)
    for row, ids in zip(best, ended):
        ends = [i for i, token in enumerate(row) if token in stops]
        assert ids == row[: min(ends, default=len(row))]
    assert len(ended[0]) <= 4
    assert write(model, PROMPTS[:1] * 4, stop_ids={best[0][0]}) == [[]] * 4


def decode_arguments(model, cache, batch, done):
    structure, weights = nnx.split(model)
    rows = RowState(jnp.zeros(batch, jnp.int32), jnp.zeros(batch, jnp.int32), jnp.full(batch, done))
    sampling = Sampling(0.0, 1.0, jax.vmap(jax.random.key)(jnp.arange(batch)))
    stops = np.full(8, -1, np.int32)
    dtype = jnp.dtype(jnp.float32)
    return structure, weights, cache, rows, sampling, stops, 77, CHUNK, dtype


def test_a_finished_batch_stops_decoding(model):
    cache = empty_cache(model.config, 4, 128, jnp.float32)
    _, cache, drawn = generate_chunk(*decode_arguments(model, cache, 4, done=True))
    assert np.all(np.asarray(drawn) == 77)
    assert not np.asarray(cache.k).any()


@pytest.mark.parametrize("new", [1, 2, CHUNK, CHUNK + 1, CHUNK + 2])
def test_exactly_so_many_tokens(model, new):
    best = write(model, PROMPTS)
    assert write(model, PROMPTS, max_new_tokens=new) == [row[:new] for row in best]


def test_tokens_are_handed_out_as_they_come(model):
    best = write(model, PROMPTS)
    stop = next(i for i in best[0][3:] + best[1] if i not in best[2])
    seen = []
    result = write(model, PROMPTS, stop_ids=[stop], on_tokens=seen.append)
    assert [[i for part in seen for i in part[row]] for row in range(4)] == result
    assert [len(part[2]) for part in seen] == [1, CHUNK, NEW - 1 - CHUNK]

    def interrupt(new):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(model, PROMPTS, on_tokens=interrupt)


def test_other_weights_and_settings_need_no_new_program(model, open_model):
    write(model, PROMPTS)
    before = prefill._cache_size(), generate_chunk._cache_size()
    other = open_model("llama")
    other.embed.set_value(other.embed.get_value()[::-1])
    prompts = [p[:2] for p in PROMPTS[::2]] + PROMPTS[2:]
    assert write(other, prompts, temperature=0.7, top_p=0.5, seed=3) != write(model, prompts)
    assert write(other, prompts) == without_cache(other, prompts, NEW)
    assert (prefill._cache_size(), generate_chunk._cache_size()) == before


def test_the_cache_is_written_in_place(model):
    cache = jax.eval_shape(lambda: empty_cache(model.config, 2, 4096, jnp.float32))
    compiled = generate_chunk.lower(*decode_arguments(model, cache, 2, done=False)).compile()
    memory = compiled.memory_analysis()
    size = nbytes(cache)
    assert memory.alias_size_in_bytes >= size
    assert memory.temp_size_in_bytes < 2 * size / model.config.num_layers


def reference(logits, temperature, top_p):
    """Returns each token's probability by the definition of nucleus sampling, in float64."""
    p = np.exp(logits.astype(np.float64) / temperature)
    p /= p.sum()
    order = np.argsort(-p, kind="stable")
    count = int(np.searchsorted(np.cumsum(p[order]), top_p)) + 1
    kept = np.zeros_like(p)
    kept[order[:count]] = p[order[:count]]
    return kept / kept.sum()


@pytest.mark.parametrize(("temperature", "top_p"), [(1, 1), (0.5, 1), (2, 0.8), (1, 0.6)])
def test_draws_follow_temperature_and_top_p(temperature, top_p):
    logits = np.array([0.3, -1.0, 2.0, 1.1, 0.0, 1.9, -3.0, 0.7], np.float32)
    count = 20_000
    keys = jax.random.split(jax.random.key(5), count)
    rows = jnp.broadcast_to(logits, (count, logits.size))
    drawn = np.asarray(jax.jit(draw)(rows, Sampling(float(temperature), float(top_p), keys)))
    seen = np.bincount(drawn, minlength=logits.size)
    expected = reference(logits, temperature, top_p)
    assert np.all(seen[expected == 0] == 0)
    assert np.all(seen[expected > 1e-3] > 0)
    kept = expected > 0
    assert chisquare(seen[kept], expected[kept] * count).pvalue > 1e-3


def test_every_position_and_row_draws_anew(open_model):
    """With equal logits for all tokens, the drawn tokens are uniform and independent."""
    model = open_model("llama")
    model.head.set_value(jnp.zeros_like(model.head.get_value()))
    prompts = [[5] * 12, [5] * 12, [6] * 12, [7] * 12]
    drawn = np.array(write(model, prompts, max_new_tokens=500, temperature=1.0))
    assert drawn.shape == (4, model.config.max_positions - 12)
    vocabulary = model.config.vocab_size
    assert chisquare(np.bincount(drawn.reshape(-1), minlength=vocabulary)).pvalue > 1e-3
    pairs = [(drawn[:, 1:], drawn[:, :-1])]
    pairs += [(drawn[i], drawn[j]) for i in range(4) for j in range(i)]
    for a, b in pairs:
        expected = a.size / vocabulary
        assert (a == b).sum() < expected + 6 * np.sqrt(expected)


def test_sizes_are_few():
    assert [padded_size(n) for n in (1, 64, 65, 128, 129, 2000)] == [64, 64, 128, 128, 256, 2048]


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([[1], []], {}, "prompt 1 is empty"),
        ([[1] * 500], {"max_new_tokens": 13}, "500 tokens, which with 13 new ones is more than"),
        ([[1, 256]], {}, "prompt 0 holds an id outside the model's vocabulary of 256"),
        ([[-1]], {}, "outside the model's vocabulary"),
        ([[1]], {"max_new_tokens": 0}, "max_new_tokens 0 is not allowed"),
        ([[1]], {"temperature": -0.1}, "temperature -0.1 is not allowed"),
        ([[1]], {"temperature": float("nan")}, "temperature nan is not allowed"),
        ([[1]], {"top_p": 1.5}, "top_p 1.5 is not allowed"),
    ],
)
def test_errors(model, prompts, options, message):
    with pytest.raises(UserError, match=message):
        write(model, prompts, **options)


def test_no_prompts_no_text(model):
    assert write(model, []) == []


def test_rows_have_their_own_temperature_and_top_p():
    """Each row gets the token that it would get if all rows had its settings."""
    rows = 64
    random = np.random.default_rng(2)
    logits = jnp.asarray(random.normal(size=(rows, 40)) * 2, jnp.float32)
    keys = jax.random.split(jax.random.key(5), rows)
    settings = [(0.0, 1.0), (0.7, 1.0), (1.5, 0.6), (1.0, 0.0), (1e-30, 0.9)]
    kinds = np.arange(rows) % len(settings)
    temperature, top_p = np.array(settings, np.float32)[kinds].T
    mixed = np.asarray(jax.jit(draw)(logits, Sampling(temperature, top_p, keys)))
    alone = [np.asarray(jax.jit(draw)(logits, Sampling(*s, keys))) for s in settings]
    assert mixed.tolist() == [alone[kind][row] for row, kind in enumerate(kinds)]
    assert (alone[1] != alone[0]).any()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_rows_under_adapters_write_what_each_writes_alone(open_model, models, temperature):
    names = ["peft_lora", "peft_rslora", "peft_patterns"]
    together = open_model("llama")
    attach_bank(together, slots=3, rank=8, dtype=jnp.float32)
    for slot, name in enumerate(names):
        put_adapter(together, slot, read_plain(models / "llama" / name))
    base = 3
    prompt, other = PROMPTS[0], PROMPTS[1]
    texts = write(
        together,
        [prompt, prompt, other, prompt, prompt],
        adapters=[0, 1, 2, base, 0],
        temperature=temperature,
        seed=3,
    )
    for row, (slot, asked) in enumerate([(0, prompt), (1, prompt), (2, other), (base, prompt)]):
        alone = open_model("llama")
        if slot != base:
            attach_bank(alone, slots=1, rank=8, dtype=jnp.float32)
            put_adapter(alone, 0, read_plain(models / "llama" / names[slot]))
        slots = None if slot == base else [0]
        assert write(alone, [asked], adapters=slots, temperature=temperature, seed=3) == [
            texts[row]
        ]
    assert (texts[4] == texts[0]) == (temperature == 0)
    assert len({tuple(text) for text in texts[:2] + texts[3:4]}) == 3
