"""The fused product on NVIDIA tensor cores, in Pallas' Mosaic GPU dialect; README.md shows how."""

from qlora_jax.kernels.mosaic.kernel import backward as backward
from qlora_jax.kernels.mosaic.kernel import forward as forward
