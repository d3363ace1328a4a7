import torch

from kernels.rms_norm import rms_norm_triton

MATRIX: set[str] = set()


def specimens(dtype):
    for rows, size in ((8192, 4096), (8192 * 32, 128), (1000, 577), (1, 8192)):

        def call(rows=rows, size=size):
            x = torch.empty(rows, size, dtype=dtype, device="meta", requires_grad=True)
            weight = torch.empty(size, dtype=dtype, device="meta", requires_grad=True)
            y = rms_norm_triton(x, weight, 1e-5)
            y.backward(torch.empty_like(y))

        yield f"{rows}x{size}", call
