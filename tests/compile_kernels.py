"""Compile the Triton kernels of one file for one GPU generation, on a machine without a GPU.

    python tests/compile_kernels.py rms_norm 90     # prints one JSON object per compiled kernel

What is compiled is what the launchers start at the sizes in tests/specimens: their block sizes, warps and
stages. A process of its own, because TRITON_INTERPRET must be off when the kernels are declared.
"""

import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "0"
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # Triton's default up to 3.9, which warns about it
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch  # noqa: E402
import triton  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from kernels import launch  # noqa: E402

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


def compile_launch(recorded: launch.Launch, capability: int) -> dict:
    """Compile one launch; what it takes of the GPU: bytes of shared memory, registers, bytes spilled,
    instructions."""
    attributes = {(place,): [["tt.divisibility", 16]] for place in recorded.divisible}
    source = ASTSource(recorded.kernel, recorded.signature, recorded.constants, attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=recorded.options)
    ptx = compiled.asm["ptx"]
    ptx = ptx if isinstance(ptx, str) else ptx.decode()
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [CUOBJDUMP, "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    numbers = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
    return {
        "kernel": recorded.kernel.__name__,
        "capability": capability,
        "constants": {name: value for name, value in recorded.constants.items() if isinstance(value, int)},
        **recorded.options,
        "shared_bytes": compiled.metadata.shared,
        "registers": numbers["REG"],
        "spilled_bytes": numbers["STACK"] + numbers["LOCAL"],
        "matrix_instruction": "wgmma" if "wgmma" in ptx else "mma" if "mma.sync" in ptx else None,
    }


def main(operation: str, capability: int, dtype: torch.dtype = torch.bfloat16) -> None:
    module = importlib.import_module(f"tests.specimens.{operation}")
    seen = set()
    for name, call in module.specimens(dtype):
        with launch.recording(capability) as launches:
            call()
        for recorded in launches:
            key = repr((recorded.kernel.__name__, recorded.signature, recorded.constants, recorded.divisible))
            if key not in seen:
                seen.add(key)
                print(json.dumps({"specimen": name, **compile_launch(recorded, capability)}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
