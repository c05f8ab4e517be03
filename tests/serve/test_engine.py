"""Checks the engine's rows against `generate` with one prompt and one adapter at a time."""

import jax.numpy as jnp
import pytest

from qlora_jax.formats.huggingface import open_folder
from qlora_jax.formats.load import load_model
from qlora_jax.formats.peft.plain import read_plain
from qlora_jax.models import generate as generation
from qlora_jax.models.adapters import attach_bank
from qlora_jax.models.generate import generate
from qlora_jax.serve import engine as engines
from qlora_jax.serve.engine import Engine, SamplingSettings
from qlora_jax.serve.scheduler import Job, Scheduler

pytestmark = pytest.mark.slow

STOPS = (7, 31)
PROMPTS = {"a": [5, 17, 201], "b": [9], "c": list(range(40, 64)), "d": [5, 17, 201, 8]}
LONG = list(range(40, 110))


class Desk:
    """A scheduler over a real engine."""

    def __init__(self, model, rows):
        attach_bank(model, slots=2, rank=8, dtype=jnp.float32)
        self.model = model
        self.engine = Engine(
            model, rows=rows, length=160, stop_ids=STOPS, pad_id=0, dtype=jnp.float32
        )
        self.scheduler = Scheduler(
            self.engine, lambda ids: "".join(map(chr, ids)), base="base", slots=2, waiting=9
        )

    def submit(self, name, settings, model="base", max_tokens=40):
        text = []
        self.scheduler.submit(
            Job(
                prompt=PROMPTS.get(name, LONG),
                model=model,
                max_tokens=max_tokens,
                settings=settings,
                listen=text.append,
            )
        )
        return text

    def finish(self):
        while self.scheduler.busy:
            self.scheduler.step()


def said(pieces):
    return [ord(c) for piece in pieces for c in piece.text]


@pytest.fixture(scope="module")
def adapters(adapters):
    return {name: read_plain(folder) for name, folder in adapters.items()}


@pytest.fixture(scope="module")
def desk(adapters, tiny_model):
    desk = Desk(load_model(open_folder(tiny_model), quant=None, dtype=jnp.float32), 3)
    desk.scheduler.load("one", adapters["one"])
    desk.scheduler.load("two", adapters["two"])
    return desk


def alone(model, prompt, slot, settings, new=40):
    (ids,) = generate(
        model,
        [prompt],
        max_new_tokens=new,
        stop_ids=STOPS,
        pad_id=0,
        dtype=jnp.float32,
        adapters=[slot],
        **settings._asdict(),
    )
    return ids


SLOTS = {"one": 0, "two": 1, "base": 2}
MIXTURE = [
    ("a", SamplingSettings(0.0, 1.0, 0), "one", 40),
    ("b", SamplingSettings(1.0, 0.9, 3), "two", 25),
    ("c", SamplingSettings(0.7, 1.0, -1), "base", 40),
    ("d", SamplingSettings(1.3, 0.5, 2**40), "one", 33),
    ("a", SamplingSettings(0.0, 1.0, 0), "two", 7),
    ("a", SamplingSettings(1.0, 1.0, 3), "base", 40),
    ("a", SamplingSettings(1.0, 1.0, 3), "base", 40),
]


def test_each_row_amid_others_is_what_generate_writes_alone(desk):
    pieces = []
    for i, (name, settings, model, count) in enumerate(MIXTURE):
        pieces.append(desk.submit(name, settings, model, count))
        if i % 2:
            desk.scheduler.step()
    desk.finish()
    texts = [said(p) for p in pieces]
    for text, told, (name, settings, model, count) in zip(texts, pieces, MIXTURE):
        assert text == alone(desk.model, PROMPTS[name], SLOTS[model], settings, count)
        assert told[-1].finish == ("length" if len(text) == count else "stop")
    assert texts[5] == texts[6]
    assert len({tuple(text) for text in texts}) == len(texts) - 1
    # The same row alone in the engine gives the same text.
    again = desk.submit(*MIXTURE[1])
    desk.finish()
    assert said(again) == texts[1]


def test_no_mixture_and_no_adapter_needs_a_new_program(desk, adapters):
    programs = (generation.prefill, generation.generate_chunk, engines._placed)
    desk.submit("a", MIXTURE[0][1])
    desk.finish()
    before = [program._cache_size() for program in programs]
    desk.scheduler.unload("two")
    desk.scheduler.load("three", adapters["three"])
    texts = [
        desk.submit("b", SamplingSettings(t, 0.9, t), m) for t, m in ((0, "three"), (1, "one"))
    ]
    texts.append(desk.submit("d", SamplingSettings(0.5, 1.0, 5), "base", 3))
    desk.finish()
    assert [program._cache_size() for program in programs] == before
    assert said(texts[0]) == alone(desk.model, PROMPTS["b"], 1, SamplingSettings(0, 0.9, 0))
    desk.scheduler.unload("three")
    desk.scheduler.load("two", adapters["two"])


def test_a_row_may_fill_the_cache_to_its_end_beside_a_shorter_one(desk):
    long = desk.submit("long", SamplingSettings(0.9, 1.0, 11), "one", 90)
    short = desk.submit("b", SamplingSettings(0.9, 1.0, 11), "one", 4)
    desk.finish()
    assert said(long) == alone(desk.model, LONG, 0, SamplingSettings(0.9, 1.0, 11), 90)
    assert said(short) == alone(desk.model, PROMPTS["b"], 0, SamplingSettings(0.9, 1.0, 11), 4)
