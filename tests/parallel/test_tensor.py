"""Layers cut over ranks give the gradients, the texts and the files of one process."""

import itertools
import os

import pytest
import torch
from tiny_runs import fork_ranks, meeting, wait_for_all

import parallel.world
from architectures.config import ModelConfig
from architectures.rope import Rope
from generation.generate import generate
from generation.sampling import GenerateOptions
from kernels.recompute import Plan
from lora import LoraOptions, add_lora
from model import Decoder, initialize_weights
from parallel.fsdp import accumulated, assign, distribute, gathered, whole, whole_shape
from parallel.options import ParallelOptions
from parallel.world import World, clip_gradients

# 9 heads over 3 key and value heads, as SmolLM2 has them; 21 = 3 * 7
SIZES = {"vocab_size": 53, "hidden_size": 11, "intermediate_size": 21, "num_layers": 3, "max_positions": 64}
SIZES |= {"num_heads": 9, "num_kv_heads": 3, "head_dim": 6, "sliding_windows": (None, 4, None)}
SIZES |= {"norm_eps": 1e-5, "rope": Rope(theta=1e4), "initializer_range": 0.3}
BIASED = {"qkv_bias": True, "out_bias": True, "mlp_bias": True, "qk_norm": True}
EVEN = {"num_heads": 6, "num_kv_heads": 2, "intermediate_size": 14}  # for 2 ranks
CASES = {  # switches of the model, rank of the adapters, what blocks keep
    "full": (BIASED, 0, Plan()),
    "tied head, blocks run again": ({"tied_head": True} | BIASED, 0, Plan(full=2, selective=1)),
    "adapters": (BIASED, 5, Plan(selective=3)),
    "adapters without biases, run again": ({}, 4, Plan(full=3)),
}
WORLDS = {  # ranks, options
    "tp 3": (3, ParallelOptions(tp_size=3)),
    "ddp x tp 2": (4, ParallelOptions(tp_size=2, parallel="ddp")),
    "fsdp x tp 2": (4, ParallelOptions(tp_size=2, parallel="fsdp")),
}
ALONE = World(0, 1, 0, torch.device("cpu"))


def made(case: str, options: ParallelOptions) -> Decoder:
    """The same on every rank."""
    switches, rank, plan = CASES[case]
    sizes = SIZES | switches | (EVEN if options.tp_size == 2 else {})
    model = Decoder(ModelConfig(**sizes), dtype=torch.float64)
    generator = torch.Generator().manual_seed(3)
    initialize_weights(model, generator)
    if rank:
        add_lora(model, LoraOptions(lora_rank=rank), generator, torch.float64)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1 or name.endswith("lora_b"):  # what does nothing would prove nothing
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    model.runtime.recompute = plan
    return model


def step(model: Decoder, world: World, lose: bool = False) -> dict[str, torch.Tensor]:
    """Loss, gradient norm and whole gradients of two accumulated rows on each data rank, four in all; the
    rows differ in length, and one of them is not trained on. lose: one rank of a tensor group has none."""
    rows, loss = 4 // world.data_size, 0.0
    for row in range(rows):
        number = world.data_rank * rows + row
        generator = torch.Generator().manual_seed(number)
        tokens = torch.randint(53, (7 + 3 * number,), generator=generator)
        borders = torch.tensor([0, 4, len(tokens)], dtype=torch.int32)
        places = torch.cat((torch.arange(4), torch.arange(len(tokens) - 4)))
        weights = torch.randn(len(tokens), 53, generator=generator, dtype=torch.float64)
        with accumulated(model, row == rows - 1):
            hidden = model(tokens, places, borders, len(tokens) - 4)
            value = (model.logits(hidden) * weights).sum() * (number != 3)
            value.backward()
        loss += value.detach()
    if lose and world.tensor_rank == 1:
        for parameter in model.parameters():
            parameter.grad = None if parameter.grad is None else parameter.grad * 0
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    found = {"norm": clip_gradients(trained, 0.0), "loss": world.sum(loss)}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            gradient = parameter.grad.detach()
            if hasattr(parameter, "tensor_share"):
                gradient.tensor_share = parameter.tensor_share
            found[f"gradient of {name}"] = whole(gradient)
    return found


def texts(model: Decoder) -> list[list[int]]:
    prompts = [[5, 6, 7], [9], [1, 2, 3, 4, 5, 6]]
    model.eval()
    with gathered(model):
        written = generate(
            model, prompts, GenerateOptions(do_sample=True, max_new_tokens=9), stop_ids=(), seeds=[1, 2, 3]
        )
    model.train()
    return [text.ids for text in written]


def checked(folder, ports: dict[str, str]) -> int:
    """In a child: every case of these worlds; what rank 0 found goes to <folder>/<world>-<case>.pt."""
    for name, port in ports.items():
        os.environ["MASTER_PORT"] = port
        world = parallel.world.start("cpu", 60, WORLDS[name][1])
        for case in CASES:
            found = of_ranks(case, WORLDS[name][1], world)
            if world.is_main:
                torch.save(found, folder / f"{name}-{case}.pt")
        parallel.world.stop()
    return 0


def of_ranks(case: str, options: ParallelOptions, world: World) -> dict:
    model = made(case, options)
    before = {each: parameter.detach().clone() for each, parameter in model.named_parameters()}
    distribute(model, world, options)
    for each, parameter in model.named_parameters():
        assert whole_shape(parameter) == before[each].shape, each
        assert torch.equal(whole(parameter), before[each]), each
        assign(parameter, before[each])
        assert torch.equal(whole(parameter), before[each]), each
    found = step(model, world) | {"texts": texts(model)}
    model.zero_grad()
    return found | {"lost": step(model, world, lose=True)}


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """What each world found, of one start of the ranks for each number of them."""
    folder, children = tmp_path_factory.mktemp("tensor"), []
    for size in (3, 4):
        ports = {name: meeting() for name, (ranks, _) in WORLDS.items() if ranks == size}
        children += fork_ranks(checked, (folder, ports), folder / str(size), size)
    wait_for_all(children, 900)
    return folder


def worst(found: dict, truth: dict) -> float:
    sizes = {name: value.abs().max().clamp_min(1e-9) for name, value in truth.items()}
    return max(float((found[name] - truth[name]).abs().max() / sizes[name]) for name in truth)


@pytest.mark.parametrize(("name", "case"), list(itertools.product(WORLDS, CASES)))
def test_gradients_and_texts_are_those_of_one_process(measured, name, case):
    found = torch.load(measured / f"{name}-{case}.pt")
    model = made(case, WORLDS[name][1])
    truth = step(model, ALONE)
    assert worst(found, truth) < 1e-9
    assert worst(found["lost"], truth) > 0.1  # and a rank's gradient is missed
    assert found["texts"] == texts(model)
