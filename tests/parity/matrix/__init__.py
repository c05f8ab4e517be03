"""Checkpoints and adapters as other tools write them, over the options of those tools' configs.

Each case is a folder that transformers or PEFT wrote. Its logits in float32 are compared with ours:
a case is right, refused by one clear line, or wrong. `python -m matrix`, in tests/parity, prints
the counts.
"""
