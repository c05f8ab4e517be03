"""Loss and perplexity on a run's held-out split."""

import dataclasses

import numpy as np

from qlora_jax.data.sources import named
from qlora_jax.models import trees
from qlora_jax.runtime.errors import UserError
from qlora_jax.train.assemble import program_of
from qlora_jax.train.display import progress
from qlora_jax.train.examples import held_out, read_data
from qlora_jax.train.loop import evaluate
from qlora_jax.train.restore import Restored


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """`loss` is in nats per target token of `split`; `step` 0 is the model before training."""

    split: str
    step: int
    loss: float
    perplexity: float
    tokens: int


def held_out_loss(restored: Restored) -> HeldOut:
    """Evaluates a model on the rows its training run evaluates on.

    Raises:
      UserError: the config sets nothing aside.
    """
    config = restored.config
    data = read_data(config, restored.tokenizer, restored.model.config.longest_cached)
    if not data.held_out:
        raise UserError("data.eval_fraction: no held-out data; give it, or data.eval_source")
    graph, trained, frozen = trees.split(restored.model, config.method)
    batches = held_out(config, data, restored.tokenizer.pad_id)
    with progress("evaluating", None):
        loss, tokens = evaluate(program_of(config, graph), trained, frozen, batches)
    return HeldOut(split_name(restored), restored.step, loss, float(np.exp(loss)), tokens)


def split_name(restored: Restored) -> str:
    """What is evaluated on, in words."""
    data = restored.config.data
    if data.eval_source or data.eval_split:
        return f"{named(data.eval_source or data.source)}:{data.eval_split or data.split}"
    return f"{named(data.source)}: {data.eval_fraction:.0%} held out by text"
