"""Product kernels for NVIDIA tensor cores in Pallas Mosaic GPU; README.md explains them."""
