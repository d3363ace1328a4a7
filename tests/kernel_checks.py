"""The error rule for kernels, and where they run: on the GPU if there is one, else in Triton's interpreter.

The rule: the error against fp64 is at most twice that of the plain reference in the same dtype, plus 1e-6 of
the size.
"""

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# the interpreter's bf16 product is wrong, so bf16 is tested on a GPU only
DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if DEVICE == "cuda" else [])


def random(*shape, seed=0, scale=1.0):
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed + 7 * len(shape))) * scale).to(
        DEVICE
    )


def evaluate(function, inputs, dtype, trained):
    """[results, gradients of the trained inputs] in this dtype; integers stay. The loss weighs every output
    apart.

    inputs: what function takes, in order; trained: places of those to differentiate for. Integer tensors,
    None and numbers pass through. function gives one tensor or several.
    """
    cast = [x.to(dtype) if torch.is_tensor(x) and x.is_floating_point() else x for x in inputs]
    leaves = [cast[i].detach().requires_grad_(True) for i in trained]
    for i, leaf in zip(trained, leaves):
        cast[i] = leaf
    results = function(*cast)
    results = (results,) if torch.is_tensor(results) else tuple(results)
    # of few bits, so that they are the same numbers in every dtype and no error of theirs is allowed to the
    # kernels
    weights = [random(*result.shape, seed=99 + i).bfloat16().to(result) for i, result in enumerate(results)]
    total = sum((result * weight).sum() for result, weight in zip(results, weights))
    gradients = torch.autograd.grad(total, leaves) if leaves else ()
    return [result.detach() for result in results] + list(gradients)


def relative_error(found, exact):
    return ((found.double() - exact).norm() / exact.norm().clamp_min(1e-12)).item()


def assert_as_exact_as(kernel, reference, inputs, dtype, trained, oracle=None):
    """The rule above. inputs are rounded to dtype first, so that only the arithmetic is judged."""
    inputs = [x.to(dtype) if torch.is_tensor(x) and x.is_floating_point() else x for x in inputs]
    exact = evaluate(oracle or reference, inputs, torch.float64, trained)
    plain = evaluate(reference, inputs, dtype, trained)
    found = evaluate(kernel, inputs, dtype, trained)
    for place, (one, other, truth) in enumerate(zip(found, plain, exact, strict=True)):
        assert one.shape == truth.shape and one.dtype == other.dtype
        error, allowed = relative_error(one, truth), 2 * relative_error(other, truth) + 1e-6
        assert error <= allowed, (
            f"result {place} (values, then gradients): error {error:.2e}, allowed {allowed:.2e}"
        )
