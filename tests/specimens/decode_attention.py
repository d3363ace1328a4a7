import torch

from kernels.decode_attention import cached_attention_triton, decode_attention_triton, store_triton

MATRIX: set[str] = set()
SMALL_MATRIX = {"_decode_kernel"}  # one token of one sequence is 16 rows; wgmma begins at 64

# name: (sequences, new tokens each, query heads, key/value heads, head size, capacity, window, soft cap,
# ALiBi)
SHAPES = {
    "llama-2-7b, one sequence": (1, 1, 32, 32, 128, 1024, None, None, False),
    "llama-3-8b, one sequence": (1, 1, 32, 8, 128, 8192, None, None, False),
    "llama-3-8b, 128 sequences": (128, 1, 32, 8, 128, 512, None, None, False),
    "llama-3-8b, 16 new tokens": (1, 16, 32, 8, 128, 8192, None, None, False),
    "mistral, window": (4, 1, 32, 8, 128, 8192, 4096, None, False),
    "gemma-2-9b, soft cap": (2, 4, 16, 8, 256, 4096, None, 50.0, False),
    "bloom, alibi": (1, 1, 32, 32, 80, 2048, None, None, True),
    "falcon-7b, 71 heads": (8, 1, 71, 1, 64, 2048, None, None, False),
}


def specimens(dtype):
    for name, (sequences, new, heads, kv_heads, size, capacity, window, softcap, alibi) in SHAPES.items():

        def call(
            n=sequences, new=new, h=heads, k=kv_heads, d=size, c=capacity, w=window, cap=softcap, alibi=alibi
        ):
            kind = {"dtype": dtype, "device": "meta"}
            q, keys = torch.empty(n * new, h, d, **kind), torch.empty(n, k, c, d, **kind)
            rows = torch.empty(n * new, k, d, **kind)
            borders = torch.empty(n + 1, dtype=torch.int32, device="meta")
            slopes = torch.empty(h, device="meta") if alibi else None
            store_triton(rows, rows, keys, keys, borders, borders[1:], new)
            decode_attention_triton(q, keys, keys, borders, borders[1:], new, w, 0.1, cap, slopes)

        yield name, call

    def second_turn(heads):
        kind = {"dtype": dtype, "device": "meta"}
        q, keys = torch.empty(300, heads, 128, **kind), torch.empty(1, 8, 8192, 128, **kind)
        cached_attention_triton(q, keys, keys, [0, 300], [5000], None, 0.1)

    yield "second turn, group of 4", lambda: second_turn(32)
    yield "second turn, group of 1", lambda: second_turn(8)
