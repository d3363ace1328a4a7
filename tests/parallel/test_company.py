"""Ranks that hold shares of a model write and score texts of their own: gather_for_generation."""

import os
import time

import pytest
import torch
from live_bytes import LiveBytes
from tiny_runs import fork_ranks, meeting, wait_for_all

import generation.generate
import parallel.world
from architectures.config import ModelConfig
from architectures.rope import Rope
from generation.company import called_alone
from generation.generate import generate
from generation.sampling import GenerateOptions
from model import Decoder, initialize_weights
from parallel.fsdp import accumulated, distribute
from parallel.options import ParallelOptions
from parallel.world import World

SIZES = {"vocab_size": 53, "hidden_size": 64, "intermediate_size": 256, "num_layers": 6, "max_positions": 64}
SIZES |= {"num_heads": 4, "num_kv_heads": 4, "head_dim": 16, "sliding_windows": (None,) * 6}
SIZES |= {"norm_eps": 1e-5, "rope": Rope(theta=1e4), "initializer_range": 0.3}
IN_BLOCKS = {"gather_for_generation": False}
WORLDS = {  # of four ranks
    "fsdp, gathered": ParallelOptions(parallel="fsdp"),
    "fsdp": ParallelOptions(parallel="fsdp", **IN_BLOCKS),
    "fsdp that keeps what it gathered": ParallelOptions(
        parallel="fsdp", fsdp_reshard_after_forward=False, **IN_BLOCKS
    ),
    "hsdp": ParallelOptions(parallel="hsdp", dp_shard_size=2, **IN_BLOCKS),
    "fsdp x tp": ParallelOptions(parallel="fsdp", tp_size=2, **IN_BLOCKS),
    "fsdp x cp": ParallelOptions(parallel="fsdp", cp_size=2, **IN_BLOCKS),
    "ddp": ParallelOptions(parallel="ddp", **IN_BLOCKS),
}
FAILS = "one of them fails"
PROMPTS = [[5, 6, 7], [9], [1, 2, 3, 4, 5, 6]]
OF_RANKS = [(3, 9), (0, 0), (2, 3), (1, 12)]  # by data_rank: texts, tokens of each


def made() -> Decoder:
    model = Decoder(ModelConfig(**SIZES))
    initialize_weights(model, torch.Generator().manual_seed(3))
    return model


def written(model: Decoder, data_rank: int) -> list:
    """The texts of this rank, and a sum over each prompt's hidden states, which are asked for without a
    cache."""
    texts, tokens = OF_RANKS[data_rank]
    options = GenerateOptions(max_new_tokens=max(tokens, 1))
    model.eval()
    with called_alone(model):
        found = generate(model, PROMPTS[:texts], options, stop_ids=(), seeds=[1, 2, 3][:texts])
        rows = [
            (torch.tensor(ids), torch.arange(len(ids)), torch.tensor([0, len(ids)], dtype=torch.int32))
            for ids in PROMPTS[:texts]
        ]
        with torch.no_grad():
            sums = [model(*row, len(row[0])).sum().item() for row in rows]
    model.train()
    return [[text.ids for text in found], sums]


def learn(model: Decoder, world: World) -> None:
    """A backward pass, for which nothing of the texts may be in the way."""
    with accumulated(model, last=True):
        row = torch.arange(7), torch.arange(7), torch.tensor([0, 7], dtype=torch.int32), 7
        model.logits(model(*row)).logsumexp(-1).sum().backward()
    assert all(p.grad is not None and p.grad.norm() > 0 for p in model.parameters())


def in_a_rank(folder, ports: dict[str, str]) -> int:
    choose = generation.generate.choose
    for name in WORLDS:
        os.environ["MASTER_PORT"] = ports[name]
        world = parallel.world.start("cpu", 200, WORLDS[name])
        if world.context_rank or world.tensor_rank:  # rounds differently from the first of its group

            def another(*given):
                return (choose(*given) + 1) % SIZES["vocab_size"]

            generation.generate.choose = another
        model = made()
        distribute(model, world, WORLDS[name])
        with LiveBytes(list(model.parameters())) as live:
            found = [written(model, world.data_rank)]
        learn(model, world)
        found.append(written(model, world.data_rank))
        torch.save({"found": found, "peak": live.peak}, folder / f"{name}-{world.rank}.pt")
        generation.generate.choose = choose
        parallel.world.stop()
    os.environ["MASTER_PORT"] = ports[FAILS]
    return 0 if hears_of_a_failure(parallel.world.start("cpu", 200, WORLDS["fsdp"])) else 1


def hears_of_a_failure(world: World) -> bool:
    """Where one fails in its own calls and goes, the others are not left waiting."""
    model = made()
    distribute(model, world, WORLDS["fsdp"])
    begun = time.monotonic()
    try:
        with called_alone(model):
            if world.rank == 3:
                raise MemoryError
    except (RuntimeError, MemoryError) as error:
        parallel.world.stop()
        return isinstance(error, MemoryError) == (world.rank == 3) and time.monotonic() - begun < 30
    return False


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("company")
    ports = {name: meeting() for name in (*WORLDS, FAILS)}
    wait_for_all(fork_ranks(in_a_rank, (folder, ports), folder / "ranks", 4), 900)
    return folder


@pytest.mark.parametrize("name", WORLDS)
def test_ranks_write_and_score_as_many_texts_as_they_like(folder, name):
    """Those of one process, also after a backward pass; ranks of a group those of its first."""
    together = WORLDS[name].tp_size * WORLDS[name].cp_size
    for rank in range(4):
        texts, sums = written(made(), rank // together)
        assert len(texts) == OF_RANKS[rank // together][0]
        for found in torch.load(folder / f"{name}-{rank}.pt")["found"]:
            assert found[0] == texts
            assert found[1] == pytest.approx(sums, rel=1e-4, abs=1e-4)


def test_a_rank_never_holds_more_than_its_share_and_three_blocks(folder):
    model = made()
    block = sum(parameter.nbytes for parameter in model.layers[0].parameters())
    outside = 2 * model.embed_tokens.weight.nbytes
    peaks = {name: torch.load(folder / f"{name}-0.pt")["peak"] for name in WORLDS}
    cache = 6 * 2 * 3 * (6 + 9) * 64 * 4
    assert peaks["fsdp, gathered"] > 6 * block + outside
    for name in ("fsdp", "hsdp", "fsdp x cp", "fsdp that keeps what it gathered"):
        assert peaks[name] < 3 * block + 2 * outside + cache, (name, peaks, block)
