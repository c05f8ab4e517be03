"""Devices and dtypes on which the fused kernels run, and their tiles."""

import jax
import pytest

from qlora_jax.kernels import IMPLEMENTATIONS
from qlora_jax.kernels.select import FUSED, usable
from qlora_jax.kernels.target import capability_of


class Device:
    def __init__(self, capability: str | None):
        self.compute_capability = capability


@pytest.mark.parametrize(
    ("text", "capability"), [("8.0", (8, 0)), ("12.1", (12, 1)), ("gfx942", None), (None, None)]
)
def test_capability_of_a_device(text: str | None, capability: tuple[int, int] | None) -> None:
    assert capability_of(Device(text)) == capability  # type: ignore[arg-type]


def test_a_cpu_has_none() -> None:
    assert capability_of(jax.devices("cpu")[0]) is None


@pytest.mark.parametrize(
    ("capability", "dtype", "names"),
    [
        (None, "bfloat16", []),
        ((7, 5), "float16", []),
        ((8, 0), "float32", ["triton"]),
        ((8, 6), "bfloat16", ["mosaic", "triton"]),
        ((10, 0), "float16", ["mosaic", "triton"]),
    ],
)
def test_usable(capability: tuple[int, int] | None, dtype: str, names: list[str]) -> None:
    if jax.__version_info__ < (0, 11):
        names = [name for name in names if name != "mosaic"]
    assert usable(capability, dtype) == names


def test_every_name_is_one_of_matmul() -> None:
    assert set(FUSED) <= set(IMPLEMENTATIONS)


@pytest.mark.parametrize("name", FUSED)
def test_tiles_cover_the_result(name: str) -> None:
    for rows in (1, 16, 100, 4096):
        m, o = FUSED[name].tile(rows, "bfloat16", 4096, 11008, "forward", (9, 0))
        assert m >= min(rows, 16)
        assert 11008 % o == 0
