"""Defines the lane, which gives a part its recorder, its scale and the time that is left."""

import contextlib
import dataclasses
import faulthandler
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from qlora_jax.bench.gpu import record
from qlora_jax.bench.gpu.record import Recorder
from qlora_jax.kernels.target import half_dtype
from qlora_jax.runtime.errors import FULL_MEMORY, OutOfTime, first_line

FULL, REHEARSAL = "full", "rehearsal"
"""Scales: real shapes for a GPU, and tiny shapes for a CPU."""

CUBLAS = "--xla_gpu_enable_triton_gemm=false"
"""Flag for XLA that leaves less to tune; parts without the flag show XLA's default."""

LOST = (
    "CUDA_ERROR_ILLEGAL",
    "CUDA_ERROR_MISALIGNED",
    "CUDA_ERROR_LAUNCH_FAILED",
    "CUDA_ERROR_LAUNCH_TIMEOUT",
    "CUDA_ERROR_HARDWARE_STACK",
    "CUDA_ERROR_INVALID_PC",
    "CUDA_ERROR_INVALID_ADDRESS_SPACE",
    "CUDA_ERROR_ASSERT",
    "illegal memory access",
    "misaligned address",
    "unspecified launch failure",
)
"""Texts of errors after which the process can no longer use the GPU."""

HANGS = 20
"""Seconds after which a check or a timing counts as hanging; one normally takes 1 or 2 s."""

SLOWER = {FULL: 1, REHEARSAL: 5}
"""Scale to the factor on time limits: a CPU has few cores, and other processes use them."""


@dataclasses.dataclass(frozen=True)
class PartContext:
    """The context in which one part runs.

    Attributes:
      record: recorder of the results.
      scale: `FULL` or `REHEARSAL`.
      deadline: value of `time.monotonic()` at which the part's process is ended.
      peers: Python interpreters that have peers installed.
      told: names of results that earlier processes of the part recorded; they are not tried again.
    """

    record: Recorder
    scale: str
    deadline: float
    peers: Sequence[str] = ()
    told: Sequence[str] = ()

    @property
    def rehearsing(self) -> bool:
        return self.scale == REHEARSAL

    def left(self) -> float:
        """Returns the seconds until the deadline."""
        return self.deadline - time.monotonic()

    def fact(self, name: str) -> Any:
        """Returns a fact that an earlier part recorded; None if there is none."""
        lines = record.read([self.record.path])
        found = [x["value"] for x in lines if x["kind"] == "fact" and x["name"] == name]
        return found[-1] if found else None

    def dtype(self) -> str:
        """Returns the 16-bit dtype that the device multiplies fast, by its recorded capability."""
        capability = self.fact("capability")
        return half_dtype(capability and tuple(map(int, capability.split("."))))

    def kernel(self) -> str | None:
        """Returns the implementation for models: xla if a check of a kernel failed, else None."""
        checks = [x for x in record.read([self.record.path]) if x["kind"] == "check"]
        wrong = [x for x in checks if not x["right"] and x["part"] in ("products", "contexts")]
        return "xla" if wrong else None

    @contextlib.contextmanager
    def guard(self, *names: str, within: float | None = None) -> Iterator[None]:
        """Records an error inside the `with` as the reason why the named results are absent.

        The part then counts as failed, unless the time or the device's memory was too small. An
        error that leaves the GPU unusable is raised again.

        Args:
          names: names of the results that the `with` records.
          within: seconds after which the process ends itself, because nothing else stops a kernel
            that hangs; the part continues in a new process. None sets no limit. A `with` that has
            a limit must not be inside another one that has a limit.
        """
        self.record.begin(*names)
        if within is not None:
            faulthandler.dump_traceback_later(within * SLOWER[self.scale], exit=True)
        try:
            yield
        except Exception as e:
            traceback.print_exc()  # to the log, not to the report
            known = record.names(record.read([self.record.path]), self.record.part)
            for name in names:
                if name not in known:
                    small = isinstance(e, OutOfTime) or FULL_MEMORY in str(e)
                    reason = f"{type(e).__name__}: {first_line(e)}"
                    self.record.absent(name, reason, error=not small)
            if any(mark in str(e) for mark in LOST):
                raise
        finally:
            if within is not None:
                faulthandler.cancel_dump_traceback_later()

    def figures(
        self,
        report: Mapping[str, Any],
        case: str,
        kinds: Mapping[str, tuple[str, str]],
        **details: Any,
    ) -> None:
        """Records figures of a benchmark's report; a figure without a value is recorded as absent.

        Args:
          report: result of `bench.measure.report`.
          case: name of the case; a result's name is CASE: KIND, and each figure has the entry case.
          kinds: KIND to its unit and its name in the report.
          details: further entries of every figure.
        """
        for kind, (unit, source) in kinds.items():
            value = report["figures"].get(source, {}).get("value")
            if value is None:
                self.record.absent(f"{case}: {kind}", "the device does not report this")
            else:
                self.record.figure(f"{case}: {kind}", unit, value, field=kind, case=case, **details)

    def due(self, seconds: float, *names: str) -> bool:
        """Returns whether to try the named results: some are missing, and `seconds` are left.

        If too little time is left, the missing results are recorded as absent.
        """
        missing = [name for name in names if name not in self.told]
        if self.left() >= seconds:
            return bool(missing)
        for name in missing:
            self.record.absent(name, f"not begun: {max(self.left(), 0):.0f} s were left")
        return False
