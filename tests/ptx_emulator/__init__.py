"""An emulator of NVIDIA's PTX for sm_80: runs compiled kernels on machines without a GPU."""

from ptx_emulator.block import Deadlock as Deadlock
from ptx_emulator.launch import emulate as emulate
from ptx_emulator.memory import Fault as Fault
from ptx_emulator.memory import Race as Race
from ptx_emulator.text import Unsupported as Unsupported
