"""Held-out loss; the reference evaluates one example at a time, in float64 after the logits."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from qlora_jax import config as configs
from qlora_jax.evaluate.heldout import held_out_loss, other_data, split_name
from qlora_jax.runtime.errors import UserError
from qlora_jax.train.examples import read_data
from qlora_jax.train.restore import from_config

pytestmark = pytest.mark.quick


@pytest.fixture(scope="module")
def make_restored(tiny_model, chats):
    """Builds the tiny model from a config, with random adapters that change its outputs."""

    def make(**data):
        tree = {
            "model": {
                "path": str(tiny_model),
                "compute_dtype": "float32",
                "storage_dtype": "float32",
            },
            "data": {"source": str(chats), "sequence_length": 160, "eval_fraction": 0.3} | data,
            "output": "run",
            "method": "lora",
            "lora": {"rank": 4, "target_modules": ["q_proj", "down_proj"], "dropout": 0.5},
            "train": {"batch_size": 2},
        }
        restored = from_config(configs.from_tree(tree, "test"), pytest.fail)
        random = np.random.default_rng(0)
        for name in ("q_proj", "down_proj"):
            b = getattr(restored.model.runs[0], name).adapter.b
            b.set_value(jnp.asarray(random.normal(size=b.get_value().shape), jnp.float32))
        return restored

    return make


def one_by_one(restored):
    """Returns the summed loss and the number of targets; each example has its own row."""
    structure, weights = nnx.split(restored.model)

    @jax.jit
    def logits(weights, row):
        model = nnx.merge(structure, weights)
        positions = jnp.arange(row.shape[1])[None]
        return model.logits(model.hidden(row, jnp.ones_like(row), positions, dtype=jnp.float32))

    total = count = 0
    for example in read_data(restored.config, restored.tokenizer, 512).held_out[""]:
        row = np.zeros((1, 160), np.int32)
        row[0, : len(example.ids)] = example.ids
        scores = np.asarray(logits(weights, row))[0, : len(example.ids) - 1].astype(np.float64)
        log_p = scores - np.log(np.exp(scores).sum(axis=1, keepdims=True))
        picked = np.take_along_axis(log_p, example.ids[1:, None], axis=1)[:, 0]
        total -= picked[example.target[1:]].sum()
        count += example.target[1:].sum()
    return total, count


@pytest.mark.parametrize("packing", [True, False])
def test_loss_is_the_mean_over_the_targets_of_all_examples(make_restored, packing):
    restored = make_restored(packing=packing)
    total, count = one_by_one(restored)
    found = held_out_loss(restored)[""]
    assert found.tokens == count > 50
    assert found.loss == pytest.approx(total / count, rel=2e-6)
    assert found.perplexity == pytest.approx(np.exp(total / count), rel=1e-5)
    assert found.step == 0


def test_nothing_held_out(make_restored):
    with pytest.raises(UserError, match=r"^data.eval_fraction: no held-out data; give it, or"):
        held_out_loss(make_restored(eval_fraction=0.0))


@pytest.fixture
def more(tmp_path):
    """A .jsonl file of 3 examples; only one has an answer."""
    path = tmp_path / "more.jsonl"
    rows = [{"prompt": "Two?", "completion": "2."}, *[{"prompt": "", "completion": ""}] * 2]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_another_source_is_evaluated_whole(make_restored, chats, more):
    restored = make_restored(max_examples=9, format="chat")
    said = []
    other = other_data(restored.config, {"data.source": str(chats)})
    (found,) = held_out_loss(restored, other, said.append).values()
    # uses every example, although the run holds out a part of 9 and evaluates at most 64 rows
    whole = make_restored(eval_source=str(chats))
    total, count = one_by_one(whole)
    assert found.tokens == count
    assert found.loss == pytest.approx(total / count, rel=2e-6)
    assert found.split == f"all of {chats}"
    assert not said
    capped = other_data(restored.config, {"data.source": str(chats), "train.eval_rows": "1"})
    assert held_out_loss(restored, capped)[""].tokens < count
    (found,) = held_out_loss(
        restored, other_data(restored.config, {"data.source": str(more)}), said.append
    ).values()
    assert 0 < found.tokens < 9
    assert said == [f"{more}: 2 left out: empty"]


def test_named_sets_are_evaluated_each(make_restored, chats, more):
    restored = make_restored()
    sets = f"{{a: {more}, b: {chats}}}"
    found = held_out_loss(restored, other_data(restored.config, {"data.eval_source": sets}))
    assert list(found) == ["a", "b"]
    assert found["b"] == held_out_loss(make_restored(eval_source=str(chats)))[""]
    assert found["a"].split == f"{more}:train"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            {"lora.rank": "8"},
            r"^--lora.rank: a run .* data\.\* and train.eval_rows may",
        ),
        ({"data": "x"}, "^--data: a run directory's settings are fixed"),
        ({"data.source": "x", "data.eval_fraction": "0.1"}, "^--data.source is evaluated whole"),
        ({"data.packing": "perhaps"}, "data.packing: "),
    ],
)
def test_what_may_be_given_for_an_evaluation(make_restored, overrides, message):
    with pytest.raises(UserError, match=message):
        other_data(make_restored().config, overrides)


@pytest.mark.parametrize(
    ("data", "name"),
    [
        ({"source": "a.jsonl", "eval_fraction": 0.05}, "a.jsonl: 5% held out by text"),
        ({"source": "a.jsonl", "eval_source": "b.jsonl"}, "b.jsonl:train"),
        ({"source": "org/a", "eval_split": "test"}, "org/a:test"),
    ],
)
def test_the_split_is_named(make_restored, data, name):
    restored = make_restored()
    tree = configs.to_tree(restored.config) | {"data": data}
    assert split_name(configs.from_tree(tree, "t").data) == name
