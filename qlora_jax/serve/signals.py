"""Signals that end a server, noted at once whatever the main thread would be doing."""

import asyncio
import contextlib
import signal
from collections.abc import AsyncIterator, Callable
from typing import TypeVar

from qlora_jax.runtime.errors import Terminated
from qlora_jax.serve.pool import Pool

T = TypeVar("T")


class Received(asyncio.Event):
    """Set by a signal, whose number it keeps."""

    number = signal.SIGTERM


@contextlib.asynccontextmanager
async def signals(loop: asyncio.AbstractEventLoop) -> AsyncIterator[Received]:
    """Inside, the first SIGINT or SIGTERM is noted; the next acts as if nobody listened."""
    received, numbers = Received(), (signal.SIGINT, signal.SIGTERM)

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
    """Calls a function in a thread of its own, which a signal leaves to itself.

    In the main thread a signal would wait for the end of what runs there, such as a compilation,
    or be lost in it, as in an import.

    Raises:
      Terminated: at once, by SIGINT or SIGTERM.
      Exception: what the function raises.
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
