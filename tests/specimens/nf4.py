import torch

from kernels.linear import Part
from kernels.nf4 import Codes, dequantise_triton, small_batch_triton

MATRIX: set[str] = set()
SMALL_MATRIX = {"_some_rows_kernel"}  # up to 16 rows of x: too few for wgmma's side of 64 where it counts

# name: (inputs, outputs of the parts, rank, double quantisation, bias)
SHAPES = {
    "llama-2-7b, q/k/v": (4096, (4096, 4096, 4096), 0, True, False),
    "llama-2-7b, gate/up with adapters": (4096, (11008, 11008), 16, True, False),
    "llama-2-7b, down": (11008, (4096,), 0, False, False),
    "qwen2-7b, q/k/v with adapters": (3584, (3584, 512, 512), 64, True, True),
    "smollm2-135m, o": (576, (576,), 8, True, False),
}


def weight(outputs, inputs, double):
    kind = {"device": "meta"}
    blocks = outputs * inputs // 64
    codes, table = torch.empty(outputs * inputs // 2, dtype=torch.uint8, **kind), torch.empty(16, **kind)
    if not double:
        return Codes(codes, torch.empty(blocks, **kind), table)
    absmax = torch.empty(blocks, dtype=torch.uint8, **kind)
    nested = torch.empty(-(-blocks // 256), **kind), torch.empty(256, **kind), torch.empty((), **kind)
    return Codes(codes, absmax, table, *nested)


def specimens(dtype):
    def part(outputs, inputs, rank, double, bias):
        low = None, None
        if rank:
            low = torch.empty(rank, inputs, device="meta"), torch.empty(outputs, rank, device="meta")
        vector = torch.empty(outputs, dtype=dtype, device="meta") if bias else None
        return Part(weight(outputs, inputs, double), vector, *low, 0.5)

    for name, (inputs, sizes, rank, double, bias) in SHAPES.items():

        def call(rows, i=inputs, sizes=sizes, r=rank, d=double, b=bias):
            small_batch_triton(
                torch.empty(rows, i, dtype=dtype, device="meta"), [part(o, i, r, d, b) for o in sizes]
            )

        for rows in (1, 16):
            yield f"{name}, {rows} rows", lambda call=call, rows=rows: call(rows)
    for kind, double in ((torch.bfloat16, True), (torch.float16, False), (torch.float32, True)):
        result = torch.empty(4096, 11008, dtype=kind, device="meta")
        yield (
            f"{kind}",
            lambda double=double, result=result: dequantise_triton(weight(4096, 11008, double), result),
        )
