"""Optimizers against formulas and torch, groups against the HF trainer, each `optim` and its file."""

import io
import typing
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import parallel.checkpoint
from parallel.world import World
from training import rounding
from training.optimizers import (
    FILES,
    adamw_torch,
    bitsandbytes,
    clip_gradients,
    file_of,
    load_optimizer,
    make_optimizer,
    parameter_groups,
    set_learning_rate,
    state_per_byte,
    states,
)
from training.options import OptimOptions
from training.saving import Writer

ALONE = World(0, 1, 0, torch.device("cpu"))


def take_over(optimizer, other, folder) -> None:
    """Its state as it comes back from a checkpoint."""
    plain, tensors = states(other)
    parallel.checkpoint.save(Writer(folder / "optimizer"), tensors, ALONE)
    load_optimizer(optimizer, plain, folder / "optimizer", ALONE)


def test_groups_equal_those_of_the_hugging_face_trainer():
    from transformers import AutoModelForCausalLM, Qwen3Config
    from transformers.trainer import Trainer

    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=97, hidden_size=24, intermediate_size=36, num_hidden_layers=2, num_attention_heads=3,
        num_key_value_heads=1, head_dim=8, attention_bias=True, tie_word_embeddings=True,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    decayed, spared = parameter_groups(model, 0.1)
    expected = set(Trainer.get_decay_parameter_names(None, model))
    names = {name for name, _ in model.named_parameters()}
    assert {name for name, _ in decayed["params"]} == expected & names
    assert {name for name, _ in spared["params"]} == names - expected
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.1, 0.0)


def test_frozen_parameters_are_left_out_and_vectors_do_not_decay():
    model = nn.ModuleDict({"a": nn.Linear(3, 5), "b": nn.Linear(5, 2, bias=False)})
    model["b"].requires_grad_(False)
    model["a"].register_parameter("magnitude", nn.Parameter(torch.ones(5)))
    groups = parameter_groups(model, 0.3)
    assert [name for name, _ in groups[0]["params"]] == ["a.weight"]
    assert [name for name, _ in groups[1]["params"]] == ["a.bias", "a.magnitude"]
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="no trainable parameter"):
        parameter_groups(model, 0.0)


class Small(nn.Module):
    """An embedding, matrices above and below bitsandbytes' 4096-element limit, vectors."""

    def __init__(self):
        super().__init__()
        self.embed_tokens = nn.Embedding(97, 53)
        self.wide = nn.Linear(53, 91)
        self.norm = nn.LayerNorm(91)
        self.narrow = nn.Linear(91, 7)

    def forward(self, ids):
        return self.narrow(self.norm(self.wide(self.embed_tokens(ids))))


def small_model(dtype=torch.float32) -> Small:
    torch.manual_seed(1)
    return Small().to(dtype)


def train(model: nn.Module, optimizer, steps: int, first: int = 0) -> None:
    for step in range(first, first + steps):
        generator = torch.Generator().manual_seed(step)
        ids = torch.randint(97, (31,), generator=generator)
        set_learning_rate(optimizer, 1.0 / (1 + step))
        optimizer.zero_grad()
        (model(ids).float() ** 2).mean().backward()
        optimizer.step()


def difference(a: nn.Module, b: nn.Module) -> float:
    return max((p - q).abs().max().item() for p, q in zip(a.parameters(), b.parameters()))


def distance(a: nn.Module, b: nn.Module) -> float:
    return sum(((p - q) ** 2).sum().item() for p, q in zip(a.parameters(), b.parameters())) ** 0.5


def by_hand(model: nn.Module, options: OptimOptions, steps: int) -> None:
    """AdamW, Lion and SGD from their papers, in the dtype of the parameters."""
    moments = {p: (torch.zeros_like(p), torch.zeros_like(p)) for p in model.parameters()}
    for step in range(steps):
        ids = torch.randint(97, (31,), generator=torch.Generator().manual_seed(step))
        model.zero_grad()
        (model(ids).float() ** 2).mean().backward()
        rate = options.learning_rate / (1 + step)
        with torch.no_grad():
            for p in model.parameters():
                decay = options.weight_decay if p.dim() > 1 else 0.0
                if options.optim == "sgd":
                    p -= rate * (p.grad + decay * p)
                    continue
                first, second = moments[p]
                if "lion" in options.optim:  # arXiv 2302.06675, algorithm 2
                    p *= 1 - rate * decay
                    p -= rate * (options.adam_beta1 * first + (1 - options.adam_beta1) * p.grad).sign()
                    first.mul_(options.adam_beta2).add_((1 - options.adam_beta2) * p.grad)
                    continue
                p *= 1 - rate * decay
                first.mul_(options.adam_beta1).add_((1 - options.adam_beta1) * p.grad)
                second.mul_(options.adam_beta2).add_((1 - options.adam_beta2) * p.grad**2)
                mean = first / (1 - options.adam_beta1 ** (step + 1))
                variance = second / (1 - options.adam_beta2 ** (step + 1))
                p -= rate * mean / (variance.sqrt() + options.adam_epsilon)


@pytest.mark.parametrize("kind", ["adamw_torch", "adamw_torch_fused", "sgd"])
def test_ten_steps_equal_the_paper(kind):
    options = OptimOptions(
        optim=kind, learning_rate=0.02, weight_decay=0.1, adam_beta1=0.8, adam_beta2=0.95, adam_epsilon=1e-5
    )
    model, expected = small_model(), small_model()
    train(model, make_optimizer(model, options), 10)
    by_hand(expected, options, 10)
    assert difference(model, small_model()) > 0.01
    assert difference(model, expected) < 2e-6


def test_adamw_follows_the_plain_torch_one_and_repeats_to_the_bit():
    options = OptimOptions(learning_rate=0.01, weight_decay=0.1)
    models = [small_model() for _ in range(3)]
    for model in models[:2]:
        optimizer = make_optimizer(model, options)
        assert optimizer.defaults["fused"]
        train(model, optimizer, 10)
    plain = torch.optim.AdamW(parameter_groups(models[2], 0.1), lr=0.01, fused=False, foreach=False)
    for group in plain.param_groups:
        group["initial_lr"] = 0.01
    train(models[2], plain, 10)
    assert difference(models[0], models[1]) == 0.0
    assert difference(models[0], models[2]) < 2e-6


AS_TYPED = ["adamw_torch", "adamw_torch_fused", "sgd", "adafactor", "adamw_8bit", "adamw_bnb_8bit"]


@pytest.mark.parametrize("kind", [*AS_TYPED, "lion_8bit", "lion_32bit"])
def test_an_optimizer_is_the_one_of_the_same_name_in_the_hugging_face_trainer(kind):
    """From zeros too, where LoRA's B begins: it moves as far."""
    from transformers import Trainer
    from transformers.training_args import OptimizerNames

    numbers = {"learning_rate": 0.02, "adam_beta1": 0.8, "adam_beta2": 0.95, "adam_epsilon": 1e-5}
    asked = SimpleNamespace(optim=OptimizerNames(kind), optim_args=None, **numbers)
    theirs, how = Trainer.get_optimizer_cls_and_kwargs(asked)
    models = [small_model(), small_model()]
    for model in models:
        model.narrow.weight.data.zero_()
        model.embed_tokens.requires_grad_(False)  # their 8-bit rule for embeddings stands in create_optimizer
    mine = make_optimizer(models[0], OptimOptions(optim=kind, weight_decay=0.1, **numbers))
    oracle = theirs(parameter_groups(models[1], 0.1), **how)
    for group in oracle.param_groups:
        group["initial_lr"] = group["lr"]
    for model, optimizer in zip(models, (mine, oracle)):
        train(model, optimizer, 10)
    moved = models[0].narrow.weight.norm().item()
    assert moved > 0.001 and difference(*models) < 1e-4 * moved


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adafactor_keeps_its_moments_in_fp32(dtype):
    model = small_model(dtype)
    optimizer = make_optimizer(model, OptimOptions(optim="adafactor"))
    train(model, optimizer, 1)
    rows, columns = (optimizer.state[model.wide.weight][name] for name in ("rows", "columns"))
    assert rows.shape == (91,) and columns.shape == (53,) and rows.dtype == columns.dtype == torch.float32


@pytest.mark.parametrize("kind", ["adamw_8bit", "adamw_bnb_8bit"])
def test_eight_bit_adamw_stays_near_adamw_and_keeps_embeddings_exact(kind):
    rate = 0.01
    model, expected = small_model(), small_model()
    optimizer = make_optimizer(model, OptimOptions(optim=kind, learning_rate=rate, weight_decay=0.1))
    train(model, optimizer, 10)
    train(expected, make_optimizer(expected, OptimOptions(learning_rate=rate, weight_decay=0.1)), 10)
    state = optimizer.state
    assert state[model.wide.weight]["state1"].dtype is torch.uint8  # 4823 elements
    assert state[model.embed_tokens.weight]["state1"].dtype is torch.float32  # 5141, but an embedding
    assert state[model.narrow.weight]["state1"].dtype is torch.float32  # 637 elements: below the limit
    assert 0 < distance(model, expected) < 0.1 * distance(expected, small_model())


def test_eight_bit_embedding_override_does_not_leak_into_a_second_optimizer():
    make_optimizer(small_model(), OptimOptions(optim="adamw_8bit"))
    plain = nn.Sequential(nn.Linear(97, 91, bias=False))
    optimizer = make_optimizer(plain, OptimOptions(optim="adamw_8bit"))
    plain(torch.ones(3, 97)).sum().backward()
    optimizer.step()
    assert optimizer.state[plain[0].weight]["state1"].dtype is torch.uint8


@pytest.mark.parametrize("kind", ["lion_32bit", "lion_8bit"])
def test_lion_is_that_of_the_paper(kind):
    options = OptimOptions(optim=kind, learning_rate=0.003, adam_beta1=0.8, adam_beta2=0.95, weight_decay=0.1)
    model, expected = small_model(), small_model()
    optimizer = make_optimizer(model, options)
    train(model, optimizer, 10)
    by_hand(expected, options, 10)
    wide, embeddings = (optimizer.state[layer.weight] for layer in (model.wide, model.embed_tokens))
    assert "state2" not in wide and embeddings["state1"].dtype is torch.float32
    if kind == "lion_32bit":
        assert difference(model, expected) < 1e-6
    else:  # where the mix is near zero its sign may be another one
        assert wide["state1"].dtype is torch.uint8
        assert 0 < distance(model, expected) < 0.3 * distance(expected, small_model())


def test_paged_state_is_paged_again_when_it_is_read_back(tmp_path):
    """On a CPU bitsandbytes makes plain tensors of it, in the same place."""
    import bitsandbytes

    class Recording(bitsandbytes.optim.PagedAdamW32bit):
        def get_state_buffer(self, p, dtype=torch.float32):
            self.made.append(super().get_state_buffer(p, dtype))
            return self.made[-1]

    def fresh(model):
        optimizer = Recording(parameter_groups(model, 0.0), lr=0.01)
        for group in optimizer.param_groups:
            group["initial_lr"] = group["lr"]
        optimizer.made = []
        return optimizer

    models = [small_model() for _ in range(2)]
    whole, half = (fresh(model) for model in models)
    train(models[0], whole, 6)
    train(models[1], half, 3)
    again = fresh(models[1])
    take_over(again, half, tmp_path)
    states = [again.state[p][key] for p in models[1].parameters() for key in ("state1", "state2")]
    assert {id(state) for state in states} == {id(buffer) for buffer in again.made}
    train(models[1], again, 3, first=3)
    assert difference(*models) == 0.0


@pytest.mark.parametrize(
    "kind, other",
    [
        ("paged_adamw_8bit", "adamw_8bit"),
        ("paged_adamw_32bit", "adamw_torch"),
        ("paged_lion_8bit", "lion_8bit"),
        ("paged_lion_32bit", "lion_32bit"),
    ],
)
def test_paged_optimizers_are_refused_on_a_cpu(kind, other):
    with pytest.raises(ValueError, match=f"optim: {kind} .* are on the CPU; use {other}"):
        make_optimizer(small_model(), OptimOptions(optim=kind))


def test_a_missing_bitsandbytes_says_how_to_get_it(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ValueError, match="optim: adamw_8bit needs bitsandbytes .*; pip install bitsandbytes"):
        make_optimizer(small_model(), OptimOptions(optim="adamw_8bit"))


def test_an_unknown_optimizer_lists_the_known_ones():
    with pytest.raises(
        ValueError, match="optim: 'lion' is unknown; known are adamw_torch, .*paged_adamw_8bit"
    ):
        make_optimizer(small_model(), OptimOptions(optim="lion"))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="paged optimizers need a GPU")
@pytest.mark.parametrize("kind", ["paged_adamw_32bit", "paged_adamw_8bit"])
def test_paged_optimizers_follow_adamw_on_a_gpu(kind):
    torch.manual_seed(0)
    start = torch.randn(701, 503)  # above the 1e5 elements from which state is paged
    gradients = [torch.randn(701, 503).cuda() for _ in range(10)]
    layers = [nn.Linear(503, 701, bias=False).cuda() for _ in range(2)]
    optimizers = []
    for layer, name in zip(layers, (kind, "adamw_torch")):
        layer.weight.data.copy_(start)
        optimizers.append(make_optimizer(layer, OptimOptions(optim=name, learning_rate=0.01)))
    for gradient in gradients:
        for layer, optimizer in zip(layers, optimizers):
            layer.weight.grad = gradient.clone()
            optimizer.step()
    moved = (layers[1].weight.cpu() - start).abs().max().item()
    tolerance = 1e-5 if kind.endswith("32bit") else 0.25
    assert difference(*layers) < tolerance * moved


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["adamw_torch", "adamw_torch_fused", "sgd", "adafactor", "adamw_8bit"])
def test_state_survives_a_file_to_the_bit(kind, dtype):
    options = OptimOptions(optim=kind, learning_rate=0.01, weight_decay=0.1)
    straight = small_model(dtype)
    optimizer = make_optimizer(straight, options)
    train(straight, optimizer, 4)
    file = io.BytesIO()
    torch.save({"model": straight.state_dict(), "optimizer": optimizer.state_dict()}, file)
    train(straight, optimizer, 3, first=4)

    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed = small_model(dtype)
    resumed.load_state_dict(saved["model"])
    optimizer = make_optimizer(resumed, options)
    optimizer.load_state_dict(saved["optimizer"])
    train(resumed, optimizer, 3, first=4)
    assert difference(straight, resumed) == 0.0
    assert optimizer.param_groups[0]["param_names"] == ["embed_tokens.weight", "wide.weight", "narrow.weight"]


def test_groups_keep_their_own_peak_rate():
    model = small_model()
    optimizer = make_optimizer(model, OptimOptions(learning_rate=0.01))
    optimizer.param_groups[1]["initial_lr"] = 0.16
    set_learning_rate(optimizer, 0.5)
    assert [group["lr"] for group in optimizer.param_groups] == [0.005, 0.08]


@pytest.mark.parametrize("factor", [0.001, 30.0])
def test_clipping_scales_to_the_norm_and_reports_the_old_one(factor):
    model = small_model()
    (model(torch.arange(17)) * factor).sum().backward()
    before = [p.grad.clone() for p in model.parameters()]
    norm = torch.cat([g.flatten() for g in before]).double().norm()
    reported = clip_gradients(model.parameters(), 0.7)
    assert isinstance(reported, torch.Tensor) and reported.item() == pytest.approx(norm.item(), rel=1e-6)
    scale = min(1.0, 0.7 / norm.item())
    for p, old in zip(model.parameters(), before):
        torch.testing.assert_close(p.grad, old * scale, rtol=1e-5, atol=1e-7)


def test_clipping_off_only_measures():
    model = small_model()
    model(torch.arange(17)).sum().backward()
    model.narrow.bias.grad = None  # a parameter without a gradient takes no part
    before = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    norm = clip_gradients(model.parameters(), 0.0)
    assert norm.item() == pytest.approx(torch.cat([g.flatten() for g in before]).norm().item(), rel=1e-6)
    assert all(torch.equal(p.grad, old) for p, old in zip(model.parameters(), before))


ELSEWHERE = {"adamw_torch_fused": "adamw_torch"} | dict.fromkeys(bitsandbytes.CLASSES, "bitsandbytes")


@pytest.mark.parametrize("value", typing.get_args(typing.get_type_hints(OptimOptions)["optim"]))
def test_the_value_of_optim_is_the_file_to_open(value):
    """All but the README's exceptions; each file says how much state its optimizers have."""
    file = file_of(value)
    assert Path(file.__file__).name == f"{ELSEWHERE.get(value, value)}.py"
    assert file.SERVES[value] == state_per_byte(value) >= 0


def test_no_file_serves_a_value_that_cannot_be_typed_and_none_serves_one_twice():
    served = [value for file in FILES for value in file.SERVES]
    assert sorted(served) == sorted(typing.get_args(typing.get_type_hints(OptimOptions)["optim"]))
    folder = Path(FILES[0].__file__).parent
    assert {path.stem for path in folder.glob("*.py")} == {Path(file.__file__).stem for file in FILES} | {
        "__init__"
    }


class Sheet(nn.Module):
    def __init__(self, dtype):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter((torch.randn(60, 50, generator=generator) * 0.02).to(dtype))


def steps_of(dtype, steps, optim="adamw_torch", rate=1e-5):
    """The weights after steps whose gradients are small and mostly of one sign, and the optimizer."""
    model = Sheet(dtype)
    optimizer = make_optimizer(model, OptimOptions(optim=optim, learning_rate=rate, weight_decay=0.01))
    for number in range(steps):
        generator = torch.Generator().manual_seed(number)
        noise = torch.randn(60, 50, generator=generator)
        model.weight.grad = (noise + torch.linspace(-2, 2, 50)).to(dtype)
        optimizer.step()
    return model.weight.detach().float(), optimizer


@pytest.mark.parametrize(
    "optim", ["adamw_torch", "sgd", "adafactor", "adamw_8bit", "lion_8bit", "lion_32bit"]
)
def test_weights_in_bf16_move_as_far_as_those_in_fp32(optim):
    """At 1e-5 a step is below the 8 bits of a weight of 0.02: rounded to the nearest, most never move."""
    start = Sheet(torch.bfloat16).weight.detach().float()
    wide, narrow = (steps_of(dtype, 100, optim)[0] - start for dtype in (torch.float32, torch.bfloat16))
    along = (wide * narrow).sum() / wide.square().sum()
    assert 0.95 < along < 1.05
    assert (narrow.mean(0) - wide.mean(0)).norm() < 0.3 * wide.mean(0).norm()


def test_rounded_to_the_nearest_they_do_not():
    """What is mended: without it the test above would pass too, were its steps large enough."""
    near = Sheet(torch.bfloat16)
    start = near.weight.detach().float().clone()
    optimizer = torch.optim.AdamW(near.parameters(), lr=1e-5, weight_decay=0.01)
    for _ in range(100):
        near.weight.grad = torch.ones(60, 50).bfloat16()
        optimizer.step()
    assert (near.weight.float() - start).norm() < 0.7 * 100 * 1e-5 * 3000**0.5


@pytest.mark.parametrize("optim", ["adamw_torch", "sgd", "adafactor", "adamw_8bit"])
def test_rounding_by_chance_repeats_and_goes_on_where_it_was(optim, tmp_path):
    """The same bits in a second run, and after a state that was saved half-way; moments stay in bf16."""
    whole, _ = steps_of(torch.bfloat16, 6, optim)
    assert torch.equal(whole, steps_of(torch.bfloat16, 6, optim)[0])
    half, optimizer = steps_of(torch.bfloat16, 3, optim)
    model = Sheet(torch.bfloat16)
    model.weight.data.copy_(half)
    resumed = make_optimizer(model, OptimOptions(optim=optim, learning_rate=1e-5, weight_decay=0.01))
    take_over(resumed, optimizer, tmp_path)
    for number in range(3, 6):
        noise = torch.randn(60, 50, generator=torch.Generator().manual_seed(number))
        model.weight.grad = (noise + torch.linspace(-2, 2, 50)).bfloat16()
        resumed.step()
    assert torch.equal(model.weight.float(), whole)
    assert model.weight.dtype is torch.bfloat16 is model.weight.grad.dtype
    if optim == "adamw_torch":
        (state,) = resumed.state.values()
        assert state["exp_avg"].dtype is state["exp_avg_sq"].dtype is torch.bfloat16


def test_rounding_by_chance_has_the_mean_of_what_it_rounds():
    value = torch.tensor([1.0, 1.0009765625, -0.3, 3e-39, torch.inf, 0.0])
    noise = torch.Generator().manual_seed(0)
    found = torch.stack([rounding.rounded_by_chance(value, noise) for _ in range(4000)])
    assert torch.equal(found, found.bfloat16().float())
    assert torch.equal(found[:, [0, 4, 5]], value[[0, 4, 5]].expand(4000, 3))
    torch.testing.assert_close(found[:, 1:3].mean(0), value[1:3], rtol=3e-4, atol=0)


def test_in_fp32_it_is_torchs_adamw():
    """RoundingAdamW's arithmetic, where nothing is rounded."""
    expected, _ = steps_of(torch.float32, 20, rate=1e-2)
    model = Sheet(torch.float32)
    groups = parameter_groups(model, 0.01)
    optimizer = adamw_torch.RoundingAdamW(groups, lr=1e-2, betas=(0.9, 0.999), eps=1e-8)
    for number in range(20):
        noise = torch.randn(60, 50, generator=torch.Generator().manual_seed(number))
        model.weight.grad = noise + torch.linspace(-2, 2, 50)
        optimizer.step()
    torch.testing.assert_close(model.weight.detach(), expected, rtol=1e-5, atol=1e-7)
