"""Reads reports of `qlora-jax bench gpu`: the rates and times that were measured on a GPU.

A report is the file DEVICE.json in a folder of reports. `ReportFields`, `Copy`, `Matmul` and
`Timed` define its fields.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from qlora_jax.gpu.case import GpuProduct
from qlora_jax.gpu.described import GPUS, read_gpu
from qlora_jax.gpu.roofline import Ceilings
from qlora_jax.runtime import json_files, paths
from qlora_jax.runtime.errors import UserError

MATMUL = "matmul "
"""Prefix of the `field` of a matrix product's rate; the dtype follows."""

Rate = Annotated[float, Field(gt=0, allow_inf_nan=False, strict=True)]
Count = Annotated[int, Field(gt=0, strict=True)]


@dataclass(frozen=True)
class Copy:
    """The rate of copies in device memory; bytes read and bytes written both count."""

    field: Literal["copy"]
    unit: Literal["GB/s"]
    value: Rate


@dataclass(frozen=True)
class Matmul:
    """The rate of a large matrix product in 16-bit floats."""

    field: Annotated[str, Field(pattern=f"^{MATMUL}")]
    unit: Literal["TFLOP/s"]
    value: Rate


@dataclass(frozen=True)
class Timed:
    """One product with a 4-bit weight, or with the 16-bit weight, and its time."""

    field: Literal["time"]
    unit: Literal["us"]
    value: Rate
    implementation: str
    direction: Literal["forward", "backward"]
    rows: Count
    k: Count
    n: Count
    dtype: str


@dataclass(frozen=True)
class ReportFields:
    """The top-level fields of a report; each entry of `figures` is checked by its kind."""

    schema: Literal[1]
    device: str
    capability: Annotated[str, Field(pattern=r"^\d+\.\d+$")]
    figures: list[dict[str, Any]]


class GpuReport:
    """One report of a GPU.

    Attributes:
      path: path of its file.
      device: NVIDIA's name of the GPU, as the driver gives it.
      gpu: target in `GPUS` with that name; None if there is none.
      capability: compute capability of the GPU.
      times: seconds of each product; the case's `gpu` is the target, or else the device.
    """

    def __init__(self, path: Path):
        """Reads a report.

        Raises:
          UserError: the file cannot be read or is damaged; the message names the file and the key.
        """
        head: ReportFields = _checked(path, "", ReportFields, _json(path))
        major, minor = map(int, head.capability.split("."))
        self.path, self.device, self.capability = path, head.device, (major, minor)
        self.gpu = target(head.device)
        if self.gpu is not None and self.capability != (known := read_gpu(self.gpu).capability):
            raise UserError(
                f"{path}: capability: {head.capability}, but that of {head.device} is "
                f"{'.'.join(map(str, known))}; measure again"
            )
        self.times: dict[GpuProduct, float] = {}
        self._copy: float | None = None
        self._matmul: dict[str, float] = {}
        for i, figure in enumerate(head.figures):
            self._take(f"figures.{i}", figure)

    def ceilings(self, dtype: str) -> Ceilings | None:
        """Returns the measured rates for products in `dtype`; None if one of the two is missing."""
        tensor = self._matmul.get(dtype)
        return None if self._copy is None or tensor is None else Ceilings(self._copy, tensor)

    def _take(self, key: str, figure: Mapping[str, Any]) -> None:
        part, field = figure.get("part"), str(figure.get("field"))
        if part == "ceilings" and field == "copy":
            self._copy = 1e9 * _checked(self.path, key, Copy, figure).value
        elif part == "ceilings" and field.startswith(MATMUL):
            rate: Matmul = _checked(self.path, key, Matmul, figure)
            self._matmul[field.removeprefix(MATMUL)] = 1e12 * rate.value
        elif part == "times" and field == "time":
            t: Timed = _checked(self.path, key, Timed, figure)
            gpu = self.gpu or self.device
            case = GpuProduct(gpu, t.implementation, t.rows, t.k, t.n, t.dtype, t.direction)
            if case in self.times:
                raise UserError(f"{self.path}: {key}: a second time of {case[1:]}; measure again")
            self.times[case] = 1e-6 * t.value


def reports(folder: Path) -> list[GpuReport]:
    """Reads the reports in a folder, sorted by file name; a missing folder has no reports.

    Raises:
      UserError: a report is damaged, or two reports are of one device.
    """
    found: dict[str, GpuReport] = {}
    for path in sorted(folder.glob("*.json")):
        report = GpuReport(path)
        if report.device in found:
            raise UserError(
                f"{path}: device: {report.device}, as in {found[report.device].path.name}; "
                "keep one of the two"
            )
        found[report.device] = report
    return list(found.values())


def target(device: str) -> str | None:
    """Returns the name in `GPUS` of a device.

    The device's name must equal the name in the target's description, except for upper and lower
    case: "NVIDIA H100 80GB HBM3" is h100. "NVIDIA H100 PCIe" and "NVIDIA H200" are not, because
    their rates differ.
    """
    same = [gpu for gpu in GPUS if read_gpu(gpu).name.casefold() == device.strip().casefold()]
    return same[0] if same else None


def _json(path: Path) -> Any:
    try:
        return json_files.parse(path.read_bytes())
    except OSError as e:
        raise paths.unreadable(path, e) from None
    except ValueError as e:
        raise UserError(f"{path}: not JSON: {e}; measure again") from None


def _checked(path: Path, key: str, kind: type[Any], tree: Any) -> Any:
    try:
        return TypeAdapter(kind).validate_python(tree)
    except ValidationError as e:
        problem = e.errors()[0]
        where = ".".join(filter(None, (key, *map(str, problem["loc"])))) or "the file"
        message = problem["msg"][0].lower() + problem["msg"][1:]
        raise UserError(f"{path}: {where}: {message}; measure again") from None
