"""Optimizers whose parameters are spread over ranks step as in one process, or are refused by name."""

import os

import pytest
import torch
from tiny_runs import fork_ranks, meeting, wait_for_all

import parallel.world
from architectures.config import ModelConfig
from architectures.rope import Rope
from model import Decoder, initialize_weights
from options import config
from options.errors import UserError
from parallel.fsdp import distribute, settle, whole
from parallel.options import ParallelOptions
from parallel.world import World
from train import update
from training import setup
from training.optimizers import make_optimizer
from training.options import OptimOptions

# odd sizes: shares of 2 ranks differ
SIZES = {"vocab_size": 53, "hidden_size": 11, "intermediate_size": 21, "num_layers": 2, "max_positions": 64}
SIZES |= {
    "num_heads": 3,
    "num_kv_heads": 1,
    "head_dim": 6,
    "sliding_windows": (None, None),
    "norm_eps": 1e-5,
    "initializer_range": 0.3,
}
ALONE = World(0, 1, 0, torch.device("cpu"))
SHARED = ("adamw_torch", "sgd", "adafactor")  # in every mode
OF_BITSANDBYTES = ("adamw_8bit", "lion_8bit", "lion_32bit")  # with all of a parameter on each rank
CASES = [(name, mode, torch.float32) for name in SHARED for mode in ("ddp", "fsdp")]
CASES += [(name, "ddp", torch.float32) for name in OF_BITSANDBYTES]
CASES += [("adamw_torch", mode, torch.bfloat16) for mode in ("ddp", "fsdp")]


class Rows:
    """A stage of one row per rank, of which rank 1 may have one that overflows."""

    def __init__(self, overflows: bool = False):
        self.overflows = overflows

    def weight(self, row: int) -> float:
        return 7 + 3 * row

    def loss(self, model: Decoder, row: int):
        generator = torch.Generator().manual_seed(row)
        tokens = torch.randint(53, (7 + 3 * row,), generator=generator)
        borders = torch.tensor([0, len(tokens)], dtype=torch.int32)
        weights = torch.randn(len(tokens), 53, generator=generator).to(model.embed_tokens.weight.dtype)
        hidden = model(tokens, torch.arange(len(tokens)), borders, len(tokens))
        value = (model.logits(hidden).float() * weights.float()).sum()
        return value * (torch.inf if self.overflows and row == 1 else 1.0), {}


def stepped(optim: str, dtype: torch.dtype, world: World, mode: str) -> dict[str, torch.Tensor]:
    """The weights after three updates on two rows. A fourth, with fp16's scaler, overflows on one rank alone:
    all leave it out."""
    model = Decoder(ModelConfig(**SIZES, rope=Rope(theta=1e4)), dtype=torch.float32)
    initialize_weights(model, torch.Generator().manual_seed(3))
    model = model.to(dtype)
    model.runtime.compute_dtype = dtype
    distribute(model, world, ParallelOptions(parallel=mode))
    optimizer = make_optimizer(model, OptimOptions(optim=optim, learning_rate=0.01, weight_decay=0.1))
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    mine = [0, 1] if world.size == 1 else [world.rank]
    for _ in range(3):
        update(model, optimizer, Rows(), mine, scaler, world, 1.0)
    settle(model)
    found = {name: whole(parameter).clone() for name, parameter in model.named_parameters()}
    if optim in ("sgd", "adamw_torch"):
        scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
        update(model, optimizer, Rows(overflows=True), mine, scaler, world, 1.0)
        settle(model)
        for name, parameter in model.named_parameters():
            assert torch.equal(whole(parameter), found[name]), f"{name} changed on rank {world.rank}"
        assert scaler.get_scale() == 32.0
    return found


def run_cases(folder, ports: list[str]) -> int:
    """In a child: every case; rank 0 keeps what it found, and all hold the same."""
    for number, (port, (optim, mode, dtype)) in enumerate(zip(ports, CASES)):
        os.environ["MASTER_PORT"] = port
        world = parallel.world.start("cpu", 60, ParallelOptions(parallel=mode))
        found = stepped(optim, dtype, world, mode)
        for name, value in found.items():
            assert torch.equal(world.from_main(value.clone()), value), (optim, mode, name)
        if world.is_main:
            torch.save(found, folder / f"{number}.pt")
        parallel.world.stop()
    return 0


def test_two_ranks_step_as_one_process(tmp_path):
    ports = [meeting() for _ in CASES]
    wait_for_all(fork_ranks(run_cases, (tmp_path, ports), tmp_path / "ranks", 2), 600)
    for number, (optim, mode, dtype) in enumerate(CASES):
        found, truth = torch.load(tmp_path / f"{number}.pt"), stepped(optim, dtype, ALONE, mode)
        for name, value in truth.items():
            far = (found[name] - value).abs().max() / value.abs().max()
            # codes of 8 bits and chance turn a last bit into a step of a code
            limit = {"8bit": 2e-3}.get(optim.rpartition("_")[2], 1e-5 if dtype is torch.float32 else 2e-2)
            assert far < limit, (optim, mode, dtype, name, float(far))


@pytest.mark.parametrize("name", ["adamw_8bit", "paged_adamw_32bit"])
@pytest.mark.parametrize("mode", ["parallel=fsdp", "parallel=hsdp dp_shard_size=2", "tp_size=2"])
def test_what_needs_whole_parameters_is_refused_by_name(name, mode):
    words = f"output_dir=x model_name_or_path=m dataset=d optim={name} {mode}".split()
    with pytest.raises(UserError, match=rf"optim={name}.*set optim=adamw_torch"):
        config.load(words, setup.SECTIONS, program="train.py", description="")
