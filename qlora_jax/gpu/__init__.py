"""Compiles for a GPU that is not here, reads the machine code, and models its time."""
