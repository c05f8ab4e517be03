"""Memory that a run holds while it trains."""

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import pytest

from qlora_jax.train import fit

pytestmark = [pytest.mark.quick, pytest.mark.slow]


def live_bytes() -> int:
    gc.collect()
    return sum(x.nbytes for x in jax.live_arrays())


def test_a_resumed_run_holds_its_state_once(
    tmp_path: Path,
    write_config: Callable[..., Path],
    run_cli: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The initial state, which gives the shapes of the checkpoint, is freed before training."""
    held: list[int] = []
    loop = fit.loop

    def counted(*arguments: Any, **more: Any) -> Any:
        held.append(live_bytes() - before)
        return loop(*arguments, **more)

    monkeypatch.setattr(fit, "loop", counted)
    config = write_config(tmp_path, method="full", train__steps=2)
    for more in ((), ("--resume", "--train.steps=3")):
        before = live_bytes()
        ended = run_cli("train", config, *more)
        assert ended.code == 0, ended.err
    assert "resumed from step 2" in ended.err
    first, resumed = held
    # the state is the weights and two moments; evaluation batches are NumPy arrays, not counted
    assert resumed < 1.2 * first
