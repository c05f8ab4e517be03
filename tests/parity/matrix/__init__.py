"""Reads checkpoints and adapters that transformers and PEFT wrote with many config options.

Each case is a folder that transformers or PEFT wrote. That tool's float32 logits are the reference
for ours: a case is right, refused with one clear line, or wrong. `python -m matrix`, run in
tests/parity, prints the counts.
"""
