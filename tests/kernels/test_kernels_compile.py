"""Every Triton kernel compiles for A100, RTX 40 and H100 at the block sizes its launcher chooses; no GPU is
needed.

Shared memory fits, registers are not spilled, and kernels that multiply matrices use the matrix instructions.
"""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).resolve().parents[2]
OPERATIONS = sorted(path.stem for path in ROOT.glob("tests/specimens/*.py") if path.stem != "__init__")
SHARED_BYTES = {
    80: 163 * 1024,
    89: 99 * 1024,
    90: 227 * 1024,
}  # CUDA programming guide, table of capabilities
SPILLED_BYTES = {80: 0, 89: 64, 90: 0}  # 8.9 takes the A100's blocks, and its ptxas a register or two more
INSTRUCTION = {80: "mma", 89: "mma", 90: "wgmma"}


@pytest.mark.parametrize("capability", [80, 89, 90])
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


def test_every_kernel_of_every_file_is_compiled():
    """A file with kernels has its specimens, so a new kernel cannot stay outside of this check."""
    with_kernels = {
        path.stem for path in ROOT.glob("kernels/*.py") if "@jit" in path.read_text(encoding="utf-8")
    }
    assert with_kernels - {"launch"} == set(OPERATIONS)
