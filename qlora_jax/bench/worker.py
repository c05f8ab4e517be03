"""Runs one benchmark in a process of its own; the last line of its output is the report.

Any Python interpreter runs this file by its path. A peer's interpreter does not have this package
installed, and needs to import only the modules that measure.

Command: PYTHON worker.py TOOL BENCHMARK OPTIONS, where OPTIONS is JSON.
"""

import importlib
import importlib.util
import json
import sys
from pathlib import Path

OURS = "qlora-jax"


def main() -> int:
    """Runs the benchmark of the command line and returns the exit code; 2 is a `UserError`."""
    _import_package()
    tool, what, options = sys.argv[1:]
    from qlora_jax.runtime.errors import UserError

    if tool == OURS:
        from qlora_jax.runtime import compilation, cuda_toolkit, hugepages

        hugepages.restart()
        compilation.use_wide_vectors()
        cuda_toolkit.point()
    module = f"qlora_jax.bench.{what}" if tool == OURS else f"qlora_jax.bench.peers.{tool}_{what}"
    # Import this module first: its `STARTED` is the time from which imports are counted.
    from qlora_jax.bench import measure  # noqa: F401
    from qlora_jax.bench.options import from_tree

    try:
        report = importlib.import_module(module).run(from_tree(what, json.loads(options)))
    except UserError as e:
        print(e, file=sys.stderr)
        return 2
    print(json.dumps(report), flush=True)
    return 0


def _import_package() -> None:
    """Imports qlora_jax from the folder above this file; removes this file's from `sys.path`."""
    here = Path(__file__).resolve().parent
    sys.path[:] = [entry for entry in sys.path if not entry or Path(entry).resolve() != here]
    root = here.parent
    spec = importlib.util.spec_from_file_location(
        root.name, root / "__init__.py", submodule_search_locations=[str(root)]
    )
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[root.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)


if __name__ == "__main__":
    sys.exit(main())
