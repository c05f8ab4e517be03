"""One measured run: a process that prints its report as the last line of its output.

Started as a file, by any interpreter: a peer's has not installed this package and need not be able
to import anything of it but what it measures with.

Command: PYTHON worker.py TOOL WHAT OPTIONS, where OPTIONS is JSON.
"""

import importlib
import importlib.util
import json
import sys
from pathlib import Path

OURS = "qlora-jax"


def main() -> int:
    """Runs what the arguments name and returns the exit code; 2 is the user's mistake."""
    _import_package()
    tool, what, options = sys.argv[1:]
    from qlora_jax.runtime.errors import UserError

    if tool == OURS:
        from qlora_jax.runtime import compilation, cuda_toolkit, hugepages

        hugepages.restart()
        compilation.widen()
        cuda_toolkit.point()
    module = f"qlora_jax.bench.{what}" if tool == OURS else f"qlora_jax.bench.peers.{tool}_{what}"
    # first, since seconds of import are counted from here
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
    """Imports qlora_jax from around this file, and takes this file's folder off the path."""
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
