"""Rows that answer with a model and its named adapters."""

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
    """Returns an engine over the model, and the scheduler that knows its adapters by name.

    Args:
      base: the model; where there are slots it gets banks in place of adapters that it has.
      adapters: names to weights; there are slots for all of them.
      name: the model's own name, without one of these adapters.
      rows: answers that are generated at a time.
      length: most positions of a prompt with its answer.
      slots: most adapters at a time; with 0 the model stays as it is.
      rank: largest rank that the banks have room for; None is the largest of the adapters'.
      waiting: most answers that wait for a row.
      burst: tokens that are generated between two looks at what else there is to do.
      smallest: as for `Engine`.

    Raises:
      UserError: an adapter has the model's name or a larger rank, or there are more than slots.
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
