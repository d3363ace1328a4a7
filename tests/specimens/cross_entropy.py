import torch

from kernels.cross_entropy import cross_entropy_triton, linear_cross_entropy_triton, linear_logprobs_triton

MATRIX: set[str] = set()


def specimens(dtype):
    def linear(operation, vocabulary, biased=False, **terms):
        hidden = torch.empty(3000, 4096, dtype=dtype, device="meta", requires_grad=True)
        weight = torch.empty(vocabulary, 4096, dtype=dtype, device="meta")
        bias = torch.empty(vocabulary, dtype=dtype, device="meta") if biased else None
        result = operation(hidden, weight, torch.empty(3000, dtype=torch.int64, device="meta"), bias, **terms)
        result.backward(torch.empty_like(result))

    every_term = {"softcap": 30.0, "logit_scale": 0.5, "label_smoothing": 0.1, "z_loss": 1e-4}
    for vocabulary in (32000, 128256, 50257, 577):
        yield f"linear {vocabulary}", lambda v=vocabulary: linear(linear_cross_entropy_triton, v)
        yield (
            f"every term {vocabulary}",
            lambda v=vocabulary: linear(linear_cross_entropy_triton, v, **every_term),
        )
        yield f"logprobs {vocabulary}", lambda v=vocabulary: linear(linear_logprobs_triton, v, softcap=30.0)
    for vocabulary in (32000, 50257):
        yield (
            f"bias {vocabulary}",
            lambda v=vocabulary: linear(linear_cross_entropy_triton, v, True, **every_term),
        )

    def plain(columns, narrow):
        logits = torch.empty(8192, columns, dtype=narrow, device="meta", requires_grad=True)
        cross_entropy_triton(logits, torch.empty(8192, dtype=torch.int64, device="meta")).backward()

    yield "plain", lambda: plain(32000, dtype)
    yield "plain fp32", lambda: plain(32000, torch.float32)
    yield "plain odd", lambda: plain(50257, dtype)
