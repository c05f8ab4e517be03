"""Checks configs/: every key is valid, the header is complete, and the run fits its GPU."""

import math
import re
from pathlib import Path

import pytest

from qlora_jax.commands.plan import shapes
from qlora_jax.config import Config, load_config
from qlora_jax.formats.names import expected_shapes
from qlora_jax.gpu.described import GPUS, read_gpu
from qlora_jax.models.shapes import find
from qlora_jax.plan.ledger import ledger, total
from qlora_jax.runtime.errors import UserError

FILES = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))
ALL = pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
HEADER = re.compile(
    r"""\#\ \S.*\.\n
    \#\n
    \#\ Shows:\ (?P<shows>.+(\n\#\ \ \ .+)*)\n
    \#\ Expected:\ (?P<expected>.+(\n\#\ \ \ .+)*)\n
    \#\ Cost:\ (?P<cost>.+(\n\#\ \ \ .+)*)\n
    \#\ Command:\ (?P<command>\S.+)\n
    \#\ GPU:\ (?P<gpu>\w+)\n
    (?!\#)""",
    re.VERBOSE,
)
PRETRAIN = {"pretrain_1m": 1e6, "pretrain_4m": 4e6, "pretrain_12m": 12e6}
RUN_HERE = {"quickstart", "lora16", "full", "small", *PRETRAIN}
"""Configs that run on a CPU in minutes."""

FREE = 0.07
"""Share of GPU memory left for CUDA's context and for fragmentation."""


def header(path: Path) -> dict[str, str]:
    match = HEADER.match(path.read_text("utf-8"))
    assert match, f"{path.name}: the comment block is not like that of quickstart.yaml"
    return match.groupdict()


def test_there_are_configs() -> None:
    assert RUN_HERE | {"article_7b_t4", "guanaco_65b"} <= {path.stem for path in FILES}


@ALL
def test_loads_and_says_what_it_is(path: Path) -> None:
    config, said = load_config(path), header(path)
    assert config.output == f"runs/{path.stem}"
    assert path.name in said["command"] or said["command"] == f"make {path.stem}"
    assert said["gpu"] in GPUS
    assert ("not run here: needs a GPU" in said["cost"]) == (path.stem not in RUN_HERE)


@ALL
def test_the_ledger_fits_the_gpu(path: Path) -> None:
    config, gpu = load_config(path), header(path)["gpu"]
    made_by = path.with_name(f"{Path(config.model.path).parent.name}.yaml")
    model = shapes(load_config(made_by) if made_by.exists() else config)
    device = total(ledger(model, config))
    assert device < (1 - FREE) * read_gpu(gpu).memory
    if "bfloat16" in (config.model.compute_dtype, config.lora.dtype) and path.stem not in RUN_HERE:
        assert read_gpu(gpu).capability >= (8, 0)


@pytest.mark.parametrize(
    ("size", "rate", "dropout"),
    [("7b", 2e-4, 0.1), ("13b", 2e-4, 0.1), ("33b", 1e-4, 0.05), ("65b", 1e-4, 0.05)],
)
def test_guanaco_has_the_papers_hyperparameters(size: str, rate: float, dropout: float) -> None:
    config = load_config(Path(__file__).parents[2] / "configs" / f"guanaco_{size}.yaml")
    assert find(config.model.path) is find(f"llama-{size}")
    lora, optimizer, train = config.lora, config.optimizer, config.train
    assert (optimizer.learning_rate, lora.dropout) == (rate, dropout)
    assert (lora.rank, lora.alpha, lora.scaling) == (64, 16, "alpha/r")
    assert (lora.target_modules, config.method) == ("all-linear", "qlora")
    assert (config.quant.codebook, config.quant.block_size, config.quant.double_quant) == (
        *("nf4", 64),
        True,
    )
    assert (optimizer.schedule, optimizer.beta2, optimizer.clip_norm) == ("constant", 0.999, 0.3)
    assert optimizer.weight_decay == 0
    assert train.steps * 0.03 == pytest.approx(optimizer.warmup_steps, abs=1)
    assert (train.steps, train.batch_size, train.gradient_accumulation) == (1875, 1, 16)
    assert config.model.compute_dtype == config.model.storage_dtype == "bfloat16"
    assert config.data.sequence_length == 16 + 512


@pytest.mark.parametrize(("name", "size"), PRETRAIN.items())
def test_a_model_from_scratch_has_the_size_in_its_name(name: str, size: float) -> None:
    config = load_config(Path(__file__).parents[2] / "configs" / f"{name}.yaml")
    parameters = sum(math.prod(shape) for shape in expected_shapes(shapes(config)).values())
    assert parameters == pytest.approx(size, rel=0.1)


def test_a_wrong_key_would_be_seen(tmp_path: Path) -> None:
    copy = tmp_path / "copy.yaml"
    copy.write_text(FILES[0].read_text("utf-8") + "rnak: 3\n", "utf-8")
    with pytest.raises(UserError, match="unknown key rnak"):
        load_config(copy)


def test_the_quickstarts_differ_in_their_method_alone() -> None:
    def rest(config: Config) -> tuple[object, ...]:
        return config.model, config.data, config.train

    folder = Path(__file__).parents[2] / "configs"
    base, lora, full = (
        load_config(folder / f"{name}.yaml") for name in ("quickstart", "lora16", "full")
    )
    assert rest(base) == rest(lora) == rest(full)
    assert base.lora == lora.lora
    assert base.optimizer == lora.optimizer
    assert [c.method for c in (base, lora, full)] == ["qlora", "lora", "full"]
