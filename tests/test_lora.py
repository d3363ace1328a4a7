"""Adapters against peft: forward, gradients, merging in fp32 and bf16; targets, freezing, their errors."""

import copy
import gc
import math

import pytest
import torch
from torch import nn

import lora
from architectures import config_from_hf
from checkpoints import trainable
from kernels.recompute import Plan
from lora import LoraLinear, LoraOptions
from model import Decoder, initialize_weights
from quant.linear import QuantLinear

KINDS = [
    {},
    {"use_rslora": True},
    {"use_dora": True},
    {"use_dora": True, "use_rslora": True, "lora_alpha": 3.0},
]


class Net(nn.Module):
    """Two linears with odd sizes, one with a bias; names as in a decoder."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.q_proj = nn.Linear(17, 23, dtype=dtype)
        self.o_proj = nn.Linear(23, 5, bias=False, dtype=dtype)

    def forward(self, x):
        return self.o_proj(torch.tanh(self.q_proj(x)))


class Packed(QuantLinear):
    """The simplest quantised linear: integers and one scale."""

    def __init__(self, linear: nn.Linear):
        bias = None if linear.bias is None else linear.bias.detach().clone()
        codes = (linear.weight.detach() * 64).round().to(torch.int8)
        super().__init__(None, tuple(codes.shape), bias, torch.float32, codes=codes)

    def fill(self, out):
        out.copy_(self.codes.float() / 64)


def decoder(tied: bool = False, layers: int = 3) -> Decoder:
    config = config_from_hf({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 97, "hidden_size": 24,
        "intermediate_size": 36, "num_hidden_layers": layers, "num_attention_heads": 3,
        "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 64, "rms_norm_eps": 1e-5,
        "rope_theta": 1e4, "tie_word_embeddings": tied, "hidden_act": "silu", "attention_bias": True,
    })  # fmt: skip
    model = Decoder(config)
    initialize_weights(model, torch.Generator().manual_seed(0))
    return model


def run(model: Decoder, tokens: int = 11) -> torch.Tensor:
    borders = torch.tensor([0, 4, tokens], dtype=torch.int32)
    positions = torch.cat([torch.arange(4), torch.arange(tokens - 4)]).int()
    ids = torch.randint(97, (tokens,), generator=torch.Generator().manual_seed(5))
    return model(ids, positions, borders, tokens - 4)


def randomize(model: nn.Module, seed: int = 3) -> None:
    """Adapters as they are after training: B not zero, magnitudes off the norm."""
    generator = torch.Generator().manual_seed(seed)
    for layer in lora.lora_layers(model).values():
        with torch.no_grad():
            layer.lora_b.copy_(0.2 * torch.randn(layer.lora_b.shape, generator=generator))
            if layer.magnitude is not None:
                layer.magnitude.mul_(1 + 0.3 * torch.rand(layer.magnitude.shape, generator=generator))


def peft_twin(net: nn.Module, options: LoraOptions, adapted: nn.Module):
    """peft's model over a copy of `net`, with the adapter weights of `adapted`."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=options.lora_rank,
        lora_alpha=options.alpha,
        lora_dropout=options.lora_dropout,
        target_modules=list(lora.lora_layers(adapted)),
        use_rslora=options.use_rslora,
        use_dora=options.use_dora,
    )
    twin = get_peft_model(copy.deepcopy(net), config)
    for name, layer in lora.lora_layers(adapted).items():
        theirs = twin.base_model.model.get_submodule(name)
        with torch.no_grad():
            theirs.lora_A["default"].weight.copy_(layer.lora_a)
            theirs.lora_B["default"].weight.copy_(layer.lora_b)
            if layer.magnitude is not None:
                theirs.lora_magnitude_vector["default"].weight.copy_(layer.magnitude)
    return twin


def pair(kind: dict, dtype=torch.float32, **more):
    """(adapted Net, peft's twin), same weights."""
    torch.manual_seed(7)
    net = Net(dtype)
    options = LoraOptions(lora_rank=3, **kind, **more)
    ours = copy.deepcopy(net)
    lora.add_lora(ours, options, torch.Generator().manual_seed(1))
    randomize(ours)
    return ours, peft_twin(net, options, ours)


def gradients_of_peft(twin, name: str) -> list[torch.Tensor]:
    theirs = twin.base_model.model.get_submodule(name)
    found = [theirs.lora_A["default"].weight.grad, theirs.lora_B["default"].weight.grad]
    if "default" in theirs.lora_magnitude_vector:
        found.append(theirs.lora_magnitude_vector["default"].weight.grad)
    return found


def gradients_of(layer: LoraLinear) -> list[torch.Tensor]:
    return [p.grad for p in (layer.lora_a, layer.lora_b, layer.magnitude) if p is not None]


# ---- the layer itself


@pytest.mark.parametrize("shape", [(1, 17), (123, 17), (2, 5, 17)])  # merged order, separate order, not flat
@pytest.mark.parametrize("kind", KINDS)
def test_forward_and_gradients_equal_peft(kind, shape):
    ours, twin = pair(kind)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    mine, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    expected = twin(theirs)
    result = ours(mine)
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-6)
    weight = torch.randn(expected.shape, generator=torch.Generator().manual_seed(4))
    (result * weight).sum().backward()
    (expected * weight).sum().backward()
    torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-4, atol=1e-5)
    for name, layer in lora.lora_layers(ours).items():
        assert layer.base.weight.grad is None
        for ours_grad, theirs_grad in zip(gradients_of(layer), gradients_of_peft(twin, name), strict=True):
            assert theirs_grad.abs().max() > 1e-3  # the oracle says something
            torch.testing.assert_close(ours_grad, theirs_grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_fresh_adapter_changes_nothing(kind):
    torch.manual_seed(7)
    net = Net()
    x = torch.randn(29, 17)
    before = net(x)
    lora.add_lora(net, LoraOptions(lora_rank=3, **kind))
    torch.testing.assert_close(net(x), before, rtol=1e-6, atol=1e-6)
    if "use_dora" in kind:
        norm = net.q_proj.base.weight.norm(dim=1)
        torch.testing.assert_close(net.q_proj.magnitude.data, norm, rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("adapter_dtype", [torch.float32, torch.bfloat16])
def test_bf16_base_is_as_accurate_as_peft_under_autocast(kind, adapter_dtype):
    """Error against fp64 at most twice peft's; peft's autocast computes in bf16 too, with fp32 adapters."""
    ours, twin = pair(kind, torch.bfloat16)
    x = torch.randn(123, 17, generator=torch.Generator().manual_seed(2)).bfloat16()
    exact = copy.deepcopy(ours).double()
    for layer in lora.lora_layers(ours).values():
        layer.lora_a.data = layer.lora_a.data.to(adapter_dtype)
        layer.lora_b.data = layer.lora_b.data.to(adapter_dtype)
    truth = exact(x.double())
    with torch.autocast("cpu", torch.bfloat16):
        reference = twin(x)
    result = ours(x)
    assert result.dtype is torch.bfloat16
    assert (result - truth).abs().mean() <= 2 * (reference - truth).abs().mean() + 1e-6
    result.float().square().sum().backward()
    truth.square().sum().backward()
    for name, layer in lora.lora_layers(ours).items():
        oracle = gradients_of(lora.lora_layers(exact)[name])
        for grad, wanted in zip(gradients_of(layer), oracle, strict=True):
            assert (grad - wanted).norm() < 0.02 * wanted.norm()  # 2^-8 a rounding, a few of them


def test_bf16_adapters_on_an_fp32_base_compute_in_fp32():
    ours, _ = pair({})
    x = torch.randn(123, 17)
    narrow = copy.deepcopy(ours)
    for layer in (*lora.lora_layers(ours).values(), *lora.lora_layers(narrow).values()):
        for p in (layer.lora_a, layer.lora_b):
            p.data = p.data.bfloat16()
    for layer in lora.lora_layers(ours).values():
        layer.float()
    torch.testing.assert_close(narrow(x), ours(x), rtol=0, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_dropout_has_pefts_mean_and_spread_and_none_in_eval(kind):
    ours, twin = pair(kind, lora_dropout=0.4)
    layer, theirs = ours.q_proj, twin.base_model.model.q_proj
    x = torch.randn(1, 17, generator=torch.Generator().manual_seed(2))
    rows = x.expand(6001, 17)
    torch.manual_seed(0)
    a, b = layer(rows).detach(), theirs(rows).detach()
    spread = b.std(0)
    error = 5 * spread / math.sqrt(6001)  # five standard errors
    assert spread.min() > 0.01
    assert ((a.mean(0) - b.mean(0)).abs() < 1.5 * error).all()
    torch.testing.assert_close(a.std(0), spread, rtol=0.08, atol=0)
    torch.testing.assert_close(a.mean(0), layer.eval()(x)[0], rtol=0, atol=2 * error.max().item())
    torch.testing.assert_close(layer(x), theirs.eval()(x), rtol=1e-5, atol=1e-6)


def test_dropout_with_one_seed_equals_peft_to_rounding():
    for kind in KINDS:
        ours, twin = pair(kind, lora_dropout=0.3)
        x = torch.randn(31, 17, generator=torch.Generator().manual_seed(2))
        torch.manual_seed(0)
        result = ours(x)
        torch.manual_seed(0)
        torch.testing.assert_close(result, twin(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dropout", [0.0, 1e-6])  # two paths; this dropout drops nothing
def test_magnitudes_keep_fp32_precision_under_bf16(dropout):
    """1.500 and 1.503 are one number in bf16; the outputs' mean size has to tell them apart."""
    torch.manual_seed(0)
    layer = LoraLinear(nn.Linear(17, 23).bfloat16(), 2, 4.0, dora=True, dropout_probability=dropout)
    layer.base.bias.data.zero_()
    x = torch.randn(9001, 17).bfloat16()
    start, sizes = layer.magnitude.data.clone(), []
    for factor in (1.5, 1.503):
        layer.magnitude.data = start * factor
        sizes.append(layer(x).detach().double().abs().mean().item())
    assert sizes[1] / sizes[0] == pytest.approx(1.503 / 1.5, abs=2e-4)


@pytest.mark.parametrize("names", [("bias",), ("weight", "bias")])
@pytest.mark.parametrize("kind", KINDS)
def test_a_base_that_trains_keeps_its_gradients(kind, names):
    ours, twin = pair(kind)
    x = torch.randn(31, 17)
    linears = ours.q_proj.base, twin.base_model.model.q_proj.base_layer
    for linear, model in zip(linears, (ours, twin)):
        for name in names:
            linear.get_parameter(name).requires_grad_(True)
        model(x).square().sum().backward()
    for name in names:
        mine, expected = (linear.get_parameter(name).grad for linear in linears)
        torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-5)


def test_dora_row_of_zeros_stays_finite():
    torch.manual_seed(0)
    net = Net()
    net.q_proj.weight.data[2] = 0.0
    lora.add_lora(net, LoraOptions(use_dora=True))
    result = net.q_proj(torch.randn(5, 17))
    result.sum().backward()
    torch.testing.assert_close(result[:, 2], net.q_proj.base.bias[2].expand(5), rtol=0, atol=1e-6)
    assert all(p.grad.isfinite().all() for p in (net.q_proj.lora_a, net.q_proj.lora_b))


def test_dora_norm_without_the_sum_equals_the_norm_of_the_sum():
    ours, _ = pair({"use_dora": True})
    layer = copy.deepcopy(ours.q_proj).double()
    full = (layer.base.weight + layer.scale * layer.lora_b @ layer.lora_a).norm(dim=1)
    torch.testing.assert_close(layer.updated_norm(), full, rtol=1e-12, atol=0)
    torch.testing.assert_close(ours.q_proj.updated_norm(), full.float(), rtol=1e-6, atol=0)


def test_scales_and_starting_values():
    layer = LoraLinear(nn.Linear(501, 7), 4, 6.0, generator=torch.Generator().manual_seed(0))
    assert layer.scale == 1.5 and not layer.lora_b.any() and layer.magnitude is None
    assert LoraLinear(nn.Linear(5, 7), 4, 6.0, rslora=True).scale == 3.0
    bound = 1 / math.sqrt(501)
    assert 0.98 * bound < layer.lora_a.abs().max() <= bound
    assert layer.lora_a.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)
    assert LoraOptions(lora_rank=5).alpha == 10 and LoraOptions(lora_alpha=3).alpha == 3


# ---- merging


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_merge_equals_peft(kind, dtype):
    ours, twin = pair(kind, dtype)
    x = torch.randn(31, 17).to(dtype)
    unmerged = ours.eval()(x)
    lora.merge_for_good(ours)
    plain = twin.merge_and_unload()
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if dtype is torch.float32 else {"rtol": 1 / 64, "atol": 1e-3}
    for name in ("q_proj", "o_proj"):
        torch.testing.assert_close(
            ours.get_submodule(name).weight, plain.get_submodule(name).weight, **tolerance
        )
    torch.testing.assert_close(
        ours(x), unmerged, rtol=tolerance["rtol"] * 4, atol=0.03 if dtype is not torch.float32 else 1e-5
    )


@pytest.mark.parametrize("kind", KINDS)
def test_merge_for_good_leaves_plain_linears(kind):
    ours, _ = pair(kind)
    x = torch.randn(31, 17)
    expected = ours(x)
    lora.merge_for_good(ours)
    assert type(ours.q_proj) is nn.Linear and not lora.lora_layers(ours)
    assert not any(p.requires_grad for p in ours.parameters())
    torch.testing.assert_close(ours(x), expected, rtol=1e-5, atol=1e-6)


def test_several_adapters_merge_one_after_the_other():
    torch.manual_seed(0)
    net = Net().double()
    weight = net.q_proj.weight.detach().clone()
    for seed in (1, 2):
        lora.add_lora(net, LoraOptions(lora_rank=2), torch.Generator().manual_seed(seed), torch.float64)
        randomize(net, seed)
        layer = net.q_proj
        weight += layer.scale * (layer.lora_b @ layer.lora_a).detach()
        lora.merge_for_good(net)
    torch.testing.assert_close(net.q_proj.weight.detach(), weight, rtol=1e-12, atol=1e-12)


def test_merging_errors():
    ours, _ = pair({})
    ours.o_proj.lora_a.data[0, 0] = math.nan
    with pytest.raises(ValueError, match="o_proj: the merged weight is not finite"):
        lora.merge_for_good(ours)
    with pytest.raises(ValueError, match="the model has no adapters"):
        lora.merge_for_good(Net())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_quantised_base_behaves_as_its_dequantised_weight(kind, dropout):
    torch.manual_seed(3)
    net = Net()
    net.q_proj, net.o_proj = Packed(net.q_proj), Packed(net.o_proj)
    plain = Net()
    plain.q_proj.weight.data = net.q_proj.dequantize()
    plain.q_proj.bias.data = net.q_proj.bias.data
    plain.o_proj.weight.data = net.o_proj.dequantize()
    options = LoraOptions(lora_rank=3, lora_dropout=dropout, **kind)
    for model in (net, plain):
        lora.add_lora(model, options, torch.Generator().manual_seed(1))
        randomize(model)
    x = torch.randn(31, 17)
    results = []
    for model in (net, plain):
        torch.manual_seed(0)
        results.append(model(x))
        results[-1].square().sum().backward()
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-6)
    for a, b in zip(gradients_of(net.q_proj), gradients_of(plain.q_proj), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    expected = net.eval()(x)
    lora.merge_for_good(net)
    assert isinstance(net.q_proj, nn.Linear)
    torch.testing.assert_close(net(x), expected, rtol=1e-5, atol=1e-6)


# ---- in a decoder


def test_off_is_the_base_model_even_nested_and_after_an_error():
    model = decoder()
    before = run(model)
    lora.add_lora(model, LoraOptions())
    randomize(model)
    adapted = run(model)
    assert (adapted - before).abs().max() > 0.01
    with lora.lora_off(model):
        with lora.lora_off(model):
            assert torch.equal(run(model), before)
        assert torch.equal(run(model), before)
    assert torch.equal(run(model), adapted)
    with pytest.raises(KeyError), lora.lora_off(model):
        raise KeyError("inside")
    assert torch.equal(run(model), adapted)


def test_off_needs_adapters_and_an_unchanged_base():
    with pytest.raises(ValueError, match="no adapters"), lora.lora_off(decoder()):
        pass
    model = decoder()
    lora.add_lora(model, LoraOptions(additional_target=("embed_tokens",)))
    with pytest.raises(ValueError, match="embed_tokens train in full"), lora.lora_off(model):
        pass


@pytest.mark.parametrize("dora", [False, True])
def test_checkpointing_and_ddp_give_the_gradients_of_the_plain_run(dora, tmp_path):
    model = decoder()
    lora.add_lora(model, LoraOptions(use_dora=dora, lora_dropout=0.2), torch.Generator().manual_seed(1))
    randomize(model)
    torch.manual_seed(0)
    run(model).square().sum().backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    model.runtime.recompute = Plan(full=model.config.num_layers)
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        parallel = nn.parallel.DistributedDataParallel(model)
        for _ in range(2):  # a parameter left out would make the second round fail
            model.zero_grad()
            torch.manual_seed(0)
            run(parallel).square().sum().backward()
    finally:
        # DDP first: as the last owner it would end the group's threads while holding the lock that they wait
        # for
        parallel = None
        gc.collect()
        torch.distributed.destroy_process_group()
    assert len(expected) == 3 * 7 * (3 if dora else 2)
    for name, p in model.named_parameters():
        if p.requires_grad:
            torch.testing.assert_close(p.grad, expected[name], rtol=1e-5, atol=1e-6)


def test_all_takes_every_linear_but_the_head():
    model = decoder()
    lora.add_lora(model, LoraOptions(lora_rank=2))
    assert len(lora.lora_layers(model)) == 3 * 7 and isinstance(model.lm_head, nn.Linear)
    trained = {name.rpartition(".")[2] for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"lora_a", "lora_b"}
    assert lora.target_names(decoder(), ["all", "lm_head"])[-1] == "lm_head"
    assert lora.target_names(decoder(), ["all-linear"]) == lora.target_names(decoder(), ["all"])


def test_targets_match_whole_words_from_the_end():
    model = decoder()
    assert lora.target_names(model, ["v_proj", "layers.1.self_attn.q_proj"]) == [
        "layers.0.self_attn.v_proj",
        "layers.1.self_attn.q_proj",
        "layers.1.self_attn.v_proj",
        "layers.2.self_attn.v_proj",
    ]
    with pytest.raises(ValueError, match="no linear is called '_proj'"):
        lora.target_names(model, ["_proj"])


@pytest.mark.parametrize(
    "tied, values, message",
    [
        (
            False,
            {"lora_target": ("query",)},
            "lora_target: no linear is called 'query'; this model has down_proj, gate_proj,",
        ),
        (False, {"lora_target": ("q_proj", "key")}, "no linear is called 'key'"),
        (
            False,
            {"lora_target": ("embed_tokens",)},
            "'embed_tokens' is a Embedding, not a linear; additional_target",
        ),
        (False, {"lora_target": ("self_attn",)}, "'self_attn' is a Attention, not a linear"),
        (True, {"lora_target": ("lm_head",)}, "'lm_head' is tied to embed_tokens"),
        (
            False,
            {"lora_target": ("lm_head",), "additional_target": ("lm_head",)},
            "'lm_head' is trained in full already",
        ),
        (
            False,
            {"additional_target": ("wte",)},
            "additional_target: no module is called 'wte'; there are down_proj,",
        ),
        (
            True,
            {"additional_target": ("lm_head",)},
            "additional_target: the head 'lm_head' is tied to embed_tokens here",
        ),
    ],
)
def test_targets_that_match_nothing_say_what_is_there(tied, values, message):
    model = decoder(tied)
    with pytest.raises(ValueError, match=message):
        lora.add_lora(model, LoraOptions(**values))
    assert not lora.lora_layers(model) and all(p.requires_grad for p in model.parameters())  # untouched


@pytest.mark.parametrize(
    "values, message",
    [
        ({"lora_rank": 0}, "lora_rank: 0"),
        ({"lora_alpha": 0.0}, "lora_alpha: 0.0"),
        ({"lora_alpha": math.nan}, "lora_alpha: nan"),
        ({"lora_dropout": 1.0}, "lora_dropout: 1.0"),
        ({"lora_target": ()}, "lora_target: empty"),
        ({"name_module_trainable": ()}, "name_module_trainable: empty"),
        ({"num_layer_trainable": 0}, "num_layer_trainable: 0 layers train"),
    ],
)
def test_bad_options_name_the_key(values, message):
    with pytest.raises(ValueError, match=message):
        LoraOptions(**values)


def test_a_second_adapter_on_top_is_refused():
    model = decoder()
    lora.add_lora(model, LoraOptions())
    with pytest.raises(ValueError, match="adapters already; call lora.merge_for_good"):
        lora.add_lora(model, LoraOptions())


def test_a_seed_fixes_each_adapter_whatever_else_is_adapted():
    def adapters(seed: int, **values) -> dict[str, torch.Tensor]:
        model = decoder()
        lora.add_lora(model, LoraOptions(lora_rank=3, **values), torch.Generator().manual_seed(seed))
        return {name: layer.lora_a.detach() for name, layer in lora.lora_layers(model).items()}

    everything, again, other = adapters(5), adapters(5), adapters(6)
    some = adapters(5, lora_target=("down_proj", "v_proj"))
    assert len(some) == 6
    assert all(torch.equal(everything[name], again[name]) for name in everything)
    assert all(torch.equal(everything[name], some[name]) for name in some)
    assert not any(torch.equal(everything[name], other[name]) for name in everything)
    values = torch.cat([a.flatten() for a in everything.values()])
    assert values.unique().numel() > 0.99 * values.numel()  # no two layers start alike


def test_without_a_generator_the_global_seed_decides():
    models = [decoder() for _ in range(3)]
    for model, seed in zip(models, (11, 11, 12)):
        torch.manual_seed(seed)
        lora.add_lora(model, LoraOptions())
    first, same, other = (model.layers[0].mlp.up_proj.lora_a for model in models)
    assert torch.equal(first, same) and not torch.equal(first, other)


def test_additional_targets_train_in_full_and_are_listed():
    model = decoder()
    options = LoraOptions(
        lora_target=("q_proj",), additional_target=("embed_tokens", "lm_head", "layers.1.mlp")
    )
    trainable.prepare_trainable(model, options)
    inside = [f"layers.1.mlp.{name}_proj" for name in ("gate", "up", "down")]
    assert lora.full_modules(model) == ["embed_tokens", *inside, "lm_head"]
    assert (
        not model.norm.weight.requires_grad and not model.layers[1].self_attn.q_proj.base.weight.requires_grad
    )
    model.logits(run(model)).square().sum().backward()
    assert model.lm_head.weight.grad.abs().sum() > 0 and model.embed_tokens.weight.grad.abs().sum() > 0

    model = decoder()  # linears inside a module that trains in full get no adapter of their own
    lora.add_lora(model, LoraOptions(additional_target=("layers.1.mlp",)))
    assert len(lora.lora_layers(model)) == 3 * 7 - 3

    model = decoder(tied=True)  # asking for both halves of a tied pair is fine: they are one
    lora.add_lora(model, LoraOptions(additional_target=("embed_tokens", "lm_head")))
    assert lora.full_modules(model) == ["embed_tokens"]


# ---- freeze, full, report


def trained(model: nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("count, layers", [(2, (1, 2)), (-2, (0, 1)), (1, (2,)), (-1, (0,)), (3, (0, 1, 2))])
def test_freeze_takes_the_last_or_first_layers(count, layers):
    model = decoder()
    trainable.prepare_trainable(model, LoraOptions(finetuning_type="freeze", num_layer_trainable=count))
    prefixes = tuple(f"layers.{i}." for i in layers)
    assert trained(model) == {name for name, _ in model.named_parameters() if name.startswith(prefixes)}


def test_freeze_takes_named_modules_and_extras():
    model = decoder()
    options = LoraOptions(
        finetuning_type="freeze",
        num_layer_trainable=1,
        name_module_trainable=("mlp", "q_proj"),
        freeze_extra_modules=("embed_tokens", "norm"),
    )
    trainable.prepare_trainable(model, options)
    mlp = {f"layers.2.mlp.{name}_proj.weight" for name in ("gate", "up", "down")}
    attention = {"layers.2.self_attn.q_proj.weight", "layers.2.self_attn.q_proj.bias"}
    assert trained(model) == mlp | attention | {"embed_tokens.weight", "norm.weight"}

    model = decoder()
    options = LoraOptions(finetuning_type="freeze", num_layer_trainable=0, freeze_extra_modules=("lm_head",))
    trainable.prepare_trainable(model, options)
    assert trained(model) == {"lm_head.weight"}


@pytest.mark.parametrize(
    "tied, values, message",
    [
        (False, {"num_layer_trainable": 4}, "num_layer_trainable: 4, but the model has 3 layers"),
        (False, {"num_layer_trainable": -4}, "num_layer_trainable: -4, but"),
        (
            False,
            {"name_module_trainable": ("attention",)},
            "called 'attention'; there are all, down_proj, .*self_attn",
        ),
        (
            False,
            {"freeze_extra_modules": ("q_proj",)},
            "no module is called 'q_proj'; there are embed_tokens, lm_head, norm",
        ),
        (True, {"freeze_extra_modules": ("lm_head",)}, "'lm_head' is tied to embed_tokens"),
    ],
)
def test_freeze_errors_say_what_is_there(tied, values, message):
    model = decoder(tied)
    with pytest.raises(ValueError, match=message):
        trainable.prepare_trainable(model, LoraOptions(finetuning_type="freeze", **values))
    with pytest.raises(ValueError, match="ModuleList called 'layers'"):
        trainable.prepare_trainable(Net(), LoraOptions(finetuning_type="freeze"))


def test_full_trains_everything_and_unknown_types_are_refused():
    model = decoder().requires_grad_(False)
    trainable.prepare_trainable(model, LoraOptions(finetuning_type="full"))
    assert len(trained(model)) == len(list(model.parameters()))
    with pytest.raises(
        ValueError, match="finetuning_type: 'galore' is unknown; known are lora, full, freeze"
    ):
        trainable.prepare_trainable(model, LoraOptions(finetuning_type="galore"))


def test_report_counts_elements_also_of_quantised_weights():
    net = Net()
    assert trainable.trainable_report(net) == "trainable 529 of 529 parameters (100.00 %)"
    lora.add_lora(net, LoraOptions(lora_rank=2))
    adapters = 2 * (17 + 23) + 2 * (23 + 5)
    assert trainable.trainable_report(net) == f"trainable {adapters} of {529 + adapters} parameters (20.45 %)"
    net = Net()
    net.q_proj, net.o_proj = Packed(net.q_proj), Packed(net.o_proj)
    lora.add_lora(net, LoraOptions(lora_rank=2))
    assert trainable.trainable_report(net) == f"trainable {adapters} of {529 + adapters} parameters (20.45 %)"
    assert trainable.trainable_report(nn.Linear(1000, 1000)).startswith("trainable 1,001,000 of 1,001,000")
    status = trainable.parameter_status(net)
    assert "q_proj.base.bias  (23,)  float32  cpu  frozen" in status
    places = [place for place, line in enumerate(status) if line.startswith("q_proj.base.")]
    assert len(places) == 2 and places[1] == places[0] + 1
    assert "q_proj.base.weight  (23, 17)  8.000 bits  cpu  frozen" in status


def test_the_model_of_the_issue_has_the_published_count():
    """Rank 8 on every linear of SmolLM2-135M, counted from its shapes."""
    shapes = [(576, 576), (576, 192), (576, 192), (576, 576), (576, 1536), (576, 1536), (1536, 576)]
    assert sum(8 * (a + b) for a, b in shapes) * 30 == 2_442_240


def test_adapters_train_in_the_mode_of_their_model():
    model = decoder().eval()
    lora.add_lora(model, LoraOptions(lora_dropout=0.5))
    randomize(model)
    assert torch.equal(run(model), run(model))  # eval: no dropout
    assert not model.layers[0].mlp.up_proj.training
