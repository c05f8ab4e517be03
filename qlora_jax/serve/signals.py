"""Receives SIGINT and SIGTERM at once, also while the process compiles or imports."""

import asyncio
import contextlib
import signal
from collections.abc import AsyncIterator, Callable
from typing import TypeVar

from qlora_jax.runtime.errors import Terminated
from qlora_jax.serve.pool import Pool

T = TypeVar("T")


class SignalEvent(asyncio.Event):
    """An event that a signal sets; `number` is the number of the signal."""

    number = signal.SIGTERM


@contextlib.asynccontextmanager
async def signals(loop: asyncio.AbstractEventLoop) -> AsyncIterator[SignalEvent]:
    """Yields an event that the first SIGINT or SIGTERM sets; the next has its usual effect."""
    received, numbers = SignalEvent(), (signal.SIGINT, signal.SIGTERM)

    def note(number: signal.Signals) -> None:
        received.number = number
        received.set()
        for n in numbers:
            loop.remove_signal_handler(n)

    for number in numbers:
        loop.add_signal_handler(number, note, number)
    try:
        yield received
    finally:
        for number in numbers:
            loop.remove_signal_handler(number)


def until_signal(function: Callable[[], T]) -> T:
    """Calls a function in a new thread until it returns or a signal arrives.

    The main thread must stay free: there, Python would handle a signal only after a long call such
    as a compilation, or would lose it in an import. After a signal the thread may still run.

    Raises:
      Terminated: SIGINT or SIGTERM arrived.
      Exception: the function raised it.
    """
    return asyncio.run(_until_signal(function))


async def _until_signal(function: Callable[[], T]) -> T:
    async with signals(asyncio.get_running_loop()) as received:
        result = asyncio.ensure_future(Pool("start", threads=1).run(function))
        stopping = asyncio.ensure_future(received.wait())
        await asyncio.wait({result, stopping}, return_when=asyncio.FIRST_COMPLETED)
        stopping.cancel()
        if result.done():
            return result.result()
        result.cancel()
        raise Terminated(received.number)
