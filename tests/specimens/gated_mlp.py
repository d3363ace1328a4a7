import torch

from kernels.gated_mlp import ACTIVATIONS, gated_mlp_triton

MATRIX: set[str] = set()


def specimens(dtype):
    def call(activation, fused):
        both = torch.empty(2, 8192, 11008, dtype=dtype, device="meta", requires_grad=True)  # Llama-2-7B
        gate, up = both.view(8192, -1).chunk(2, dim=1) if fused else both.unbind(0)
        result = gated_mlp_triton(gate, up, activation)
        result.backward(torch.empty_like(result))

    for activation in ACTIVATIONS:
        yield activation, lambda activation=activation: call(activation, False)
    yield "halves of one product", lambda: call("silu", True)
