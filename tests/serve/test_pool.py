"""Tests the threads that work for the event loop."""

import asyncio
import gc
import weakref

import pytest

from qlora_jax.serve.pool import Pool


class Large:
    """Stands in for the body of a request."""


def refuse(large):
    raise ValueError("refused")


def test_what_a_refused_call_was_given_goes_with_its_error(monkeypatch):
    """Without a reference cycle the argument is freed at once, with no garbage collection."""
    large = Large()
    seen = weakref.ref(large)

    async def call(arguments):
        with pytest.raises(ValueError, match="refused") as caught:
            await Pool("test", threads=1).run(refuse, arguments.pop())
        del caught

    gc.disable()
    try:
        held = [large]
        del large
        asyncio.run(call(held))
        assert seen() is None
    finally:
        gc.enable()
