import torch

from kernels.layer_norm import layer_norm_triton
from kernels.rms_norm import add_rms_norm_triton, rms_norm_triton

MATRIX: set[str] = set()


def specimens(dtype):
    def empty(*shape, trained=True):
        return torch.empty(*shape, dtype=dtype, device="meta", requires_grad=trained)

    def rms(rows, size, trained):
        y = rms_norm_triton(empty(rows, size), empty(size, trained=trained), 1e-5)
        y.backward(torch.empty_like(y))

    def add(rows, size, trained):
        x, delta = empty(rows, size), empty(rows, size)
        y, total = add_rms_norm_triton(x, delta, empty(size, trained=trained), 1e-5)
        torch.autograd.backward([y, total], [torch.empty_like(y), torch.empty_like(total)])

    def stream():
        """fp32 with fp16 products: what model.py does under fp16."""
        x, delta = empty(8192, 4096).float(), empty(8192, 4096)
        y, total = add_rms_norm_triton(x, delta, empty(4096, trained=False).float(), 1e-5, dtype=dtype)
        torch.autograd.backward([y, total], [torch.empty_like(y), torch.empty_like(total)])

    def layer(rows, size, trained):
        y = layer_norm_triton(
            empty(rows, size), empty(size, trained=trained), empty(size, trained=trained), 1e-5
        )
        y.backward(torch.empty_like(y))

    def heads():
        """Qwen3: q of a fused product, normalised per head."""
        q = empty(8192, 48, 128)[:, :32]
        y = rms_norm_triton(q, empty(128), 1e-6)
        y.backward(torch.empty_like(y))

    yield "heads", heads
    yield "add to a stream in fp32", stream
    for trained in (False, True):
        yield f"rms 8192x4096, trained {trained}", lambda trained=trained: rms(8192, 4096, trained)
        for size in (4096, 8192, 32768):
            call = lambda size=size, trained=trained: add(8192, size, trained)  # noqa: E731
            yield f"add 8192x{size}, trained {trained}", call
        yield f"layer 8192x4096, trained {trained}", lambda trained=trained: layer(8192, 4096, trained)
    yield "add 8192x16384, frozen", lambda: add(8192, 16384, False)
    yield "add 1000x577, trained", lambda: add(1000, 577, True)
    yield "layer 100x65536, trained", lambda: layer(100, 65536, True)
