import torch

from kernels.rope import rope_triton

MATRIX: set[str] = set()
SIZES = [  # heads of q and of k, head size, rotary size, interleaved
    (32, 32, 128, 128, False),  # Llama-2-7B
    (9, 3, 64, 64, False),  # SmolLM2-135M
    (32, 32, 80, 32, False),  # Phi-2: a part of 80
    (32, 2, 128, 64, True),  # ChatGLM3: a part, interleaved
]


def specimens(dtype):
    for heads, kv_heads, size, rotary, interleaved in SIZES:

        def call(heads=heads, kv_heads=kv_heads, size=size, rotary=rotary, interleaved=interleaved):
            fused = torch.empty(
                8192, heads + 2 * kv_heads, size, dtype=dtype, device="meta", requires_grad=True
            )
            q, k, _ = fused.split([heads, kv_heads, kv_heads], dim=1)
            angles = torch.empty(2, 8192, rotary // 2, dtype=dtype, device="meta")
            turned_q, turned_k = rope_triton(q, k, *angles, interleaved)
            torch.autograd.grad(
                [turned_q, turned_k], fused, [torch.empty_like(turned_q), torch.empty_like(turned_k)]
            )

        yield f"{heads}+{kv_heads} heads of {size}, {rotary} turned, interleaved {interleaved}", call
