"""Freed memory is used again: a training does not fault it in anew at each step."""

import platform
import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys, torch
from reproduction.runs.allocator import keep_freed_memory
if sys.argv[1] == "kept":
    assert keep_freed_memory()
pages = []
for _ in range(8):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    several = [torch.ones(9_000_000) for _ in range(3)]
    del several
    pages.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(min(pages))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="it is glibc that is asked")
def test_freed_memory_is_used_again() -> None:
    faults = {
        mode: int(subprocess.check_output([sys.executable, "-c", PROGRAM, mode], text=True))
        for mode in ("kept", "given back")
    }
    assert faults["kept"] < 100 < faults["given back"], faults
