import collections
import itertools
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_jax.data.encode import Example
from qlora_jax.data.loader import Loader, deal, held_out_batches
from qlora_jax.runtime.errors import UserError

T = 16
PACKING = pytest.mark.parametrize("packing", [True, False])


def make_examples(n, seed=0):
    """Makes examples with a distinct first id each, which no other token has."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(2, T + 2, n)
    return [
        Example(
            np.concatenate([[1000 + i], rng.integers(1, 1000, m - 1)]).astype(np.int32),
            np.array([False] + [True] * (m - 1)),
        )
        for i, m in enumerate(lengths)
    ]


def make_loader(examples, config, batch_size=2, gradient_accumulation=2, seed=0):
    return Loader(
        examples,
        config,
        batch_size=batch_size,
        gradient_accumulation=gradient_accumulation,
        seed=seed,
    )


def take_epoch(loader):
    return [next(loader) for _ in range(loader.steps_per_epoch)]


def content(batches):
    """Counts the examples in batches, as pairs (input ids, target ids under the mask)."""
    found = collections.Counter()
    for batch in batches:
        flat = {k: v.reshape(-1, v.shape[-1]) for k, v in batch.items()}
        for r, row in enumerate(flat["segments"]):
            for s in set(row.tolist()) - {0}:
                here = np.flatnonzero(row == s)
                assert (np.diff(here) == 1).all()
                assert flat["positions"][r, here].tolist() == list(range(len(here)))
                targets = flat["targets"][r, here][flat["mask"][r, here]]
                found[(*flat["tokens"][r, here].tolist(), -1, *targets.tolist())] += 1
            assert not flat["mask"][r, row == 0].any()
    return found


def expected_content(examples):
    return collections.Counter(
        (*e.ids[:-1].tolist(), -1, *e.ids[e.target].tolist()) for e in examples
    )


def same(a, b):
    return all(np.array_equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)


@PACKING
@pytest.mark.parametrize("n", [1, 3, 17, 200])
def test_an_epoch_holds_every_example_once(data_config, packing, n):
    examples = make_examples(n)
    loader = make_loader(examples, data_config(sequence_length=T, packing=packing))
    for _ in range(3):
        assert content(take_epoch(loader)) == expected_content(examples)


@PACKING
def test_shapes(data_config, packing):
    loader = make_loader(make_examples(200), data_config(sequence_length=T, packing=packing), 3, 2)
    lengths = set()
    for batch in take_epoch(loader):
        assert list(batch) == ["tokens", "targets", "mask", "segments", "positions"]
        (shape,) = {v.shape for v in batch.values()}
        assert shape[:2] == (2, 3)
        lengths.add(shape[2])
    assert lengths == ({16} if packing else {2, 4, 8, 16})


@PACKING
def test_order_follows_from_seed_and_epoch(data_config, packing):
    config = data_config(sequence_length=T, packing=packing)
    examples = make_examples(100)
    first, again, other = (make_loader(examples, config, seed=s) for s in (0, 0, 1))
    epochs = [[take_epoch(x) for _ in range(2)] for x in (first, again, other)]
    assert all(same(a, b) for e in (0, 1) for a, b in zip(epochs[0][e], epochs[1][e]))
    assert not all(same(a, b) for a, b in zip(epochs[0][0], epochs[0][1]))
    assert not all(same(a, b) for a, b in zip(epochs[0][0], epochs[2][0]))


@PACKING
@given(done=st.integers(0, 40))
def test_resume_is_exact(data_config, packing, done):
    config = data_config(sequence_length=T, packing=packing)
    examples = make_examples(60)
    loader = make_loader(examples, config)
    for _ in range(done):
        next(loader)
    state = json.loads(json.dumps(loader.state()))
    resumed = make_loader(examples, config)
    resumed.restore(state)
    assert resumed.epoch == loader.epoch
    for a, b in itertools.islice(zip(loader, resumed), 25):
        assert same(a, b)


@pytest.mark.parametrize(
    "change", ["ids", "target", "order", "length", "packing", "batch", "steps", "seed"]
)
def test_resume_refuses_another_run(data_config, change):
    config = data_config(sequence_length=32)
    examples = make_examples(20)
    state = make_loader(examples, config).state()
    ids, target = examples[0].ids.copy(), ~examples[0].target
    ids[0] += 1
    other = {
        "ids": lambda: make_loader([Example(ids, ~target), *examples[1:]], config),
        "target": lambda: make_loader([Example(examples[0].ids, target), *examples[1:]], config),
        "order": lambda: make_loader(examples[::-1], config),
        "length": lambda: make_loader(examples, data_config(sequence_length=33)),
        "packing": lambda: make_loader(examples, data_config(sequence_length=32, packing=False)),
        "batch": lambda: make_loader(examples, config, batch_size=3),
        "steps": lambda: make_loader(examples, config, gradient_accumulation=3),
        "seed": lambda: make_loader(examples, config, seed=1),
    }[change]()
    with pytest.raises(UserError, match="differ from the run to resume"):
        other.restore(state)


def test_epoch_counts_what_has_passed(data_config):
    loader = make_loader(make_examples(100), data_config(sequence_length=T))
    assert loader.epoch == 0
    n = loader.steps_per_epoch
    next(loader)
    assert loader.epoch == pytest.approx(1 / n)
    for _ in range(n - 1):
        next(loader)
    assert loader.epoch == 1
    next(loader)
    assert 1 < loader.epoch < 1.5


@PACKING
@pytest.mark.parametrize("epochs", [0.01, 0.5, 1.0, 1.1, 2.5, 3.0])
def test_the_steps_of_epochs_are_those_that_pass_them(data_config, packing, epochs):
    loader = make_loader(make_examples(37), data_config(sequence_length=T, packing=packing))
    steps = loader.steps_of(epochs)
    assert loader.epoch == 0
    reached = []
    for _ in range(steps):
        next(loader)
        reached.append(loader.epoch)
    # the last step is the first to reach `epochs`; 1e-6 allows for rounding
    assert reached[-1] >= epochs - 1e-6
    assert steps == 1 or reached[-2] < epochs - 1e-6


@given(st.integers(0, 100), st.integers(1, 20))
def test_rows_are_dealt_evenly_over_the_fewest_steps(n, per_step):
    steps = deal([[i] for i in range(n)], 8, per_step)
    sizes = [len(s.rows) for s in steps]
    assert [row for s in steps for row in s.rows] == [[i] for i in range(n)]
    assert len(steps) == (n + per_step - 1) // per_step
    assert not sizes or (max(sizes) <= per_step and max(sizes) - min(sizes) <= 1)


def test_the_rows_that_packing_left_room_in_are_anywhere(data_config):
    loader = make_loader(make_examples(100), data_config(sequence_length=T), 1, 1)
    places = []
    for _ in range(30):
        used = [(b["segments"] > 0).sum() for b in take_epoch(loader)]
        places.append(np.argmin(used) / len(used))
    assert 0.3 < np.mean(places) < 0.7


def test_without_packing_batches_are_not_sorted_by_length(data_config):
    loader = make_loader(make_examples(400), data_config(sequence_length=T, packing=False))
    lengths = [b["tokens"].shape[-1] for b in take_epoch(loader)]
    assert lengths != sorted(lengths)
    assert lengths != sorted(lengths, reverse=True)


def test_without_packing_a_row_holds_one_example(data_config):
    loader = make_loader(make_examples(50), data_config(sequence_length=T, packing=False))
    assert all(b["segments"].max() == 1 for b in take_epoch(loader))


def test_padding_id_fills_what_is_empty(data_config):
    loader = Loader(make_examples(1), data_config(sequence_length=T), batch_size=2, pad_id=7)
    batch = next(loader)
    assert set(batch["tokens"][batch["segments"] == 0].tolist()) == {7}


def test_no_examples(data_config):
    with pytest.raises(UserError, match=r"data\.jsonl: no examples"):
        make_loader([], data_config())


@PACKING
def test_held_out_batches_hold_everything_once_and_never_change(data_config, packing):
    config = data_config(sequence_length=T, packing=packing)
    examples = make_examples(50)
    batches = held_out_batches(examples, config, 4, 10_000)
    assert content(batches) == expected_content(examples)
    assert all(v.shape[0] == 4 and v.ndim == 2 for b in batches for v in b.values())
    assert all(same(a, b) for a, b in zip(batches, held_out_batches(examples, config, 4, 10_000)))


@PACKING
def test_held_out_batches_stop_at_max_rows(data_config, packing):
    config = data_config(sequence_length=T, packing=packing)
    batches = held_out_batches(make_examples(50), config, 4, 6)
    rows = np.concatenate([(b["segments"] > 0).any(-1) for b in batches])
    assert rows.sum() == 6


def test_no_held_out_examples_no_batches(data_config):
    assert held_out_batches([], data_config(), 4, 6) == []
