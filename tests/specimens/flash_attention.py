import torch

from kernels.flash_attention import flash_attention_triton

MATRIX = {"_forward_kernel", "_keys_kernel", "_queries_kernel"}
# wgmma takes 64 rows of keys, whose two accumulators of 256 columns do not fit the registers
WITHOUT_WGMMA = {("gemma-2b", "_keys_kernel")}
# name -> query heads, key/value heads, head size, tokens, segments, then options: every switch once at head
# size 128 (Gemma 2 has 256), every other head size plain
SPECIMENS = {
    "llama-2-7b": (32, 32, 128, 8192, 4, {}),
    "mistral-7b": (32, 8, 128, 16384, 1, {"window": 4096}),
    "phi-2": (32, 32, 80, 8192, 4, {}),
    "gemma-2b": (8, 1, 256, 8192, 4, {}),
    "gemma-2-9b-cap": (16, 8, 128, 8192, 2, {"window": 4096, "softcap": 50.0}),
    "bloom-7b": (32, 32, 128, 8192, 4, {"alibi": True}),
    "encoder": (12, 12, 64, 8192, 16, {"causal": False}),
    "smollm2-135m": (9, 3, 64, 4096, 7, {}),
}


def specimens(dtype):
    for name, (heads, kv_heads, size, tokens, segments, options) in SPECIMENS.items():

        def call(
            heads=heads, kv_heads=kv_heads, size=size, tokens=tokens, segments=segments, options=options
        ):
            q, k, v = (
                torch.empty(tokens, number, size, dtype=dtype, device="meta", requires_grad=True)
                for number in (heads, kv_heads, kv_heads)
            )
            borders = torch.empty(segments + 1, dtype=torch.int32, device="meta")
            options = dict(options)
            window = options.pop("window", None)
            if options.pop("alibi", False):
                options["alibi_slopes"] = torch.empty(heads, device="meta")
            longest = -(-tokens // segments)
            out = flash_attention_triton(q, k, v, borders, longest, window, size**-0.5, **options)
            out.backward(torch.empty_like(out))

        yield name, call
