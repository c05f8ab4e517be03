"""Loss and perplexity on a run's held-out sets, or on other data."""

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
"""Say what is held out; a source that is evaluated whole has nothing to do with them."""
OWN = ("name", "split", "max_examples", "format")
"""Settings of `data` that belong to the source of the run, and not to another one."""


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """`loss` is in nats per target token of `split`; `step` 0 is the model before training."""

    split: str
    step: int
    loss: float
    perplexity: float
    tokens: int


@dataclasses.dataclass(frozen=True)
class Other:
    """What a run is evaluated on where that is not what it was trained with.

    Attributes:
      config: of the run, with the settings laid over it.
      whole: evaluate all of `data.source`, which is another one; else what is held out of it.
      capped: evaluate the first `train.eval_rows` rows alone.
    """

    config: Config
    whole: bool
    capped: bool


def other_data(config: Config, overrides: Mapping[str, str]) -> Other:
    """Lays settings of the data over the config of a run.

    Another `data.source` is evaluated whole, as nothing of it was trained on.

    Args:
      config: the run's.
      overrides: dotted key to its text.

    Raises:
      UserError: a setting that is not the data's, contradicts another, or has no such value.
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
    return Other(configs.changed(config, overrides), whole, not whole or ROWS in overrides)


def held_out_loss(
    restored: Restored,
    other: Other | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, HeldOut]:
    """Evaluates a model on the rows its training run evaluates on, or on other data.

    Args:
      restored: the model.
      other: other data.
      say: called with a line on records that were left out.

    Returns:
      The result of each held-out set by name, the first one first; a set without a name has "".

    Raises:
      UserError: the config sets nothing aside, or the data cannot be used.
    """
    other = other or Other(restored.config, whole=False, capped=True)
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
    other: Other, restored: Restored, say: Callable[[str], None]
) -> Mapping[str, Sequence[Batch]]:
    """What is evaluated, by the name of the set."""
    config, text = other.config, restored.tokenizer
    data = read_data(config, text, restored.model.config.longest_cached)
    if reasons := left_out(data):
        say(f"{named(config.data.source)}: {'; '.join(reasons)}")
    for line in warnings(data):
        say(line)
    if not other.whole:
        return held_out(config, data, text.pad_id)
    train = config.train
    # a row holds an example or more
    rows = train.eval_rows if other.capped else len(data.train)
    return {"": held_out_batches(data.train, config.data, train.batch_size, rows, text.pad_id)}


def split_name(data: DataConfig, name: str = "", *, whole: bool = False) -> str:
    """Returns what is evaluated on, in words.

    Args:
      data: the settings.
      name: of the held-out set.
      whole: the source is evaluated whole.
    """
    if whole:
        return f"all of {named(data.source)}"
    if data.eval_source or data.eval_split:
        return f"{named(eval_sources(data)[name])}:{data.eval_split or data.split}"
    return f"{named(data.source)}: {data.eval_fraction:.0%} held out by text"
