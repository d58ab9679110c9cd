"""Large buffers go back to the kernel, in a process of its own, as the thresholds are the whole process's."""

from __future__ import annotations

import ctypes
import subprocess
import sys

import pytest

SCRIPT = """
import ctypes, sys
from falkirk.linux import heap

class Info(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in (
        "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")]

mallinfo = ctypes.CDLL(None).mallinfo2
mallinfo.restype = Info
if sys.argv[1] == "fixed":
    heap.give_back()
before = mallinfo().hblkhd
bytearray(8 << 20)  # Free at once; by itself glibc takes such buffers from its heap from now on.
held = bytearray(4 << 20)
print(mallinfo().hblkhd - before >= 4 << 20)
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="the C library isn't glibc 2.33 or newer")
@pytest.mark.parametrize(("thresholds", "from_the_kernel"), [("fixed", "True"), ("glibc's own", "False")])
def test_a_large_buffer_comes_from_the_kernel_also_after_a_larger_one(thresholds: str, from_the_kernel: str) -> None:
    command = [sys.executable, "-c", SCRIPT, thresholds]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() == from_the_kernel
