"""Compiles for absent GPUs, reads the machine code, and models its time."""
