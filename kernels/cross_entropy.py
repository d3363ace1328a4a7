"""Language-model loss without the logits: sum over rows of logsumexp(h W^T + b) - (h W^T + b)[label].

The head's product, the softmax and the gradient are taken chunk by chunk in the forward pass, so at most
CHUNK_BYTES of logits exist at a time, whatever L and V are. The gradient with respect to the hidden rows is kept
(L, E); the one for the head only if the head is trained. Idea: arXiv 2411.09009 and Liger-Kernel's chunked loss.
"""

import torch

from kernels.linear import matmul_transposed

CHUNK_BYTES = 32 * 2**20  # of fp32 logits: large enough for full-rate products, small beside any model


def linear_cross_entropy_reference(hidden, weight, labels, bias=None) -> torch.Tensor:
    """Sum of the cross entropies, the plain way. Shapes as linear_cross_entropy; the test oracle."""
    logits = (hidden @ weight.to(hidden.dtype).T).float()
    if bias is not None:
        logits = logits + bias.float()
    return torch.nn.functional.cross_entropy(logits, labels, reduction="sum")


def linear_cross_entropy(hidden, weight, labels, bias=None) -> torch.Tensor:
    """Sum over the L rows of the cross entropy in nats.

    hidden (L, E) compute dtype; weight (V, E); labels (L,) int64 in 0..V-1; bias (V,) or None -> () fp32.
    L may be 0: the loss is 0 and every gradient exists. Gradients: hidden, weight, bias, each only if it is asked for.
    """
    return _LinearCrossEntropy.apply(hidden, weight, labels, bias)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, labels, bias):
        need_hidden, need_weight, _, need_bias = ctx.needs_input_grad
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        grad_weight = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device) if need_weight else None
        grad_bias = torch.zeros(bias.shape, dtype=torch.float32, device=bias.device) if need_bias else None
        narrow = weight.to(hidden.dtype)
        step = max(1, CHUNK_BYTES // (4 * weight.shape[0]))  # rows
        for start in range(0, hidden.shape[0], step):
            rows = hidden[start : start + step]
            target = labels[start : start + step, None]
            logits = matmul_transposed(rows, narrow).float()  # (rows, V); fp32: bf16 would lose the softmax tail
            if bias is not None:
                logits += bias
            best, chosen = logits.amax(1, keepdim=True), logits.gather(1, target)
            probability = torch.softmax(logits, 1, out=logits)  # in the logits' own memory: fresh pages cost more
            # log(sum of exp) = best - log(largest probability); in this order a loss near 0 keeps its digits
            total += (best - chosen - probability.amax(1, keepdim=True).log()).sum()
            if not (need_hidden or need_weight or need_bias):
                continue
            grad = probability.scatter_add_(1, target, torch.full_like(target, -1, dtype=probability.dtype))
            if need_bias:
                grad_bias += grad.sum(0)
            grad = grad.to(hidden.dtype)
            if need_hidden:
                grad_hidden[start : start + step] = matmul_transposed(grad, narrow.T)
            if need_weight:
                grad_weight += matmul_transposed(grad.T, rows.T)
        ctx.save_for_backward(grad_hidden, grad_weight, grad_bias)
        ctx.weight_dtype = weight.dtype
        return total

    @staticmethod
    def backward(ctx, grad_total):
        grad_hidden, grad_weight, grad_bias = ctx.saved_tensors

        def scaled(grad):
            # computed in fp32: with fp16 loss scaling grad_total may be 2^16
            return None if grad is None else (grad * grad_total).to(grad.dtype)

        if grad_weight is not None:
            grad_weight = scaled(grad_weight).to(ctx.weight_dtype)
        return scaled(grad_hidden), grad_weight, None, scaled(grad_bias)
