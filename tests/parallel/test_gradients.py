"""Every way to spread a model gives the gradients of one process in float64, and the texts; layers cut over
ranks its files too."""

import itertools
import os
import re

import pytest
import torch
from stage_runs import held_out, stage_keys, write_stage_data
from tiny_runs import assert_same_weights, fork_ranks, meeting, start_ranks_in_turn, tiny_runs, wait_for_all

import parallel.world
from architectures.config import ModelConfig
from architectures.rope import Rope
from generation.company import called_alone
from generation.generate import generate
from generation.sampling import GenerateOptions
from kernels.recompute import Plan
from lora import LoraOptions, add_lora
from model import Decoder, initialize_weights
from options import config
from options.errors import UserError
from parallel.fsdp import accumulated, assign, distribute, whole, whole_shape
from parallel.options import ParallelOptions
from parallel.world import World
from training.optimizers import clip_gradients
from training.setup import SECTIONS, check_sizes

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
    "cp 3": (3, ParallelOptions(cp_size=3)),
    "fsdp 4": (4, ParallelOptions(parallel="fsdp")),
    "hsdp 2 x 2": (4, ParallelOptions(parallel="hsdp", dp_shard_size=2)),
    "fsdp x ring 2": (4, ParallelOptions(cp_size=2, cp_mode="ring", parallel="fsdp")),
    "ring 2 x tp 2": (4, ParallelOptions(cp_size=2, cp_mode="ring", tp_size=2)),
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
    rows differ in length, and one of them is not trained on. lose: the first rank's are left out."""
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
            (value / world.context * (not (lose and world.rank == 0))).backward()
        loss += value.detach()
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
    with called_alone(model):
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


# Whole runs of two ranks, one after another in the same processes


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    with tiny_runs(tmp_path_factory.mktemp("tensor-runs")) as made:
        write_stage_data(made)
        keys = {"max_steps": 2, "learning_rate": 1e-2, "lora_rank": 2}
        assert made.train("judge", **stage_keys(made, "rm", **keys)) == 0
        made.make_model("other", seed=5)
        yield made


def runs_of(tiny) -> dict[str, dict]:
    """Keys by the name of the run."""
    short = {"max_steps": 4, "lora_rank": 3, "optim": "sgd", "learning_rate": 0.05, "num_train_epochs": None}
    short |= {"per_device_train_batch_size": 4}
    begin = tiny.folder / "saved-2/checkpoint-2"
    texts = {"predict_with_generate": True, "do_predict": True, "do_sample": False, "max_new_tokens": 5}
    saved = {"optim": "adamw_torch", "learning_rate": 1e-3, "save_strategy": "steps", "save_steps": 2}
    saved |= {"finetuning_type": "full", "do_train": True, "lora_rank": None} | held_out("sft") | texts
    judge, base = {"reward_model": tiny.folder / "judge", "reward_file": None}, {"reward_model": tiny.model}
    of_model = {"reward_model_type": "full", "reward_model_adapters": tiny.folder / "judge"}
    return {
        "saved": stage_keys(tiny, "sft", **short | saved),
        "resumed": stage_keys(tiny, "sft", **short | saved, resume_from_checkpoint=begin),
        "by adapter": stage_keys(tiny, "ppo", **short | judge),
        "by model": stage_keys(tiny, "grpo", **short | judge | base | of_model),
        "other reference": stage_keys(tiny, "dpo", **short, ref_model=tiny.folder / "other"),
    }  # fmt: skip


def test_runs_of_two_ranks_are_those_of_one_process(tiny):
    """Checkpoint and resume, evaluation, texts, references and both kinds of reward models."""
    runs = runs_of(tiny)
    words = [tiny.words(f"{name}-2", **keys, tp_size=2) for name, keys in runs.items()]
    children = start_ranks_in_turn(words, tiny.folder / "two", 2)
    for name in runs.keys() - {"resumed"}:
        assert tiny.train(f"{name}-1", **runs[name]) == 0
    wait_for_all(children, 900)
    assert children[1].text() == "" and "resuming" in children[0].text()  # only rank 0 speaks
    for name in runs:
        alone = "saved-1" if name == "resumed" else f"{name}-1"
        for key in ("loss", "grad_norm", "reward"):
            mine, theirs = tiny.losses(f"{name}-2", key), tiny.losses(alone, key)
            assert mine == pytest.approx({step: theirs[step] for step in mine}, rel=1e-5, abs=1e-5), name
        tolerance = 1e-4 if "saved" in alone else 1e-5  # Adam divides small gradients by their own size
        assert_same_weights(tiny.weights(f"{name}-2"), tiny.weights(alone), tolerance)
    assert_same_weights(tiny.weights("saved-2"), tiny.weights("resumed-2"))  # bit for bit
    seen = [tiny.losses(f"saved-{ranks}", "eval_loss") for ranks in (1, 2)]
    assert seen[0] and seen[1] == pytest.approx(seen[0], rel=1e-5)
    texts = [(tiny.folder / f"saved-{ranks}/generated_predictions.jsonl").read_text() for ranks in (1, 2)]
    assert texts[0] == texts[1] != ""


# What cannot be


@pytest.mark.parametrize(
    ("size", "changes", "said"),
    [
        (
            2,
            {},
            "tp_size: 2 does not divide 9 heads, 3 key and value heads and an MLP of 21, as it has (3 would)",
        ),
        (3, {"intermediate_size": 22}, "(nothing else would)"),
        (3, {"feed_forward_kinds": ("mlp", "moe", "mlp")}, "it cuts attention and mlp, it has moe"),
    ],
)
def test_sizes_and_layers_that_cannot_be_cut_are_refused_by_name(size, changes, said):
    model = ModelConfig(**SIZES | changes)
    check_sizes(ParallelOptions(), model, "it")
    with pytest.raises(UserError, match=re.escape(said)):
        check_sizes(ParallelOptions(tp_size=size), model, "it")


@pytest.mark.parametrize(
    "other", ["quantization_bit=4", "fp16=true", "use_dora=true", "torch_compile=true", "optim=adafactor"]
)
def test_options_that_need_whole_layers_are_refused_by_name(other):
    words = ["model_name_or_path=m", "dataset=d", "output_dir=o", "tp_size=2", other]
    with pytest.raises(UserError, match=f"tp_size.*{other.partition('=')[0]}.*: .*set "):
        config.load(words, SECTIONS, program="train.py", description="")
