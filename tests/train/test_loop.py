"""The training loop: its log, its stops, and resumed runs that equal uninterrupted ones."""

import dataclasses
import json
import math
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qlora_jax.models.trees import flatten, sha256
from qlora_jax.runtime.errors import RunFailed
from qlora_jax.train import layered
from qlora_jax.train.checkpoint import Checkpoints
from qlora_jax.train.interrupt import Stopped
from qlora_jax.train.loop import MOST_SKIPPED, Progress, evaluate, loop, read_progress
from qlora_jax.train.metrics import MetricsLog
from qlora_jax.train.offload import ON_DEVICE
from qlora_jax.train.optimizer import schedule

pytestmark = pytest.mark.quick

HALF = {"compute": "float16", "dropout": 0.1, "accumulation": 2}
OVERFLOWING = 2.0**24
"""Initial loss scale that makes a few steps overflow before the first one is taken."""


@pytest.fixture
def run(tmp_path, trainer, make_loader, make_batch):
    """Runs the loop in tmp_path/NAME, from its last checkpoint if there is one."""

    def run(
        name="run",
        steps=6,
        save_every=2,
        scale=None,
        at=None,
        program=None,
        held_out=None,
        rate=None,
        train=None,
        ahead=False,
        **trains,
    ):
        t = trainer(**trains)
        config = dataclasses.replace(
            t.config,
            train=dataclasses.replace(
                t.config.train,
                steps=steps,
                save_every=save_every,
                **({"eval_every": 2} | (train or {})),
            ),
        )
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        checkpoints = Checkpoints(folder, 2)
        loader, counters, state = make_loader(config), Progress(), t.start()
        if scale:
            state = state._replace(scale=jnp.float32(scale))
        if checkpoints.latest() is not None:
            state, extra = checkpoints.restore(state)
            loader.restore(extra["loader"])
            counters = read_progress(extra["progress"])
        rate = rate or schedule(config.optimizer, steps)
        called = []

        def learning_rate(step):
            called.append(step)
            if at is not None and len(called) == at[0]:
                at[1]()
            return rate(step)

        with MetricsLog(folder, start_step=int(state.step)) as log:
            state = loop(
                config,
                program(t) if program else t.program,
                state,
                t.frozen,
                loader,
                held_out or {},
                checkpoints,
                log,
                counters,
                learning_rate,
                ahead=ahead,
            )
        checkpoints.close()
        return state, counters

    return run


@pytest.fixture
def metrics(tmp_path):
    """Reads the values of a key, by step, from tmp_path/NAME/metrics.jsonl."""

    def read(key, name="run"):
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        return {row["step"]: row[key] for row in map(json.loads, lines) if key in row}

    return read


@pytest.fixture
def like(trainer):
    return lambda **trains: trainer(**trains).start()


def stop(number=signal.SIGTERM):
    return lambda: signal.raise_signal(number)


def test_every_step_is_logged_and_held_out_loss_now_and_then(run, metrics, trainer, make_batch):
    held_out = [{k: x[0] for k, x in make_batch(seed=s).items()} for s in (1, 2)]
    state, counters = run(held_out={"": held_out})
    assert int(state.step) == 6
    for name in (
        "train/loss",
        "train/tokens_per_s",
        "train/grad_norm",
        "train/learning_rate",
        "train/epoch",
    ):
        values = metrics(name)
        assert list(values) == [1, 2, 3, 4, 5, 6], name
        assert all(math.isfinite(v) and v >= 0 for v in values.values())
    assert metrics("train/loss")[1] == pytest.approx(math.log(256), rel=0.05)
    loss, perplexity = metrics("eval/loss"), metrics("eval/perplexity")
    assert list(loss) == list(perplexity) == [2, 4, 6]
    assert perplexity[4] == pytest.approx(math.exp(loss[4]), rel=1e-6)
    assert not metrics("train/loss_scale")
    assert counters.seconds > 0
    assert counters.skipped == 0


def test_tokens_are_counted_without_padding(run, make_loader, trainer):
    _, counters = run(steps=3)
    loader = make_loader(trainer().config)
    assert counters.tokens == sum(int((next(loader)["segments"] > 0).sum()) for _ in range(3))


def test_evaluation_is_the_mean_over_all_target_tokens(trainer, make_batch):
    t = trainer()
    batches = [{k: x[0] for k, x in make_batch(seed=s).items()} for s in (1, 2)]
    batches[1] = batches[1] | {"mask": batches[1]["mask"] & (np.arange(6) == 0)[:, None]}
    sums = [t.program.evaluate(t.trained, t.frozen, batch) for batch in batches]
    counts = [int(batch["mask"].sum()) for batch in batches]
    assert counts[0] > 2 * counts[1] > 0
    loss, tokens = evaluate(t.program, t.trained, t.frozen, batches)
    assert tokens == sum(counts)
    assert loss == pytest.approx(sum(float(s) for s, _ in sums) / sum(counts))
    assert loss != pytest.approx(np.mean([float(s) / n for (s, _), n in zip(sums, counts)]))


def test_nothing_to_evaluate_on(trainer, make_batch):
    t = trainer()
    batch = {k: x[0] for k, x in make_batch().items()}
    empty = batch | {"mask": np.zeros_like(batch["mask"])}
    assert evaluate(t.program, t.trained, t.frozen, [empty]) == (0, 0)


def test_ten_steps_are_five_a_restart_and_five_to_the_bit(run, metrics):
    whole, counters = run("whole", steps=10, save_every=5, scale=OVERFLOWING, **HALF)
    assert 0 < counters.skipped < 5
    with pytest.raises(Stopped):
        run("parts", steps=10, save_every=0, scale=OVERFLOWING, at=(5, stop()), **HALF)
    parts, resumed = run("parts", steps=10, save_every=5, **HALF)
    assert int(parts.step) == 10
    for path, x in flatten(whole).items():
        assert np.asarray(x).tobytes() == np.asarray(flatten(parts)[path]).tobytes(), path
    assert (resumed.tokens, resumed.skipped) == (counters.tokens, counters.skipped)
    for name in ("train/loss", "train/loss_scale", "train/epoch", "train/learning_rate"):
        assert metrics(name, "parts") == metrics(name, "whole")


@pytest.mark.slow
def test_steps_that_go_by_layer_are_resumed_to_the_bit(run, tmp_path, like):
    def by_layer(t):
        return layered.by_layer(t.program, ON_DEVICE, ON_DEVICE, at_once=True)

    whole, _ = run("whole", program=by_layer)
    with pytest.raises(Stopped):
        run(program=by_layer, save_every=0, at=(3, stop()))
    assert Checkpoints(tmp_path / "run").latest() == 3
    resumed, _ = run(program=by_layer, save_every=0)
    assert sha256(resumed) == sha256(whole)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("ahead", [False, True])
def test_a_signal_saves_and_stops_after_the_step_on_its_way(run, tmp_path, like, number, ahead):
    whole, _ = run("whole", save_every=0)
    # with `ahead`, the third step's figures are read while the device computes the fourth
    last = 4 if ahead else 3
    with pytest.raises(Stopped, match=f"after step {last}") as e:
        run(save_every=0, at=(3, stop(number)), ahead=ahead)
    assert e.value.code == 128 + number
    assert Checkpoints(tmp_path / "run").latest() == last
    resumed, _ = run(save_every=0)
    assert sha256(resumed) == sha256(whole)


def test_the_second_signal_acts_at_once(run, tmp_path):
    def twice():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        run(save_every=0, at=(3, twice))
    assert Checkpoints(tmp_path / "run").latest() is None


def test_a_loss_that_is_not_finite_stops_the_run(run, tmp_path, metrics, like):
    def breaks(t):
        leaves, structure = jax.tree.flatten(t.frozen)
        broken = jax.tree.unflatten(
            structure, [x.at[...].set(jnp.nan) if x.dtype == jnp.float32 else x for x in leaves]
        )

        def gradient(state, frozen, batch, key):
            frozen = broken if int(state.step) == 4 else frozen
            return t.program.gradient(state, frozen, batch, key)

        return dataclasses.replace(t.program, gradient=gradient)

    with pytest.raises(RunFailed) as e:
        run(program=breaks, save_every=3)
    message = str(e.value)
    assert message.startswith("step 5: loss nan, gradient norm nan: not a finite number (first in ")
    assert "runs.0.down_proj.adapter.a); the last good checkpoint is step 3. " in message
    assert "\n" not in message
    assert list(metrics("train/loss")) == [1, 2, 3, 4]
    good, _ = Checkpoints(tmp_path / "run").restore(like())
    whole, _ = run("whole", steps=3)
    assert sha256(good.trained) == sha256(whole.trained)
    again, _ = run(save_every=3)
    assert sha256(again) == sha256(run("unbroken", save_every=3)[0])


def test_a_run_that_fails_before_its_first_checkpoint_says_so(run):
    def breaks(t):
        nothing = jax.tree.map(lambda x: x * jnp.nan, t.trained)

        def gradient(state, frozen, batch, key):
            return t.program.gradient(state._replace(trained=nothing), frozen, batch, key)

        return dataclasses.replace(t.program, gradient=gradient)

    with pytest.raises(RunFailed, match=r"^step 1: .*; there is no checkpoint yet\. Lower"):
        run(program=breaks)


def test_overflows_are_skipped_counted_and_logged(run, metrics, caplog):
    state, counters = run(steps=10, scale=OVERFLOWING, rate=lambda step: step, **HALF)
    skipped = [0, *metrics("train/skipped_steps").values()]
    overflowed = np.diff(skipped)
    assert overflowed[0] == 1
    assert 0 < counters.skipped == skipped[-1] < 9
    scales = list(metrics("train/loss_scale").values())
    assert scales == [OVERFLOWING / 2**n for n in skipped[:-1]]
    assert float(state.scale) == OVERFLOWING / 2**counters.skipped
    assert int(state.finite_steps) == overflowed[::-1].argmax()
    norms = metrics("train/grad_norm").values()
    assert [norm is None for norm in norms] == list(overflowed == 1)
    assert not caplog.records
    # the schedule counts only the steps that were taken, as the optimizer does
    assert list(metrics("train/learning_rate").values()) == list(range(10) - np.array(skipped[:-1]))


def test_twenty_overflows_in_a_row_stop_the_run(run, tmp_path, metrics):
    with pytest.raises(RunFailed) as e:
        run(steps=40, save_every=5, scale=2.0**80, **HALF)
    assert str(e.value).startswith(f"step {MOST_SKIPPED}: ")
    assert f": {MOST_SKIPPED} overflowing steps in a row (first in " in str(e.value)
    assert "the last good checkpoint is step 15" in str(e.value)


def test_an_overflow_at_scale_one_stops_the_run(run):
    def breaks(t):
        leaves, structure = jax.tree.flatten(t.frozen)
        broken = jax.tree.unflatten(structure, [x.at[...].set(jnp.inf) for x in leaves])
        return dataclasses.replace(
            t.program,
            gradient=lambda state, frozen, batch, key: t.program.gradient(
                state, broken, batch, key
            ),
        )

    with pytest.raises(RunFailed, match=r"^step 3: .*: not a finite number"):
        run(program=breaks, scale=4, **HALF)


@pytest.fixture
def judged(run):
    """Runs the loop with given held-out losses, one for each step; evaluates after every step."""

    def judge(losses, name="run", train=None, **more):
        def program(t):
            done = []

            def update(state, grads, finite):
                done.append(int(state.step) + 1)
                return t.program.update(state, grads, finite)

            def evaluate(trained, frozen, batch):
                return losses[done[-1]], 1

            return dataclasses.replace(t.program, update=update, evaluate=evaluate)

        every = {"eval_every": 1, **(train or {})}
        return run(name, program=program, held_out={"": [{}]}, train=every, **more)

    return judge


def kept(folder):
    return Checkpoints(folder).steps()


FALLING_THEN_RISING = [None, 3.0, 2.0, 1.0, 1.5, 1.0, 4.0, 0.5, 0.4]


def test_the_best_checkpoint_stays_beside_the_newest(judged, tmp_path, like):
    _, counters = judged(FALLING_THEN_RISING, save_every=1, train={"keep_best": True})
    assert kept(tmp_path / "run") == [3, 5, 6]
    assert (counters.choice.best.step, counters.choice.best.loss) == (3, 1.0)
    best, _ = Checkpoints(tmp_path / "run").restore(like(), 3)
    assert int(best.step) == 3
    judged(FALLING_THEN_RISING, "last", save_every=1)
    assert kept(tmp_path / "last") == [5, 6]


def test_a_better_step_is_saved_whether_its_turn_has_come_or_not(judged, tmp_path):
    judged(FALLING_THEN_RISING, save_every=0, train={"keep_best": True})
    # steps 1 and 2 were saved as the best of their time, then replaced; 6 is the newest
    assert kept(tmp_path / "run") == [3, 6]


@pytest.mark.parametrize(("patience", "end"), [(1, 4), (2, 5), (3, 6), (4, 8), (0, 8)])
def test_training_stops_after_its_patience(judged, tmp_path, metrics, patience, end):
    state, _ = judged(FALLING_THEN_RISING, steps=8, save_every=0, train={"patience": patience})
    assert int(state.step) == end
    assert kept(tmp_path / "run") == [end]
    assert list(metrics("eval/loss")) == list(range(1, end + 1))
    # a resumed run takes no further step
    again, _ = judged(FALLING_THEN_RISING, steps=8, train={"patience": patience})
    assert int(again.step) == end
    # patience 0 never stops early, so the run goes on
    longer, _ = judged(FALLING_THEN_RISING, steps=8, train={"patience": 0})
    assert int(longer.step) == 8


@pytest.mark.parametrize("stopped", [1, 2, 3, 4, 5])
def test_patience_and_the_best_step_go_on_after_a_stop(judged, tmp_path, stopped):
    settings = {"steps": 8, "save_every": 0, "train": {"patience": 3, "keep_best": True}}
    whole, counters = judged(FALLING_THEN_RISING, "whole", **settings)
    with pytest.raises(Stopped):
        judged(FALLING_THEN_RISING, "parts", at=(stopped, stop()), **settings)
    parts, resumed = judged(FALLING_THEN_RISING, "parts", **settings)
    assert int(parts.step) == int(whole.step) == 6
    assert sha256(parts) == sha256(whole)
    assert resumed.choice == counters.choice
    assert kept(tmp_path / "parts")[0] == kept(tmp_path / "whole")[0] == 3


def test_three_steps_and_on_to_six_are_six_to_the_bit(run):
    whole, _ = run("whole", steps=6)
    run("parts", steps=3)
    parts, _ = run("parts", steps=6)
    assert sha256(parts) == sha256(whole)


def test_each_held_out_set_is_logged_and_the_first_decides(run, metrics, make_batch):
    first, second = ([{k: x[0] for k, x in make_batch(seed=s).items()}] for s in (1, 2))
    _, counters = run("two", steps=2, held_out={"code": first, "prose": second})
    _, alone = run("one", steps=2, held_out={"": first})
    assert metrics("eval/loss", "two") == metrics("eval/loss", "one")
    assert metrics("eval/code/loss", "two") == metrics("eval/loss", "one")
    assert metrics("eval/prose/loss", "two") != metrics("eval/loss", "one")
    assert counters.choice.last.loss == alone.choice.last.loss
    assert list(counters.choice.last.sets) == ["code", "prose"]
    assert alone.choice.last.sets == {}
    assert not metrics("eval//loss", "one")


def test_counters_of_earlier_versions_are_read():
    old = {"tokens": 3, "seconds": 1.5, "eval_before": 2.5, "answers_before": ["a"]}
    found = read_progress(old)
    assert (found.tokens, found.before.loss, found.before.sets) == (3, 2.5, {})
    assert found.choice.best is None
    assert read_progress(old | {"eval_before": None}).before is None
    again = read_progress(json.loads(json.dumps(dataclasses.asdict(found))))
    assert again == found


def test_figures_that_are_read_ahead_are_those_of_their_steps(run, metrics):
    states = [run(name, ahead=name == "ahead")[0] for name in ("now", "ahead")]
    assert sha256(states[0]) == sha256(states[1])
    for key in ("train/loss", "train/grad_norm", "train/epoch", "eval/loss"):
        assert metrics(key, "ahead") == metrics(key, "now")
