"""Linears with adapters and one input together: equal to one after the other, x saved once, W dequantised
again."""

import copy
import importlib

import pytest
import torch
from kernel_checks import DEVICE, assert_as_exact_as, evaluate, random, relative_error
from test_lora import Packed, decoder, randomize, run
from torch import nn

import kernels
import lora
from architectures.layers import Linear
from kernels.linear import Part
from kernels.lora_linear import lora_linears_reference
from lora import LoraLinear, LoraOptions

lora_linear = importlib.import_module("kernels.lora_linear")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
not_reference = pytest.mark.skipif("reference" in kernels.choices(DEVICE), reason="KERNELS=reference")
IN, SHAPES = 60, [(77, 5), (24, 3), (24, None), (48, 16)]  # (outputs, rank); None: no adapter


@pytest.fixture(params=[False, True])
def branch_first(request, monkeypatch):
    """The order of products on a CPU and that on a GPU."""
    monkeypatch.setattr(lora_linear, "_branch_first", lambda device: request.param)


def operands(rows):
    """x, then weight, bias, lora_a, lora_b of every part."""
    found = [random(rows, IN)]
    for seed, (outputs, rank) in enumerate(SHAPES):
        found += [random(outputs, IN, seed=seed, scale=0.3), random(outputs, seed=seed) if seed % 2 else None]
        adapter = (
            [None, None] if rank is None else [random(rank, IN, seed=seed), random(outputs, rank, seed=seed)]
        )
        found += [one if one is None else one * 0.3 for one in adapter]
    return found


def flat(function):
    """A function of the list that `operands` gives."""

    def call(x, *tensors):
        scales = (1.7, 0.5, 0.0, 2.0)
        return function(x, [Part(*tensors[4 * i : 4 * i + 4], scale) for i, scale in enumerate(scales)])

    return call


TRAINED = [0, *(4 * place + offset for place, (_, rank) in enumerate(SHAPES) if rank for offset in (3, 4))]


@pytest.mark.parametrize("rank", [1, 5, 8, 12])
def test_a_gpu_multiplies_ranks_of_whole_16_bytes(rank, monkeypatch):
    """Others are filled with zeros: the same sums, gradients of the rank's own size. Not on a CPU."""
    part = Part(random(24, IN), None, random(rank, IN, seed=1), random(24, rank, seed=2), 0.5)
    assert lora_linear._aligned(part, torch.device("cpu")) is part
    monkeypatch.setattr(lora_linear, "_branch_first", lambda device: True)
    wide = lora_linear._aligned(part, torch.device("cpu"))
    assert wide.lora_a.shape[0] == wide.lora_b.shape[1] == -(-rank // 8) * 8
    assert torch.equal(wide.lora_b @ wide.lora_a, part.lora_b @ part.lora_a)
    lora_a, lora_b = part.lora_a.requires_grad_(True), part.lora_b.requires_grad_(True)
    (result,) = lora_linear.lora_linears(random(9, IN, seed=3), [part])
    result.square().sum().backward()
    assert lora_a.grad.shape == lora_a.shape and lora_b.grad.shape == lora_b.shape


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 20, 123])  # in fp32: no part merged, some, all
@pytest.mark.parametrize("trained", [TRAINED, TRAINED[1:]], ids=["x too", "first layer"])
def test_together_equals_the_reference(rows, dtype, trained, branch_first):
    together, reference = flat(kernels.linears), flat(lora_linears_reference)
    assert_as_exact_as(together, reference, operands(rows), dtype, trained)


def test_all_three_orders_are_taken(monkeypatch):
    """What the rows of the test above are chosen for."""
    taken = []
    merged = lora_linear._merged
    monkeypatch.setattr(lora_linear, "_merged", lambda *a: taken.append(merged(*a)) or taken[-1])
    for rows in (1, 20, 123):
        flat(lora_linear.lora_linears)(*operands(rows))
    wanted = [False] * 4 + [False, True, False, False] + [True, True, False, True]  # the third has no adapter
    assert taken == (wanted if DEVICE == "cpu" else [False] * 12)


def test_no_rows(branch_first):
    tensors = [x if x is None else x.requires_grad_(True) for x in operands(0)]
    results = flat(kernels.linears)(*tensors)
    assert [tuple(result.shape) for result in results] == [(0, outputs) for outputs, _ in SHAPES]
    sum(result.sum() for result in results).backward()
    assert all(tensors[place].grad.eq(0).all() for place in TRAINED)


def test_fp32_adapters_beside_a_bf16_base_get_fp32_gradients(branch_first):
    tensors = [x if x is None else x.bfloat16() for x in operands(31)]
    for place in TRAINED[1:]:
        tensors[place] = tensors[place].float().requires_grad_(True)
    results = flat(kernels.linears)(*tensors)
    assert all(result.dtype is torch.bfloat16 for result in results)
    sum(result.float().square().sum() for result in results).backward()
    assert all(tensors[place].grad.dtype is torch.float32 for place in TRAINED[1:])


def saved_bytes(function):
    """(storages that function saves for its backward pass, {pointer: bytes}; how often each was saved,
    result)."""
    seen, counts = {}, {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        seen[storage.data_ptr()] = storage.nbytes()
        counts[storage.data_ptr()] = counts.get(storage.data_ptr(), 0) + 1
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = function()
    return seen, counts, result


@not_reference
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_x_is_saved_once_for_q_k_and_v_and_nothing_else_of_its_size(dtype):
    """Beside x: the weights that exist anyway, and (T, R) numbers. Separately, x is saved three times."""
    torch.manual_seed(0)
    layers = [LoraLinear(Linear(IN, size, dtype=dtype), 4, 8.0).to(DEVICE) for size in (80, 40, 40)]
    for layer in layers:
        layer.base.requires_grad_(False)
    x = random(123, IN).to(dtype).requires_grad_(True)
    fixed = {p.untyped_storage().data_ptr() for layer in layers for p in layer.parameters()}
    own = x.untyped_storage().data_ptr()
    seen, counts, _ = saved_bytes(lambda: kernels.linears(x, [layer.part() for layer in layers]))
    assert counts[own] == 1
    rest = sum(size for pointer, size in seen.items() if pointer not in fixed and pointer != own)
    assert rest <= 123 * 3 * 4 * x.element_size()  # x A^T of three adapters of rank 4
    _, counts, _ = saved_bytes(lambda: [layer(x) for layer in layers])
    assert counts[own] == 3


@not_reference
@pytest.mark.parametrize("rows", [1, 123])  # both orders of the product
def test_a_frozen_a_costs_no_gradient_and_x_is_not_kept(rows):
    """LoRA-FA: only B trains, and its gradient needs x A^T alone."""
    layers = [LoraLinear(Linear(IN, size).requires_grad_(False), 4, 8.0).to(DEVICE) for size in (80, 40)]
    net, x = nn.ModuleList(layers), random(rows, IN).requires_grad_(True)
    randomize(net)
    weights = [random(rows, layer.out_features, seed=3) for layer in layers]

    def gradients():
        seen, _, results = saved_bytes(lambda: kernels.linears(x, [layer.part() for layer in layers]))
        total = sum((result * weight).sum() for result, weight in zip(results, weights))
        trained = [x, *(layer.lora_b for layer in layers)]
        return x.untyped_storage().data_ptr() in seen, torch.autograd.grad(total, trained)

    kept, expected = gradients()
    for layer in layers:
        layer.lora_a.requires_grad_(False)
    kept_frozen, found = gradients()
    assert kept and not kept_frozen
    for one, other in zip(found, expected):
        torch.testing.assert_close(one, other)


class Counted(Packed):
    def dequantize(self, dtype=None, out=None):
        self.calls = getattr(self, "calls", 0) + 1
        return super().dequantize(dtype, out)


def frozen(kind, **settings):
    """Three linears with one input. kind: what is special about the second."""
    torch.manual_seed(5)
    linears = [Linear(17, size, bias=size != 12).requires_grad_(False) for size in (23, 12, 9)]
    layers = [LoraLinear(linear, 3, 6.0, **settings) for linear in linears]
    if kind == "rank":
        layers[1] = LoraLinear(linears[1], 7, 6.0, rslora=True)
    elif kind == "no adapter":
        layers[1] = linears[1]
    elif kind == "trained":
        layers[1] = linears[1].requires_grad_(True)
    elif kind == "trained base":
        linears[1].requires_grad_(True)
    elif kind == "bf16 adapter":
        layers[1] = LoraLinear(linears[1], 3, 6.0, dtype=torch.bfloat16)
    elif kind == "quantised":
        layers[1] = LoraLinear(Counted(linears[1]).requires_grad_(False), 3, 6.0)
    elif kind == "DoRA":
        layers[1] = LoraLinear(linears[1], 3, 6.0, dora=True)
    elif kind == "dropout":
        layers[1] = LoraLinear(linears[1], 3, 6.0, dropout_probability=0.4)
    net = nn.ModuleList(layers).to(DEVICE)
    randomize(net)
    layers[1].off = kind == "off"
    return net


ALONE = {"trained", "trained base", "DoRA", "dropout"}
KINDS = ["usual", "rank", "no adapter", "bf16 adapter", "quantised", "off", *sorted(ALONE)]


@pytest.mark.parametrize("rows", [1, 31])
@pytest.mark.parametrize("kind", KINDS)
def test_together_equals_one_after_the_other(kind, rows, monkeypatch):
    net, groups = frozen(kind), []
    chosen = kernels._lora_linears
    monkeypatch.setattr(
        kernels, "_lora_linears", lambda x, parts: groups.append(len(parts)) or chosen(x, parts)
    )
    trained = [p for p in net.parameters() if p.requires_grad]

    def outcome(function):
        torch.manual_seed(1)  # of the dropout
        x = random(rows, 17, seed=2).requires_grad_(True)
        results = function(x)
        weights = [random(*result.shape, seed=9 + i) for i, result in enumerate(results)]
        total = sum((result * weight).sum() for result, weight in zip(results, weights))
        return [*results, *torch.autograd.grad(total, [x, *trained], allow_unused=True)]

    expected = outcome(lambda x: [layer(x) for layer in net])
    groups.clear()
    found = outcome(lambda x: kernels.linears(x, [layer.part() for layer in net]))
    if "reference" not in kernels.choices(DEVICE):
        assert groups[0] == (2 if kind in ALONE else 3)
    for one, other in zip(found, expected, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            assert one.dtype is other.dtype
            tolerance = 1e-2 if one.dtype is torch.bfloat16 else 1e-5
            torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


@not_reference
def test_a_quantised_weight_is_made_again_in_the_backward_pass_and_not_kept():
    net = frozen("quantised")
    base = net[1].base
    x = random(31, 17).requires_grad_(True)
    seen, _, results = saved_bytes(lambda: kernels.linears(x, [layer.part() for layer in net]))
    assert base.calls == 1
    assert 4 * 12 * 17 not in {seen[pointer] for pointer in seen if pointer not in pointers(net)}
    sum(result.sum() for result in results).backward()
    assert base.calls == 2
    with torch.no_grad():  # the base's own forward pass, whatever it does
        net[1](x)
    assert base.calls == 3


def test_the_reference_trains_several_quantised_linears():
    """Autograd keeps their dense weights: they must not be the buffer that the next one is written to."""
    first, second = (Packed(nn.Linear(40, 40, bias=False)).to(DEVICE) for _ in range(2))

    def chain(one, other):
        x = random(7, 40).requires_grad_(True)
        function = lora_linears_reference
        function(function(x, [Part(one)])[0], [Part(other)])[0].square().sum().backward()
        return x.grad

    assert torch.equal(chain(first, second), chain(first.dequantize(), second.dequantize()))


def pointers(net):
    tensors = [*net.parameters(), *net.buffers()]
    return {tensor.untyped_storage().data_ptr() for tensor in tensors}


def test_a_quantised_base_gets_the_gradients_of_its_dense_twin():
    """As exact as the reference on the dequantised weight, in each dtype."""
    packed = Packed(nn.Linear(60, 77)).to(DEVICE)
    bias = packed.bias.detach()
    for dtype in DTYPES:
        inputs = [random(31, 60), random(5, 60, seed=3, scale=0.3), random(77, 5, seed=4, scale=0.3)]
        inputs = [x.to(dtype) for x in inputs]

        def function(x, a, b, kernel):
            return kernel(x, [Part(packed, bias, a, b, 1.7)])[0]

        def kernel(*values):
            return function(*values, kernels.linears)

        def reference(*values):
            return function(*values, lora_linears_reference)

        exact = evaluate(reference, inputs, torch.float64, (0, 1, 2))
        plain = evaluate(reference, inputs, dtype, (0, 1, 2))
        for one, other, truth in zip(evaluate(kernel, inputs, dtype, (0, 1, 2)), plain, exact, strict=True):
            assert relative_error(one, truth) <= 2 * relative_error(other, truth) + 1e-6


@pytest.mark.parametrize(
    "options", [{}, {"use_dora": True}, {"lora_target": ("q_proj", "v_proj", "up_proj")}]
)
def test_the_decoder_takes_them_together_and_nothing_else_changes(options, monkeypatch):
    net = decoder().to(DEVICE)
    lora.add_lora(net, LoraOptions(lora_rank=3, **options), torch.Generator().manual_seed(1))
    randomize(net)
    separate, sizes = copy.deepcopy(net), []
    together = kernels.linears
    monkeypatch.setattr(kernels, "linears", lambda x, parts: sizes.append(len(parts)) or together(x, parts))
    run(net).square().sum().backward()
    assert [size for size in sizes if size > 1] == [3, 2] * 3  # q k v and gate up of three layers
    monkeypatch.setattr(
        kernels,
        "linears",
        lambda x, parts: [part.layer(x) for part in parts] if len(parts) > 1 else together(x, parts),
    )
    run(separate).square().sum().backward()
    # The same sums in another order, in fp32: dx of q, k and v in one buffer. Three layers amplify that to
    # 3e-4 of a gradient's length, which is also what separates either way from fp64. How much shows depends
    # on the processor's products: 1e-5 for each number held with AVX-512 and not with AVX2. One part's term
    # scaled by 1 % is 8e-3.
    for one, other in zip(net.parameters(), separate.parameters()):
        if one.requires_grad:
            assert relative_error(one.grad, other.grad) <= 1e-3
