"""Replaces the program of a part; the environment variable FAKE_PART chooses the behaviour."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

from qlora_jax.bench.gpu.lane import PartContext
from qlora_jax.bench.gpu.record import Recorder

request = json.loads(sys.argv[1])
recorder = Recorder(Path(request["lines"]), request["part"])
what = os.environ["FAKE_PART"]
if what != "nothing":
    recorder.figure("copy", "GB/s", 1.0)
if what == "hang":
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    recorder.fact("child", child.pid)
    time.sleep(600)
if what == "one case hangs":
    left = [x for x in ("to pinned host memory", "matmul", "dispatch") if x not in request["told"]]
    lane = PartContext(recorder, request["scale"], time.monotonic() + 60)
    for name in left:
        with lane.guard(name, within=1):
            if name == "matmul":
                time.sleep(600)
            recorder.figure(name, "us", 2.0)
    recorder.absent("from pinned host memory", "a reason")
if what == "every case dies":
    names = ("to pinned host memory", "from pinned host memory", "dispatch", "matmul")
    recorder.begin(next(x for x in names if x not in request["told"]))
    sys.exit("dead")
if what == "crash":
    sys.exit("/home/somebody/secret.py: boom")
if what == "all":
    for name in ("to pinned host memory", "from pinned host memory", "dispatch", "matmul"):
        recorder.absent(name, "a reason")
