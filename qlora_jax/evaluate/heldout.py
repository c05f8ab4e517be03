"""Computes loss and perplexity on the held-out sets of a run, or on other data."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from qlora_jax import config as configs
from qlora_jax.config import Config, DataConfig
from qlora_jax.data.loader import Batch, held_out_batches
from qlora_jax.data.sources import eval_sources, named
from qlora_jax.models import trees
from qlora_jax.runtime.display import progress
from qlora_jax.runtime.errors import UserError
from qlora_jax.train.assemble import program_of
from qlora_jax.train.examples import held_out, left_out, read_data, warnings
from qlora_jax.train.loop import evaluate
from qlora_jax.train.restore import Restored

SOURCE, ROWS = "data.source", "train.eval_rows"
ELSEWHERE = ("data.eval_source", "data.eval_split", "data.eval_fraction")
"""Settings that choose the held-out data; they have no effect on a source evaluated completely."""
OWN = ("name", "split", "max_examples", "format")
"""Settings of `data` that describe the run's source, so that another source must not keep them."""


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """The loss on `split`, in nats per target token; `step` 0 is the model before training."""

    split: str
    step: int
    loss: float
    perplexity: float
    tokens: int


@dataclasses.dataclass(frozen=True)
class EvaluationData:
    """The data of an evaluation: the run's own held-out data, or other data.

    Attributes:
      config: config of the run, with the given settings applied.
      whole: True to evaluate all of `data.source`, which is not the run's source; False to evaluate
        the held-out data of the config.
      capped: whether to evaluate only the first `train.eval_rows` rows.
    """

    config: Config
    whole: bool
    capped: bool


def other_data(config: Config, overrides: Mapping[str, str]) -> EvaluationData:
    """Applies settings of the data to the config of a run.

    If the settings name another `data.source`, all of it is evaluated, because the run trained on
    none of it.

    Args:
      config: config of the run.
      overrides: map from a dotted setting to its value as text.

    Raises:
      UserError: a setting does not belong to the data, contradicts another, or has an invalid
        value.
    """
    for key in overrides:
        if not key.startswith("data.") and key != ROWS:
            raise UserError(
                f"--{key}: a run directory's settings are fixed; for its evaluation data.* and "
                f"{ROWS} may be given, such as --{SOURCE}=FILE"
            )
    whole = SOURCE in overrides
    if whole and (both := next((key for key in ELSEWHERE if key in overrides), None)):
        raise UserError(f"--{SOURCE} is evaluated whole, so --{both} has no effect; give one")
    if whole:
        defaults = DataConfig(source="")
        reset = {name: getattr(defaults, name) for name in (*OWN, "eval_source", "eval_split")}
        data = dataclasses.replace(config.data, **reset, eval_fraction=0.0)
        config = dataclasses.replace(config, data=data)
    return EvaluationData(configs.changed(config, overrides), whole, not whole or ROWS in overrides)


def held_out_loss(
    restored: Restored,
    other: EvaluationData | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, HeldOut]:
    """Evaluates a model on the held-out rows of its run, or on other data.

    Args:
      restored: model to evaluate.
      other: other data; None for the held-out data of the run.
      say: function called with lines about left-out records and with warnings about the data.

    Returns:
      The result of each held-out set by name, in the order of the config. The name of an unnamed
      set is "".

    Raises:
      UserError: the config has no held-out data, or the data cannot be used.
    """
    other = other or EvaluationData(restored.config, whole=False, capped=True)
    config, method = other.config, restored.config.method
    batches = _batches(other, restored, say)
    if not batches:
        raise UserError("data.eval_fraction: no held-out data; give it, or data.eval_source")
    graph, trained, frozen = trees.split(restored.model, method)
    program, found = program_of(config, graph), {}
    for name, rows in batches.items():
        with progress(f"evaluating {name}".rstrip(), None):
            loss, tokens = evaluate(program, trained, frozen, rows)
        split = split_name(config.data, name, whole=other.whole)
        found[name] = HeldOut(split, restored.step, loss, float(np.exp(loss)), tokens)
    return found


def _batches(
    other: EvaluationData, restored: Restored, say: Callable[[str], None]
) -> Mapping[str, Sequence[Batch]]:
    """Returns the batches to evaluate, by the name of the set."""
    config, text = other.config, restored.tokenizer
    data = read_data(config, text, restored.model.config.longest_cached)
    if reasons := left_out(data):
        say(f"{named(config.data.source)}: {'; '.join(reasons)}")
    for line in warnings(data):
        say(line)
    if not other.whole:
        return held_out(config, data, text.pad_id)
    train = config.train
    # every row holds at least one example, so this many rows are enough
    rows = train.eval_rows if other.capped else len(data.train)
    return {"": held_out_batches(data.train, config.data, train.batch_size, rows, text.pad_id)}


def split_name(data: DataConfig, name: str = "", *, whole: bool = False) -> str:
    """Returns a description of the evaluated data.

    Args:
      data: settings of the data.
      name: name of the held-out set.
      whole: whether all of the source is evaluated.
    """
    if whole:
        return f"all of {named(data.source)}"
    if data.eval_source or data.eval_split:
        return f"{named(eval_sources(data)[name])}:{data.eval_split or data.split}"
    return f"{named(data.source)}: {data.eval_fraction:.0%} held out by text"
