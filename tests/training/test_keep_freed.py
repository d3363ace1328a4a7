import resource
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = """
import resource, sys
import torch
from training import memory
if sys.argv[1] == "keep":
    print(memory.keep_freed())
def step():
    blocks = [torch.empty(10_000_000).fill_(0) for _ in range(4)]  # 40 MB each: malloc maps these one by one
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    step()
before = faults(); step(); print(faults() - before)
"""


def pages_taken(choice):
    command = [sys.executable, "-c", SCRIPT, choice]
    out = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout.split()
    if out[0] == "False":
        pytest.skip("this C library has no mallopt")
    return int(out[-1])


def test_what_a_step_freed_is_not_taken_from_the_kernel_again():
    pages = 4 * 40_000_000 // resource.getpagesize()
    assert pages_taken("keep") < pages // 20 < pages // 2 < pages_taken("leave")
