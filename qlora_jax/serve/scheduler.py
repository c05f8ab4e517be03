"""Assigns requests to rows of an engine (continuous batching); does not use HTTP."""

import dataclasses
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, Protocol

import numpy as np

from qlora_jax.lora.weights import LoraSet
from qlora_jax.runtime.errors import UserError
from qlora_jax.serve.answer import Answer
from qlora_jax.serve.engine import SamplingSettings

BURST = 8
"""Largest number of tokens per row that a server decodes before it gives free rows to waiting
requests."""

STOPPING = "the server is stopping; send the request again once it is back"

Reason = Literal["unknown model", "busy", "too long", "timeout", "stopping", "failed"]


class Refused(Exception):
    """An error that ends a request before its answer is complete; `reason` is its kind."""

    def __init__(self, reason: Reason, message: str):
        super().__init__(message)
        self.reason = reason


class AnswerPiece(NamedTuple):
    """The next piece of an answer.

    Attributes:
      text: new text; may be empty.
      tokens: number of ids of the answer so far, including a stop id.
      finish: reason for the end of the answer, in the last piece: `stop` after a stop id or a stop
        text, `length` after `max_tokens` ids. None in all other pieces.
    """

    text: str
    tokens: int
    finish: Literal["stop", "length"] | None


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Job:
    """A request for one answer.

    Attributes:
      prompt: token ids.
      model: name of an adapter, or of the base.
      max_tokens: largest number of ids of the answer.
      settings: settings for drawing the tokens.
      stop: texts that end the answer.
      timeout: seconds after `Scheduler.submit` in which the answer must be complete.
      listen: function called with each piece of the answer. If the job fails, it is called with
        the error instead of a last piece.
    """

    prompt: Sequence[int]
    model: str
    max_tokens: int
    settings: SamplingSettings
    stop: Sequence[str] = ()
    timeout: float = float("inf")
    listen: Callable[[AnswerPiece | Refused], None]


class BatchEngine(Protocol):
    """The attributes and methods of `Engine` that the scheduler uses."""

    rows: int
    length: int
    vocabulary: int
    stop_ids: frozenset[int]

    def put_adapter(self, slot: int, adapter: LoraSet) -> None: ...
    def enter(
        self, row: int, prompt: Sequence[int], adapter: int, settings: SamplingSettings
    ) -> int: ...
    def advance(self, steps: int) -> np.ndarray: ...
    def leave(self, row: int) -> None: ...


@dataclasses.dataclass(eq=False)
class _Active:
    job: Job
    slot: int
    deadline: float
    answer: Answer
    row: int = -1
    drawn: int = 0


class Scheduler:
    """The waiting and running jobs of an engine, and its adapters by name.

    The scheduler is not thread-safe. It calls the listeners of jobs in the thread that calls it.

    Args:
      engine: engine that decodes the rows.
      decode: function from ids to text.
      base: name of the model without an adapter.
      slots: number of adapters that the engine's banks can hold.
      waiting: largest number of jobs that wait for a row.
      burst: largest number of tokens per row that are decoded in one step.
      clock: function that returns the time in seconds.
    """

    def __init__(
        self,
        engine: BatchEngine,
        decode: Callable[[Sequence[int]], str],
        *,
        base: str,
        slots: int,
        waiting: int,
        burst: int = BURST,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._engine, self._decode, self._base, self._clock = engine, decode, base, clock
        self._slots, self._room, self._burst = slots, waiting, burst
        self._names: dict[str, int] = {}
        self._users: Counter[int] = Counter()
        self._queue: deque[_Active] = deque()
        self._running: dict[int, _Active] = {}
        self._stopping = False

    @property
    def busy(self) -> bool:
        """Whether a job waits or runs."""
        return bool(self._queue or self._running)

    @property
    def models(self) -> list[str]:
        """The name of the base, followed by the names of the adapters."""
        return [self._base, *self._names]

    def load(self, name: str, adapter: LoraSet) -> None:
        """Loads an adapter into a free slot; later jobs can use it.

        Raises:
          UserError: the name is in use, no slot is free, or the rank is too large.
        """
        if name in self.models:
            raise UserError(f"{name!r} is loaded already; unload it, or give another name")
        taken = {*self._names.values(), *(+self._users)}
        slot = next((s for s in range(self._slots) if s not in taken), None)
        if slot is None:
            raise UserError(
                f"no room for {name!r}: all {self._slots} slots for adapters are in "
                "use; unload one, or start with a larger --max-adapters"
            )
        self._engine.put_adapter(slot, adapter)
        self._names[name] = slot

    def unload(self, name: str) -> None:
        """Removes an adapter. Jobs that use it go on; its slot is free after the last of them.

        Raises:
          Refused: no adapter has this name.
        """
        if name not in self._names:
            raise Refused(
                "unknown model",
                f"no adapter {name!r} is loaded; "
                f"those loaded are: {', '.join(self._names) or 'none'}",
            )
        del self._names[name]

    def submit(self, job: Job) -> None:
        """Adds a job to the queue.

        Raises:
          Refused: the model is unknown, prompt and answer are too long, too many jobs wait, or the
            server is stopping.
        """
        if job.model not in self.models:
            known = ", ".join(self.models)
            raise Refused(
                "unknown model", f"the model {job.model!r} is not loaded; give one of: {known}"
            )
        if self._stopping:
            raise Refused("stopping", STOPPING)
        if len(job.prompt) + job.max_tokens > self._engine.length:
            raise Refused(
                "too long",
                f"{len(job.prompt)} tokens of prompt and {job.max_tokens} of answer are more than "
                f"the {self._engine.length} positions of this server; shorten one of them",
            )
        free = self._engine.rows - len(self._running)
        if len(self._queue) >= self._room + free:
            raise Refused("busy", f"{len(self._queue)} requests are waiting already; try later")
        slot = self._names.get(job.model, self._slots)
        self._users[slot] += 1
        answer = Answer(self._decode, job.stop)
        self._queue.append(_Active(job, slot, self._clock() + job.timeout, answer))

    def cancel(self, job: Job) -> None:
        """Drops a job without calling its listener; does nothing if the job has ended."""
        for active in self._all():
            if active.job is job:
                self._drop(active)

    def stop(self) -> None:
        """Refuses all waiting jobs and all new jobs; running jobs go on."""
        self._stopping = True
        for active in list(self._queue):
            self._refuse(active, Refused("stopping", STOPPING))

    def refuse_all(self, why: Refused) -> None:
        """Ends every waiting and running job with an error."""
        for active in self._all():
            self._refuse(active, why)

    def step(self) -> None:
        """Ends late jobs, gives free rows to waiting jobs, then decodes a burst in all rows."""
        now = self._clock()
        for active in self._all():
            if now >= active.deadline:
                self._refuse(
                    active,
                    Refused(
                        "timeout",
                        f"not finished within {active.job.timeout:g} s; ask for fewer tokens, or "
                        "start the server with a longer --timeout",
                    ),
                )
        free = (row for row in range(self._engine.rows) if row not in self._running)
        for row in list(free)[: len(self._queue)]:
            self._enter(self._queue.popleft(), row)
        if not self._running:
            return
        left = max(active.job.max_tokens - active.drawn for active in self._running.values())
        drawn = self._engine.advance(min(self._burst, left))
        for row, active in list(self._running.items()):
            self._take(active, drawn[row].tolist())

    def _enter(self, active: _Active, row: int) -> None:
        job = active.job
        active.row = row
        self._running[row] = active
        self._take(active, [self._engine.enter(row, job.prompt, active.slot, job.settings)])

    def _take(self, active: _Active, ids: list[int]) -> None:
        """Passes the drawn ids of a row to its job, and drops the job if its answer is complete."""
        job, answer = active.job, active.answer
        ids = ids[: job.max_tokens - active.drawn]
        ends = next((i for i, token in enumerate(ids) if token in self._engine.stop_ids), None)
        text = answer.add(ids[:ends])
        stop_id = ends is not None and not answer.stopped
        active.drawn = answer.tokens + stop_id
        finish: Literal["stop", "length"] | None = None
        if stop_id or answer.stopped:
            finish = "stop"
        elif active.drawn == job.max_tokens:
            finish = "length"
        if finish:
            text += answer.finish()
            self._drop(active)
        if text or finish:
            job.listen(AnswerPiece(text, active.drawn, finish))

    def _all(self) -> list[_Active]:
        return [*self._queue, *self._running.values()]

    def _refuse(self, active: _Active, why: Refused) -> None:
        self._drop(active)
        active.job.listen(why)

    def _drop(self, active: _Active) -> None:
        if self._running.get(active.row) is active:
            del self._running[active.row]
            self._engine.leave(active.row)
        else:
            self._queue.remove(active)
        self._users[active.slot] -= 1
