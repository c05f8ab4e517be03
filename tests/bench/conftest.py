"""Fixtures: a fake interpreter that answers like a peer, so that no peer must be installed."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

PEER = """#!{python}
import json, sys
if sys.argv[1] == "-c":
    print(json.dumps([p for p in {packages!r} if p in sys.argv[3:]]))
    sys.exit()
tool, what, options = sys.argv[2:]
with open({log!r}, "a") as log:
    print(json.dumps([tool, what, json.loads(options)]), file=log)
sys.stderr.write({message!r})
print("a line of some library")
print(json.dumps(dict({report!r}, tool=tool, options=json.loads(options))))
sys.exit({code})
"""


@pytest.fixture
def make_peer(tmp_path: Path) -> Callable[..., Path]:
    """Returns a function that makes a fake interpreter with `packages`; every run gives `figures`.

    The interpreter logs tool, benchmark and options of each run to the file `<name>.log` beside it.
    """

    def make(
        name: str,
        packages: list[str],
        figures: dict[str, Any] | None = None,
        code: int = 0,
        message: str = "",
        **report: Any,
    ) -> Path:
        path = tmp_path / name
        report = {
            "versions": {"python": "3"},
            "others_cores": None,
            "figures": figures or {},
            **report,
        }
        path.write_text(
            PEER.format(
                python=sys.executable,
                packages=packages,
                log=f"{path}.log",
                report=report,
                code=code,
                message=message,
            )
        )
        path.chmod(0o755)
        return path

    return make


@pytest.fixture
def runs_of() -> Callable[[Path], list[Any]]:
    """Returns a function that reads the logged runs of a fake peer."""

    def read(peer: Path) -> list[Any]:
        return [json.loads(line) for line in Path(f"{peer}.log").read_text().splitlines()]

    return read
