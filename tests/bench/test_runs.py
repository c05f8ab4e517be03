"""Tests step, load and generation on a tiny model: reports and relations between figures."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from qlora_jax import config as configs
from qlora_jax.bench import generate, load, random_models, step
from qlora_jax.bench.options import GenerateOptions, LoadOptions, StepOptions
from qlora_jax.models import shapes
from qlora_jax.models.config import from_hugging_face
from qlora_jax.models.generate import CHUNK
from qlora_jax.plan import compiled_memory, fit
from qlora_jax.runtime.errors import UserError

pytestmark = pytest.mark.slow

TINY = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    "max_position_embeddings": 64,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("random") / "tiny"
    random_models.write(folder, random_models.COMMON | TINY)
    return str(folder)


def value(report: dict[str, Any], name: str) -> float:
    return report["figures"][name]["value"]


@pytest.mark.parametrize("method", ["qlora", "lora"])
def test_step(model: str, method: str) -> None:
    options = StepOptions(model, method, "float32", "none", batch=2, seq=16, rank=2, steps=3)
    report = step.run(options)
    speed, median = report["figures"]["speed"], report["figures"]["step, median"]
    assert len(speed["samples"]) == len(median["samples"]) == 3
    for tokens_per_s, ms in zip(speed["samples"], median["samples"]):
        assert tokens_per_s == pytest.approx(2 * 16 / ms * 1e3, rel=2e-3)
    assert median["value"] == np.median(median["samples"])
    assert value(report, "step, quickest") == min(median["samples"])
    assert len(report["losses"]) == 4  # the warm-up step has a loss, too
    assert report["losses"][0] == pytest.approx(np.log(128), rel=0.05)
    assert report["losses"][-1] < report["losses"][0]
    # Inputs plus outputs of q, k, v, o, gate, up and down; rank 2, two layers.
    ends = [64 + 64, 64 + 32, 64 + 32, 64 + 64, 64 + 96, 64 + 96, 96 + 64]
    assert report["trainable"] == 2 * 2 * sum(ends)
    assert value(report, "peak memory") >= (value(report, "peak memory, training") or 0)

    # Two moments of four bytes; the tolerance covers the counters of each layer.
    assert value(report, "moments") == pytest.approx(8 * report["trainable"] / 2**20, rel=0.01)
    assert len(report["figures"]["update"]["samples"]) == 3
    assert value(report, "update") > 0
    assert value(report, "load") > 0


@pytest.fixture
def published(monkeypatch: pytest.MonkeyPatch) -> str:
    """Registers a tiny model among the published shapes; returns its name."""
    row = shapes._Row("llama", 64, 96, 2, 4, 2, 128, 64, 1e-5, 1e4, False)
    monkeypatch.setitem(shapes._ROWS, "tiny-1m", row)
    monkeypatch.setitem(shapes.SHAPES, "tiny-1m", from_hugging_face(row._asdict(), "tiny-1m"))
    return "tiny-1m"


@pytest.mark.parametrize(
    ("method", "offload"), [("qlora", "device"), ("lora", "host"), ("full", "device")]
)
def test_a_published_shape(published: str, method: str, offload: str) -> None:
    options = StepOptions(published, method, "float32", "none", 2, 16, 2, 3, offload=offload)
    report = step.run(options)
    assert report["options"]["shape"] == shapes.config_json(published)
    assert "load" not in report["figures"]
    assert value(report, "make") > 0
    assert report["losses"][0] == pytest.approx(np.log(128), rel=0.05)
    assert report["losses"][-1] < report["losses"][0]
    elements = 4 * 64 * 64 - 2 * 64 * 32 + 3 * 64 * 96
    parameters = 2 * (elements + 2 * 64) + 2 * 64 * 128 + 64
    adapters = 2 * 2 * (128 + 96 + 96 + 128 + 3 * 160)
    trainable = parameters if method == "full" else adapters
    assert report["trainable"] == trainable
    assert report["parameters"] == parameters + (method != "full") * adapters


@pytest.mark.parametrize(("method", "offload"), [("qlora", "device"), ("full", "host")])
def test_memory_is_planned_as_fit_does(published: str, method: str, offload: str) -> None:
    """The reference is the plan from the config alone, without weights."""
    options = StepOptions(published, method, "float32", "full", 2, 16, 2, 3, offload=offload)
    planned = value(step.run(options), "planned, device")
    tree = {
        "model": {"path": published, "compute_dtype": "float32", "storage_dtype": "float32"},
        "data": {"source": "none", "sequence_length": 16},
        "output": "none",
        "method": method,
        "lora": {"rank": 2},
        "train": {"batch_size": 2},
    }
    tree["model"]["remat"] = "full"
    config = configs.from_tree(tree, "test")
    abstract = compiled_memory.abstract_step(config, shapes.SHAPES[published], jax.devices()[0])
    gradients = compiled_memory.gradient_memory(abstract, fit.compiled)
    updates = compiled_memory.update_memory(abstract, fit.compiled)
    _, programs = compiled_memory.place_moments(abstract, offload, gradients, updates, 0)
    expected = max(program.device for program in programs) / 2**20
    assert planned == pytest.approx(expected, rel=1e-3)  # the report has four digits


def test_adapters_of_chosen_linears(published: str) -> None:
    targets = ("q_proj", "down_proj")
    options = StepOptions(published, "lora", seq=16, rank=2, alpha=6, target_modules=targets)
    prepared = step.prepare(options)
    assert prepared.trainable == 2 * 2 * (64 + 64 + 96 + 64)
    scales = [x for x in jax.tree.leaves(prepared.frozen) if x.shape == (2,)]
    assert [float(x) for scale in scales for x in scale] == [3.0] * 4


def test_a_kernel_that_is_not_here(published: str) -> None:
    if jax.default_backend() == "cpu":
        with pytest.raises(UserError, match="implementation triton: no such kernel runs on cpu"):
            step.run(StepOptions(published, seq=16, kernel="triton"))


def test_a_device_that_is_too_small(published: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def prepare(options: StepOptions) -> None:
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory for 9 bytes.\nMore")

    monkeypatch.setattr(step, "prepare", prepare)
    with pytest.raises(UserError) as raised:
        step.run(StepOptions(published))
    message = str(raised.value)
    assert message.startswith("tiny-1m: does not fit on ")
    assert "(RESOURCE_EXHAUSTED: Out of memory for 9 bytes.); give --offload host" in message
    assert "\n" not in message


def test_a_step_that_is_too_long(model: str) -> None:
    with pytest.raises(UserError, match=r"--seq 65 is beyond the 64 positions of .*; give that"):
        step.run(StepOptions(model, seq=65))


def test_load(model: str) -> None:
    report = load.run(LoadOptions(model))
    config = random_models.COMMON | TINY
    embeddings, norms = 128 * 64, 5 * 64
    linears = random_models.parameters(config) - embeddings - norms
    expected = (2 * (embeddings + norms) + 4.2 / 8 * linears) / 2**20
    # The tolerance covers the layers' codebooks and the part-filled blocks of nested scales.
    assert expected < value(report, "weights") < 1.1 * expected
    assert value(report, "load") > 0
    assert value(report, "peak memory") > value(report, "weights")


def test_generate(model: str) -> None:
    tokens = CHUNK + 5
    report = generate.run(GenerateOptions(model, "float32", prompt=7, tokens=tokens, samples=2))
    assert len(report["ids"]) == tokens
    assert all(0 <= i < 128 for i in report["ids"])
    assert len(report["figures"]["prefill"]["samples"]) == 2
    # The first answer includes compiling, so decoding alone must be faster.
    least = (tokens - 1) / value(report, "first answer")
    assert value(report, "decode") > least
    assert report["figures"]["decode"]["unit"] == "tokens/s"


def test_generation_beyond_the_models_positions(model: str) -> None:
    with pytest.raises(UserError, match="more than the model's 64 positions"):
        generate.run(GenerateOptions(model, prompt=34, tokens=64))


@pytest.mark.parametrize("run", [step.run, load.run, generate.run])
def test_no_model(run: Any) -> None:
    kind = {step.run: StepOptions, load.run: LoadOptions, generate.run: GenerateOptions}[run]
    with pytest.raises(UserError, match=r"\./none: no such file or folder"):
        run(kind("./none"))


def test_random_models_are_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QLORA_JAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(random_models, "SHAPES", {"random-tiny": TINY})
    said: list[str] = []
    first = random_models.folder("random-tiny", said.append)
    before = (first / "model.safetensors").read_bytes()
    assert random_models.folder("random-tiny", said.append) == first
    assert len(said) == 1
    random_models.write(tmp_path / "again", random_models.COMMON | TINY)
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == before
    assert [p.name for p in first.parent.iterdir()] == ["random-tiny"]


def test_a_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("QLORA_JAX_CACHE", str(tmp_path / "file" / "cache"))
    monkeypatch.setattr(random_models, "SHAPES", {"random-tiny": TINY})
    with pytest.raises(UserError, match=r"cannot be written: .*; set QLORA_JAX_CACHE"):
        random_models.folder("random-tiny", print)


@pytest.mark.parametrize(
    ("name", "count"),
    [("random-smollm2-135m", 134_515_008), ("random-tinyllama-1.1b", 1_100_048_384)],
)
def test_shapes_are_the_real_ones(name: str, count: int) -> None:
    config = random_models.COMMON | random_models.SHAPES[name]
    assert random_models.parameters(config) == count
