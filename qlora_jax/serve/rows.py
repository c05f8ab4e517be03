"""Opens an engine and a scheduler for a model with named adapters."""

from collections.abc import Mapping

from qlora_jax.lora.weights import LoraSet, largest_rank
from qlora_jax.models.adapters import attach_bank
from qlora_jax.models.generate import SMALLEST
from qlora_jax.serve.base import Base
from qlora_jax.serve.engine import Engine
from qlora_jax.serve.scheduler import BURST, Scheduler


def open_rows(
    base: Base,
    adapters: Mapping[str, LoraSet],
    *,
    name: str,
    rows: int,
    length: int,
    slots: int,
    rank: int | None = None,
    waiting: int = 0,
    burst: int = BURST,
    smallest: int = SMALLEST,
) -> tuple[Engine, Scheduler]:
    """Returns an engine for the model, and a scheduler with the adapters loaded by name.

    Args:
      base: loaded model; if `slots` > 0, its adapters are replaced by banks, in place.
      adapters: name to adapter weights, at most `slots` of them.
      name: name of the model without an adapter.
      rows: largest number of answers that are generated at a time.
      length: largest number of positions of a prompt with its answer.
      slots: largest number of adapters at a time; with 0 the model is not changed.
      rank: largest rank that fits the banks; None is the largest rank of `adapters`.
      waiting: largest number of requests that wait for a row.
      burst: largest number of tokens per row that are generated in one step of the scheduler.
      smallest: smallest number of positions of the cache, as in `Engine`.

    Raises:
      UserError: an adapter has the model's name or a rank larger than `rank`, or there are more
        adapters than slots.
    """
    dtype = base.dtype
    if slots:
        room = rank or max(map(largest_rank, adapters.values()), default=1)
        attach_bank(base.model, slots=slots, rank=room, dtype=dtype)
    text = base.tokenizer
    engine = Engine(
        base.model,
        rows=rows,
        length=length,
        stop_ids=text.stop_ids,
        pad_id=text.pad_id,
        dtype=dtype,
        smallest=smallest,
    )
    scheduler = Scheduler(engine, text.decode, base=name, slots=slots, waiting=waiting, burst=burst)
    for adapter, own in adapters.items():
        scheduler.load(adapter, own)
    return engine, scheduler
