"""The fused product on NVIDIA tensor cores, in Pallas' Mosaic GPU dialect; README.md shows how."""
