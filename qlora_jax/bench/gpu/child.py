"""Runs one part in its process: `python -m qlora_jax.bench.gpu.child REQUEST`, with JSON."""

import json
import sys
import time
from pathlib import Path

from qlora_jax.runtime import startup


def main() -> int:
    """Runs the part that the request names and returns the exit code."""
    began = time.monotonic()
    startup.prepare()
    request = json.loads(sys.argv[1])
    import jax

    from qlora_jax.bench.gpu.facts import facts
    from qlora_jax.bench.gpu.lane import PartContext
    from qlora_jax.bench.gpu.parts import PARTS
    from qlora_jax.bench.gpu.record import Recorder

    (part,) = (part for part in PARTS if part.name == request["part"])
    lane = PartContext(
        Recorder(Path(request["lines"]), part.name),
        request["scale"],
        began + request["seconds"],
        request["peers"],
        request["told"],
    )
    if lane.fact("device") is None:
        for name, value in facts(jax.devices()[0]).items():
            lane.record.fact(name, value)
    part.module.run(lane)
    return 0


if __name__ == "__main__":
    sys.exit(main())
