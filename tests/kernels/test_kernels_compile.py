"""Every Triton kernel compiles for A100, RTX 30, RTX 40 and H100 at the blocks its launcher chooses; that
needs no GPU.

Shared memory fits, registers are not spilled, and kernels that multiply matrices use the matrix instructions.
"""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")
TRITON = tuple(int(number) for number in triton.__version__.split(".")[:2])
ROOT = Path(__file__).resolve().parents[2]
OPERATIONS = sorted(path.stem for path in ROOT.glob("tests/specimens/*.py") if path.stem != "__init__")
SHARED_BYTES = {
    80: 163 * 1024,
    86: 99 * 1024,
    89: 99 * 1024,
    90: 227 * 1024,
}  # CUDA programming guide, table of capabilities
# 8.6 and 8.9 take the A100's blocks, and their ptxas a register or two more; so does Triton before 3.9
SPILLED_BYTES = {80: 0, 86: 64, 89: 64, 90: 0} if TRITON >= (3, 9) else dict.fromkeys(SHARED_BYTES, 64)
INSTRUCTION = {80: "mma", 86: "mma", 89: "mma", 90: "wgmma"}


@pytest.mark.parametrize("capability", SHARED_BYTES)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_compiles_within_the_limits_of_the_gpu(operation, capability, tmp_path):
    command = [sys.executable, str(ROOT / "tests" / "compile_kernels.py"), operation, str(capability)]
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    compiled = [json.loads(line) for line in done.stdout.splitlines()]
    names = {kernel["kernel"] for kernel in compiled}
    module = importlib.import_module(f"tests.specimens.{operation}")
    matrix, small = module.MATRIX, getattr(module, "SMALL_MATRIX", set())
    without = getattr(module, "WITHOUT_WGMMA", set())  # (specimen, kernel)
    assert names and matrix | small <= names
    for kernel in compiled:
        assert kernel["shared_bytes"] <= SHARED_BYTES[capability], kernel
        assert kernel["spilled_bytes"] <= SPILLED_BYTES[capability], kernel
        if kernel["kernel"] in matrix:
            older = (kernel["specimen"], kernel["kernel"]) in without
            assert kernel["matrix_instruction"] == ("mma" if older else INSTRUCTION[capability]), kernel
        if kernel["kernel"] in small:  # blocks of fewer rows than wgmma takes
            assert kernel["matrix_instruction"] is not None, kernel


COUNTS = """
import json, sys, torch
sys.path.insert(0, ".")
from kernels import launch
from kernels.cross_entropy import linear_cross_entropy_triton
from kernels.gated_mlp import gated_mlp_triton
from kernels.layer_norm import layer_norm_triton
from kernels.rms_norm import add_rms_norm_triton
from kernels.rope import rope_triton

def step(tokens):
    def empty(*shape):
        return torch.empty(*shape, dtype=torch.bfloat16, device="meta", requires_grad=True)

    x, weight = empty(tokens, 4096), empty(4096)
    y, total = add_rms_norm_triton(x, empty(tokens, 4096), weight, 1e-5)
    torch.autograd.backward([y, total], [torch.empty_like(y), torch.empty_like(total)])
    layer_norm_triton(x, weight, empty(4096), 1e-5).sum().backward()
    q, k = rope_triton(empty(tokens, 8, 64), empty(tokens, 2, 64), empty(tokens, 32), empty(tokens, 32))
    torch.autograd.backward([q, k], [torch.empty_like(q), torch.empty_like(k)])
    gated_mlp_triton(empty(tokens, 11008), empty(tokens, 11008), "silu").sum().backward()
    for classes in (32000, 50257):
        labels = torch.empty(tokens, dtype=torch.int64, device="meta")
        linear_cross_entropy_triton(x, empty(classes, 4096), labels).backward()

def kinds(*counts):
    found = set()
    for tokens in counts:
        with launch.recording(90) as launches:
            step(tokens)
        for one in launches:
            kind = one.kernel.__module__, one.kernel.__name__, one.signature, one.constants, one.divisible
            found.add(repr(kind))
    return found

usual = kinds(1000)
print(json.dumps([len(usual), sorted(kinds(1, 16, 33, 8192) - usual)]))
"""


def test_another_count_of_tokens_takes_the_kernels_that_are_compiled():
    """Triton would compile one more for a count of 1 and one for a multiple of 16, in the middle of a run."""
    command, environment = [sys.executable, "-c", COUNTS], {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    usual, more = json.loads(done.stdout)
    assert usual > 10 and not more


def test_every_kernel_of_every_file_is_compiled():
    """A file with kernels has its specimens, so a new kernel cannot stay outside of this check."""
    with_kernels = {
        path.stem for path in ROOT.glob("kernels/*.py") if "@jit" in path.read_text(encoding="utf-8")
    }
    assert with_kernels - {"launch"} == set(OPERATIONS)
