"""Trains: the loss, the step, the optimizer, the loop, checkpoints, the report."""
