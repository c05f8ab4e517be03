"""Chooses the device mesh of a run, and splits the model over it."""

import dataclasses
from collections.abc import Callable

import jax
from jax.sharding import Mesh

from qlora_jax.config import Config
from qlora_jax.models.sharding import MeshLayout, layout_of, unsplit_bytes
from qlora_jax.models.trees import SplitModel
from qlora_jax.runtime.device import describe_devices
from qlora_jax.runtime.errors import UserError
from qlora_jax.runtime.mesh import DATA, FSDP, device_mesh


def mesh_of(config: Config) -> Mesh | None:
    """Returns the mesh of a config; None for one device.

    Raises:
      UserError: there are too few devices, or the rows of a batch are not a multiple of them.
    """
    mesh = device_mesh(config.mesh.data, config.mesh.fsdp)
    check_rows(config)
    return mesh


def check_rows(config: Config) -> None:
    """Raises UserError if the rows of a batch are not a multiple of the devices."""
    asked, rows = config.mesh, config.train.batch_size
    if rows % asked.devices:
        raise UserError(
            f"train.batch_size {rows} is not a multiple of the {asked.devices} devices of mesh "
            f"{{data: {asked.data}, fsdp: {asked.fsdp}}}, which share its rows; give "
            f"--train.batch_size={-(-rows // asked.devices) * asked.devices}, or a smaller mesh"
        )


def describe_mesh(config: Config) -> str:
    """Returns a description of the devices of a run, for messages."""
    found, asked = describe_devices(), config.mesh
    if asked.devices == 1 and jax.process_count() == 1:
        return str(dataclasses.replace(found, count=1))
    processes = f", {jax.process_count()} processes" if jax.process_count() > 1 else ""
    several = dataclasses.replace(found, count=asked.devices)
    return f"{several}, {DATA} {asked.data} x {FSDP} {asked.fsdp}{processes}"


def split_over(
    mesh: Mesh, parts: SplitModel, warn: Callable[[str], None]
) -> tuple[SplitModel, MeshLayout]:
    """Places a model's trees on the devices of a mesh.

    Args:
      mesh: mesh of the run, from `mesh_of`.
      parts: model; its pretrained weights may be on the mesh already.
      warn: function called with a line about weights that cannot be split.

    Returns:
      The model on the mesh, and its layout.
    """
    layout = layout_of(mesh, parts.trained, parts.frozen)
    whole = unsplit_bytes(parts.trained, layout.trained) | unsplit_bytes(
        parts.frozen, layout.frozen
    )
    if whole and mesh.shape[FSDP] > 1:
        n = mesh.shape[FSDP]
        warn(
            f"warning: mesh.fsdp {n} divides no axis of {len(whole)} weights (first "
            f"{next(iter(whole))}); every device holds all of them, "
            f"{sum(whole.values()) / 2**20:.1f} MiB in place of "
            f"{sum(whole.values()) / n / 2**20:.1f}"
        )
    trained, frozen = layout.put_on_devices(parts.trained, parts.frozen)
    return SplitModel(parts.graph, trained, frozen), layout
