"""Lists the bandwidths between GPUs of one machine, from data sheets; none is measured here."""

from collections.abc import Mapping
from typing import NamedTuple


class Link(NamedTuple):
    """A connection between GPUs.

    Attributes:
      name: name that its maker uses.
      bandwidth: bytes per second that a GPU receives while it sends at the same rate.
      most: largest number of GPUs that it joins.
    """

    name: str
    bandwidth: float
    most: int


PCIE_3 = Link("PCIe 3.0 x16", 15.75e9, 64)
PCIE_4 = Link("PCIe 4.0 x16", 31.5e9, 64)
"""Source: PCI-SIG's base specifications, 8 and 16 GT/s a lane, 128 of 130 bits data, 16 lanes."""

LINKS: Mapping[str, tuple[Link, ...]] = {
    "a100": (Link("NVLink 3", 300e9, 16), PCIE_4),
    "h100": (Link("NVLink 4", 450e9, 8), PCIE_4),
    "b200": (Link("NVLink 5", 900e9, 8), PCIE_4),
    "a6000": (Link("NVLink bridge", 56.25e9, 2), PCIE_4),
    "rtx4090": (PCIE_4,),
    "t4": (PCIE_3,),
}
"""GPU to its links, the fastest first. NVIDIA's data sheets give both directions together: A100 SXM
600 GB/s, H100 SXM 900 GB/s, B200 1.8 TB/s (HGX boards, every pair through switches), RTX A6000
112.5 GB/s (a bridge between two). The RTX 4090 has PCIe 4.0 x16 and no NVLink; the T4 PCIe 3.0 x16.
PCIe is assumed to have its full rate between all GPUs at a time, which few boards provide."""


def link_of(gpu: str, devices: int) -> Link | None:
    """Returns the fastest link that joins so many GPUs; None if the GPU's links are unknown.

    Args:
      gpu: a key of `LINKS`, or another name.
      devices: number of GPUs in one machine that exchange bytes.
    """
    return next((link for link in LINKS.get(gpu, ()) if devices <= link.most), None)
