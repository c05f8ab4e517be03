"""Plans a run on a mesh of eight devices of a CPU, beside the real one; prints what it finds.

Run by `test_plan_mesh`, in a process of its own, since a process keeps its number of devices.
"""

import json
import sys
from pathlib import Path

import jax

from qlora_jax.config import changed, from_tree
from qlora_jax.formats.huggingface import open_folder
from qlora_jax.models import sharding, trees
from qlora_jax.plan import accounts, fit, share
from qlora_jax.plan.traffic import traffic
from qlora_jax.runtime.errors import UserError
from qlora_jax.runtime.mesh import device_mesh
from qlora_jax.train.assemble import assemble
from qlora_jax.train.mesh import split_over
from qlora_jax.train.setup import load_model

LLAMA = Path(__file__).parents[1] / "golden" / "models" / "llama"


class Card:
    """A device with so much memory."""

    device_kind = "a card"

    def __init__(self, limit: int):
        self.limit = limit

    def memory_stats(self) -> dict[str, int]:
        return {"bytes_limit": self.limit}


def homes(tree) -> list:
    return [[list(x.sharding.shard_shape(x.shape)), str(x.dtype)] for x in jax.tree.leaves(tree)]


def main(overrides: dict[str, str]) -> None:
    """Prints JSON: bytes, where planned and real arrays live, what is exchanged, the refusal."""
    sharding.WHOLE_BELOW = 64  # so that the small model's arrays are split at all
    tree = {
        "model": {"path": str(LLAMA), "remat": "full"},
        "data": {"source": "none", "sequence_length": 16},
        "output": "none",
        "lora": {"rank": 8},
        "train": {"batch_size": 8},
        "mesh": {"data": 2, "fsdp": 4},
    }
    config = changed(from_tree(tree, "test"), overrides)
    checkpoint = open_folder(LLAMA)
    decoder, mesh = checkpoint.config, device_mesh(config.mesh.data, config.mesh.fsdp)
    step = accounts.abstract_step(config, decoder, jax.devices()[0], mesh)
    kept = []

    def compiled(*arguments, **options):
        kept.append(fit.compiled(*arguments, **options))
        return kept[-1]

    (gradient,) = accounts.gradient_accounts(step, compiled)
    model, _ = load_model(config, checkpoint, print, mesh)
    parts, layout = split_over(mesh, trees.split(model, config.method), print)
    real = assemble(config, parts, layout=layout)
    try:
        fit.fit(config, decoder, Card(2**10), False)
        refusal = ""
    except UserError as e:
        refusal = str(e)
    found = {
        "planned": homes((step.state, step.frozen)),
        "real": homes((real.state, real.frozen)),
        "trees": share.nbytes((step.state.trained, step.frozen, dict(step.batch))),
        "gradient": gradient._asdict(),
        "traffic": traffic(kept[0].as_text(), step, decoder, config.mesh.fsdp)._asdict(),
        "refusal": refusal,
    }
    sys.stdout.write("\n" + json.dumps(found) + "\n")


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
