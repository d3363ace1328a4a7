"""quant/gptq_solver.py against optimal brain surgery one column at a time in float64, and against plain
rounding."""

import dataclasses

import pytest
import torch

from quant.gptq_solver import GPTQOptions, Hessian, Integers, inverse_root, solve

GENERATOR = torch.Generator()


def inputs_and_weight(tokens: int, inputs: int, outputs: int, seed: int = 0):
    """Correlated activations of very different sizes, and a weight with some outliers; float64."""
    GENERATOR.manual_seed(seed)
    mixing = torch.randn(inputs, inputs, generator=GENERATOR, dtype=torch.float64) / inputs**0.5
    sizes = torch.rand(inputs, generator=GENERATOR, dtype=torch.float64) * 3 + 0.01
    x = (
        torch.randn(tokens, inputs, generator=GENERATOR, dtype=torch.float64)
        @ (mixing + torch.eye(inputs))
        * sizes
    )
    weight = torch.randn(outputs, inputs, generator=GENERATOR, dtype=torch.float64) * 0.05
    weight[0, ::5] *= 6
    return x, weight


def hessian_of(x: torch.Tensor, parts: int = 1) -> Hessian:
    hessian = Hessian(x.shape[1], dtype=x.dtype)
    for part in x.tensor_split(parts):
        hessian.add(part)
    return hessian


def grid_of(group: torch.Tensor, options: GPTQOptions):
    """The grid of a row's group (n,), from its definition: scale as fp16, zero."""
    most = 2**options.bits - 1
    low, high = min(0.0, group.min().item()), max(0.0, group.max().item())
    if options.symmetric:
        return torch.tensor(2 * max(-low, high) / most).half().double().item(), 2 ** (options.bits - 1)
    scale = torch.tensor(max((high - low) / most, high / (most - 1))).half().double().item()
    return scale, min(max(round(-low / scale), 1), most)


def slow_oracle(weight: torch.Tensor, x: torch.Tensor, options: GPTQOptions):
    """Row by row, column by column, with the inverse Hessian of what remains by Gaussian elimination (the
    paper's eq. 2 and 3): no Cholesky factor, no blocks."""
    hessian = x.T @ x / x.shape[0]
    order = list(range(weight.shape[1]))
    if options.act_order:
        order = hessian.diagonal().argsort(descending=True, stable=True).tolist()
    hessian = hessian[order][:, order]
    hessian += options.damping * hessian.diagonal().mean() * torch.eye(len(order), dtype=torch.float64)
    size = len(order) if options.group_size == -1 else options.group_size
    values = torch.empty_like(weight)
    for o in range(weight.shape[0]):
        row, inverse = weight[o, order].clone(), torch.linalg.inv(hessian)
        for i in range(len(order)):
            if i % size == 0:
                scale, zero = grid_of(row[i : i + size], options)
            code = min(max(round(row[i].item() / scale) + zero, 0), 2**options.bits - 1)
            values[o, order[i]] = scale * (code - zero)
            row[i + 1 :] -= (row[i] - scale * (code - zero)) / inverse[i, i] * inverse[i, i + 1 :]
            inverse -= torch.outer(inverse[:, i], inverse[i]) / inverse[i, i]
    return values


def values_of(integers: Integers) -> torch.Tensor:
    groups = integers.group_of.long()
    return integers.scales.double()[:, groups] * (
        integers.codes.double() - integers.zeros.double()[:, groups]
    )


def output_error(weight, values, x) -> float:
    return ((x @ (weight - values).T) ** 2).sum(1).mean().item()


CASES = {
    "plain": GPTQOptions(group_size=16, block=32),
    "blocks within groups": GPTQOptions(group_size=24, block=7),
    "groups within blocks": GPTQOptions(group_size=5, block=13),
    "one group": GPTQOptions(group_size=-1, block=10, bits=3),
    "last group short": GPTQOptions(group_size=32, block=128, bits=2),
    "8 bits": GPTQOptions(group_size=16, bits=8),
    "zero points": GPTQOptions(group_size=16, symmetric=False, bits=3),
    "act order": GPTQOptions(group_size=16, act_order=True, block=8),
    "all": GPTQOptions(group_size=11, act_order=True, symmetric=False, bits=2, damping=0.01, block=6),
}


@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
def test_equal_to_optimal_brain_surgery_one_column_at_a_time(options):
    x, weight = inputs_and_weight(301, 53, 7)
    integers = solve(weight, hessian_of(x, parts=3), options)
    torch.testing.assert_close(values_of(integers), slow_oracle(weight, x, options), rtol=0, atol=1e-12)
    assert integers.error == pytest.approx(output_error(weight, values_of(integers), x), rel=1e-9)
    assert integers.size == pytest.approx((x @ weight.T).square().sum(1).mean().item(), rel=1e-9)


def test_fp32_gives_nearly_the_same_codes():
    x, weight = inputs_and_weight(700, 129, 33, seed=1)
    options = GPTQOptions(group_size=32, block=48)
    exact = solve(weight, hessian_of(x), options)
    found = solve(weight.float(), hessian_of(x.float(), parts=5), options)
    assert (found.codes == exact.codes).double().mean() > 0.995
    assert found.error == pytest.approx(exact.error, rel=1e-2)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_better_than_rounding_each_weight(bits, symmetric):
    x, weight = inputs_and_weight(900, 96, 31, seed=bits)
    options = GPTQOptions(bits=bits, group_size=32, symmetric=symmetric)
    integers = solve(weight.float(), hessian_of(x.float()), options)
    rounded = torch.empty_like(weight)
    for o in range(weight.shape[0]):
        for start in range(0, 96, 32):
            scale, zero = grid_of(weight[o, start : start + 32].float(), options)
            codes = (weight[o, start : start + 32] / scale).round() + zero
            rounded[o, start : start + 32] = scale * (codes.clamp(0, 2**bits - 1) - zero)
    assert integers.rounded_error == pytest.approx(output_error(weight, rounded, x), rel=1e-3)
    assert integers.error < 0.8 * integers.rounded_error


def test_no_result_depends_on_the_block():
    x, weight = inputs_and_weight(200, 40, 9)
    found = [
        solve(weight, hessian_of(x), GPTQOptions(group_size=8, block=block)) for block in (1, 3, 16, 128)
    ]
    for other in found[1:]:
        assert torch.equal(values_of(other), values_of(found[0]))


def test_integers_are_what_a_file_can_hold():
    x, weight = inputs_and_weight(200, 40, 9)
    weight[2] = weight[2].abs() + 0.1  # no zero between smallest and largest
    weight[3] = 0
    weight[4] = 1e-9
    for options in (GPTQOptions(bits=3, group_size=16), GPTQOptions(bits=3, group_size=16, symmetric=False)):
        integers = solve(weight, hessian_of(x), options)
        assert integers.codes.max() <= 7 and integers.codes.dtype is torch.uint8
        assert integers.zeros.min() >= 1 and integers.zeros.max() <= 7  # files hold zeros - 1
        assert integers.scales.dtype is torch.float16 and integers.scales.min() > 0
        assert integers.scales.shape == integers.zeros.shape == (9, 3)
        assert integers.group_of.tolist() == [i // 16 for i in range(40)]
        assert not values_of(integers)[3].any()
        assert torch.isfinite(values_of(integers)).all()
        wrong = (values_of(integers)[2] - weight[2]).abs().max()
        assert wrong < weight[2].max()


def test_inputs_that_are_always_zero_are_rounded_to_nearest_and_pass_nothing_on():
    x, weight = inputs_and_weight(200, 40, 9)
    x[:, [0, 17, 39]] = 0
    options = GPTQOptions(bits=4, group_size=40)
    found = values_of(solve(weight, hessian_of(x), options))
    scale = solve(weight, hessian_of(x), options).scales.double()
    assert torch.equal(found[:, 0], ((weight[:, 0] / scale[:, 0]).round()).clamp(-8, 7) * scale[:, 0])
    assert torch.isfinite(found).all()
    integers = solve(weight, hessian_of(0 * x), options)  # nothing but such inputs
    assert ((values_of(integers) - weight).abs() <= 1.01 * integers.scales.double()).all()


def test_root_is_of_the_damped_inverse():
    x, _ = inputs_and_weight(100, 23, 1)
    matrix = hessian_of(x).matrix
    root = inverse_root(matrix, 0.05)
    damped = matrix + 0.05 * matrix.diagonal().mean() * torch.eye(23, dtype=torch.float64)
    torch.testing.assert_close(root.T @ root @ damped, torch.eye(23, dtype=torch.float64), atol=1e-9, rtol=0)
    assert torch.equal(root, root.triu())


def test_the_hessian_is_a_mean_in_fp32_of_inputs_in_any_dtype():
    x = inputs_and_weight(77, 19, 1)[0].bfloat16()
    hessian = Hessian(19)
    for part in x.split([1, 30, 46]):
        hessian.add(part)
    expected = x.double().T @ x.double() / 77
    assert hessian.matrix.dtype is torch.float32
    torch.testing.assert_close(hessian.matrix.double(), expected, rtol=1e-5, atol=1e-5)


def test_bad_numbers_are_refused():
    x, weight = inputs_and_weight(50, 16, 3)
    hessian, options = hessian_of(x), GPTQOptions(group_size=8)
    broken = weight.clone()
    broken[1, 2] = float("nan")
    with pytest.raises(ValueError, match="NaN or infinity"):
        solve(broken, hessian, options)
    with pytest.raises(ValueError, match="does not fit GPTQ"):
        solve(weight * 1e8, hessian, options)
    x[3, 3] = float("inf")
    with pytest.raises(ValueError, match="not finite"):
        hessian_of(x)
    few = hessian_of(inputs_and_weight(3, 16, 1)[0])  # of rank 3
    few.matrix -= 0.5 * torch.eye(16)
    with pytest.raises(ValueError, match="export_quantization_damp_percent"):
        solve(weight, few, dataclasses.replace(options, damping=1e-6))
