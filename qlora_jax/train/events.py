"""The parts of tensorboardX that write event files, imported without torch.

tensorboardX imports torch where it is installed, for features that are not used here. That takes
seconds of every start.
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
