"""Runs the cases of whole models: every family, its options and the ways to store it."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import transformers
from pairs import our_logits, ours, their_logits

from matrix import store
from matrix.judge import NO_MODEL, NoModel, Outcome, judge, line
from matrix.options import AXES, BASE, OTHER_FUNCTIONS
from matrix.pairwise import Row, describe

LENGTHS = (12, 44)
"""Lengths of the token rows: some RoPE scalings change beyond a number of positions."""


def axes(family: str) -> dict[str, list[str]]:
    """Returns the axes, with their choices, of a family's options and of the ways to store it."""
    own = {axis: list(choices) for axis, choices in AXES[family].items()}
    return {"family": [family], **own, **store.STORED}


def usual(family: str) -> Row:
    """Returns the default row: the first choice of every axis."""
    return {axis: choices[0] for axis, choices in axes(family).items()}


def run_models(family: str, rows: list[Row], seed: int) -> Iterator[Outcome]:
    """Yields the outcomes of a family's cases."""
    for i, row in enumerate(rows):
        yield run_model(family, row, describe(row, usual(family)), seed + i)


def run_model(family: str, row: Row, case: str, seed: int) -> Outcome:
    """Writes the model of one case and returns the outcome."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "model"
        try:
            store.write(folder, family, row, seed)
        except Exception as e:
            return Outcome(family, case, NO_MODEL, "not made", line(e))
        return compare(family, case, folder, seed)


def compare(group: str, case: str, folder: Path, seed: int) -> Outcome:
    """Returns the outcome of a model folder."""
    batches = [ids(seed, length) for length in LENGTHS]

    def expected() -> list[np.ndarray]:
        model = load_whole(folder)
        return [their_logits(model, row) for row in batches]

    def found() -> list[np.ndarray]:
        model = ours(folder)
        return [our_logits(model, row) for row in batches]

    return judge(group, case, folder, expected, found)


def ids(seed: int, length: int) -> np.ndarray:
    """Returns random tokens, int32[2, length]."""
    random = np.random.default_rng(seed)
    return random.integers(0, BASE["vocab_size"], (2, length), dtype=np.int32)


def load_whole(folder: Path) -> torch.nn.Module:
    """Loads the model with transformers; raises NoModel if the files lack a tensor."""
    model, told = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    if told["missing_keys"] or told["mismatched_keys"]:
        raise NoModel(f"transformers draws at random: {sorted(told['missing_keys'])[:2]}")
    return model.eval()


def run_functions(seed: int) -> Iterator[Outcome]:
    """Yields the outcomes of activation functions that are in no family's options."""
    row = usual("llama")
    for i, name in enumerate(OTHER_FUNCTIONS):
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place) / "model"
            store.write(folder, "llama", row, seed + i)
            store.write_config(folder, store.raw_config("llama", row, {"hidden_act": name}))
            yield compare("functions", name, folder, seed + i)


def quiet() -> None:
    """Turns off transformers' messages, and torch's threads, which slow tiny models down."""
    transformers.utils.logging.set_verbosity_error()
    torch.set_num_threads(1)
