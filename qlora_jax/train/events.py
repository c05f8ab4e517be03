"""Imports the parts of tensorboardX that write event files, without importing torch.

If torch is installed, tensorboardX imports it for features that this package does not use. The
import would add seconds to the start of every command.
"""

import sys

_torch = sys.modules.get("torch")
if _torch is None:
    sys.modules["torch"] = None  # type: ignore[assignment]  # an import of it fails
try:
    from tensorboardX import RecordWriter
    from tensorboardX.proto.event_pb2 import Event, SessionLog
    from tensorboardX.summary import scalar
finally:
    if _torch is None:
        del sys.modules["torch"]

__all__ = ["Event", "RecordWriter", "SessionLog", "scalar"]
