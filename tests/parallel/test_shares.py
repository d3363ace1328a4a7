"""Weights that no rank holds whole: each rank reads its rows of the files, and has the numbers of one process
bit by bit; codes stay shares between steps, and what is trained is what one process trains."""

import json
import math
import os
import re
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from parallel_cells import LIMIT, difference
from safetensors.torch import load_file, save_file
from stage_runs import stage_keys, write_stage_data
from tiny_runs import TinyRuns, fork_ranks, meeting, tiny_runs, wait_for_all
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from vendor_checkpoints import write_pair

import parallel.world
import quant
import train
from checkpoints.hub import ModelOptions
from checkpoints.huggingface import load_model, save_model
from checkpoints.shares import Shares
from model import Decoder
from options import config as configuration
from options.errors import UserError
from parallel.fsdp import local, settle, whole
from parallel.options import ParallelOptions
from parallel.world import World
from quant import QuantOptions
from quant.linear import quantised_linears
from training.setup import SECTIONS
from training.weights import build_model

ROWS = 8  # of an update
WIDE = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32}
ADAPTED = {"lora_rank": 4}
# a large epsilon: else AdamW divides small gradients by their own size, and roundings with them
ADAMW = {"finetuning_type": "full", "optim": "adamw_torch", "adam_epsilon": 0.1, "parallel": None}
ZERO = {
    f"zero {stage}": ADAMW | {"deepspeed": {"zero_optimization": {"stage": stage}}} for stage in (1, 2, 3)
}
LIVE = {"stage": "dpo", "precompute_ref_log_probs": False}
CASES = {  # keys, sizes of the model
    "tied head": ({"finetuning_type": "full"}, {"tie_word_embeddings": True}),
    "freeze": ({"finetuning_type": "freeze", "num_layer_trainable": 1}, {}),
    "offload": ({"finetuning_type": "full", "fsdp_offload": True}, {}),
    "dora": ({"use_dora": True, **ADAPTED}, {}),
    "embedding": ({"additional_target": "embed_tokens", **ADAPTED}, {"tie_word_embeddings": True}),
    "adapter": ({"adapter_name_or_path": "dora"}, {}),
    "reference": ({"finetuning_type": "full", **LIVE}, {}),
    "its own reference": ({"adapter_name_or_path": "embedding", **LIVE}, {}),
    "nf4": ({"quantization_bit": 4, **ADAPTED}, WIDE),
    "nf4 offload": ({"quantization_bit": 4, "fsdp_offload": True, **ADAPTED}, WIDE),
    "int8": ({"quantization_bit": 8, **ADAPTED}, WIDE),
    "hqq 4": ({"quantization_bit": 4, "quantization_method": "hqq", **ADAPTED}, WIDE),
    "gptq": (ADAPTED, None),
    "gptq act-order": (ADAPTED, None),
    "awq": (ADAPTED, None),
} | {name: (keys | {"deepspeed": json.dumps(keys["deepspeed"])}, {}) for name, keys in ZERO.items()}
CODED = [name for name in CASES if name.split()[0] in ("nf4", "int8", "hqq", "gptq", "awq")]


class Run(NamedTuple):
    name: str
    alone: str


def words_of(tiny: TinyRuns, case: str, run: str, **others) -> list[str]:
    keys, sizes = CASES[case]
    keys = {
        "parallel": "fsdp",
        "max_steps": 3,
        "num_train_epochs": None,
        "optim": "sgd",
        "learning_rate": 0.05,
        **keys,
        **others,
    }
    folder = tiny.folder / f"model of {case}"
    if sizes is None:
        folder = write_pair(tiny, case)[0]
    elif not folder.exists():
        tiny.make_model(folder.name, seed=4, **sizes)
    if given := keys.get("adapter_name_or_path"):
        keys["adapter_name_or_path"], folder = tiny.folder / f"{given} one", tiny.folder / f"model of {given}"
    if "stage" in keys:
        keys = stage_keys(tiny, **keys)
    return tiny.words(run, model_name_or_path=folder, **keys)


# In a rank


class Gathers(TorchDispatchMode):
    """How often tensors of all ranks are put together."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function.namespace == "c10d" and "gather" in function.name()
        return function(*args, **(kwargs or {}))


def run_in_turn(runs: list[tuple[list[str], str]]) -> int:
    """Runs (argv, port) of train.py, with notes of what this rank holds."""
    plain = train.update
    for argv, port in runs:
        os.environ["MASTER_PORT"] = port
        seen: dict[str, list] = {"codes": [], "gathers": [], "state": []}

        def noted_update(model, optimizer, *rest, seen=seen):
            settle(model)
            numbers = [each for layer in quantised_linears(model).values() for each in layer.numbers()]
            held = sum(number.to_local().untyped_storage().nbytes() for number in numbers)
            seen["codes"].append([held, sum(number.nbytes for number in numbers)])
            with Gathers() as gathers:
                result = plain(model, optimizer, *rest)
            seen["gathers"].append(gathers.count)
            state = [value for values in optimizer.state.values() for value in values.values()]
            moments = [value for value in state if torch.is_tensor(value) and value.dim() > 0]
            seen["state"].append(
                [sum(local(value).nbytes for value in moments), sum(value.nbytes for value in moments)]
            )
            return result

        train.update = noted_update
        if status := train.main(argv):
            return status
        folder = Path(dict(word.split("=", 1) for word in argv)["output_dir"])
        (folder / f"seen-{os.environ['RANK']}.json").write_text(json.dumps(seen))
    return 0


def load_in_turn(groups: list[tuple[str, list]], output: Path) -> int:
    """For each mode (port, [(name, argv)]): what of the loaded model differs from that of one process, how
    many numbers of the files were read, and what was refused."""
    read, seen = Shares._read, {}
    for port, cases in groups:
        os.environ["MASTER_PORT"] = port
        config = configuration.load(cases[0][1], SECTIONS, program="test", description="")
        world = parallel.world.start("cpu", 60, config[ParallelOptions])
        for name, argv in cases:
            config, numbers = configuration.load(argv, SECTIONS, program="test", description=""), []
            Shares._read = lambda self, found, to=numbers: to.append(found.numel()) or read(self, found)
            source = Path(config[ModelOptions].model_name_or_path)
            try:
                shared = build_model(config, source, world)
                seen[name] = {"read": sum(numbers)}
                values = [(name, whole(p), p.requires_grad) for name, p in shared.named_parameters()]
                if world.is_main:
                    words = [word for word in argv if word.partition("=")[0] not in SPREAD]
                    config = configuration.load(words, SECTIONS, program="test", description="")
                    alone = build_model(config, source, World(0, 1, 0, world.device))
                    seen[name] |= unlike(values, alone)
            except UserError as error:
                seen[name] = {"refused": str(error)}
        parallel.world.stop()
    output.with_suffix(f".seen-{os.environ['RANK']}").write_text(json.dumps(seen))
    return 0


def unlike(values: list[tuple[str, Tensor, bool]], alone: Decoder) -> dict:
    """Names of what is not the same, and how many numbers there are that are no adapter's."""
    parameters = dict(alone.named_parameters())
    known, differing = parameters | dict(alone.named_buffers()), []
    for name, mine, trains in values:
        other = known.pop(name).detach()
        same = mine.dtype is other.dtype and torch.equal(mine, other.reshape(mine.shape))
        if not same or trains != (name in parameters and parameters[name].requires_grad):
            differing.append(name)
    layers = quantised_linears(alone).values()
    size = sum(layer.in_features * layer.out_features for layer in layers)
    size += sum(p.numel() for n, p in parameters.items() if not re.search("lora_|magnitude|v_head", n))
    return {"differing": differing + list(known), "whole": size}


# Beside them


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    with tiny_runs(tmp_path_factory.mktemp("shares")) as made:
        shared = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": ROWS // 2}
        write_stage_data(made, count=19)
        for case in CASES:
            alone = {"per_device_train_batch_size": ROWS, "parallel": None, "fsdp_offload": None}
            one = words_of(made, case, f"{case} one", **alone, deepspeed=None)
            assert train.main(one) == 0
        runs = [(words_of(made, case, f"{case} two", **shared), meeting()) for case in CASES]
        made.output = made.folder / "ranks"
        wait_for_all(fork_ranks(run_in_turn, (runs,), made.output, 2), 600)
        yield made


def seen(tiny: TinyRuns, case: str, rank: int) -> dict:
    return json.loads((tiny.folder / f"{case} two" / f"seen-{rank}.json").read_text())


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_with_shares_train_what_one_process_trains(tiny, case):
    assert difference(tiny, Run(f"{case} two", f"{case} one")) < LIMIT


@pytest.mark.parametrize("case", CODED)
def test_between_steps_a_rank_holds_its_share_of_the_codes(tiny, case):
    for rank in range(2):
        codes = seen(tiny, case, rank)["codes"]
        assert len(codes) == 3
        for held, all_of_it in codes:
            assert 0 < held <= (1 / 2 + 0.05) * all_of_it


def test_zero_1_and_2_share_the_state_and_gather_weights_once_for_an_update(tiny):
    """4 micro-batches, 2 blocks and what lies outside of them; in the third update of 3 rows it is 2."""
    for stage, gathers in {1: 3, 2: 3, 3: 4 * (2 * 2 + 1)}.items():
        for rank in range(2):
            found = seen(tiny, f"zero {stage}", rank)
            assert found["gathers"][:2] == [gathers] * 2
            for held, all_of_it in found["state"]:
                assert 0.4 * all_of_it < held < 0.6 * all_of_it


@pytest.mark.parametrize("case", ["offload", "nf4 offload"])
def test_one_process_has_its_weights_in_host_memory_too(tiny, case, monkeypatch):
    plain, spread = train.update, []

    def update(model, *rest):
        settle(model)
        spread.append(all(isinstance(parameter, DTensor) for parameter in model.parameters()))
        return plain(model, *rest)

    monkeypatch.setattr(train, "update", update)
    assert train.main(words_of(tiny, case, f"{case} alone", per_device_train_batch_size=ROWS)) == 0
    assert spread == [True] * 3 and difference(tiny, Run(f"{case} alone", f"{case} one")) < LIMIT


RANKS = 4
SPREAD = ("parallel", "dp_shard_size", "tp_size")
ODD = {"hidden_size": 128, "intermediate_size": 250, "head_dim": 32, "attention_bias": True}
MODES = {
    "fsdp": {"parallel": "fsdp"},
    "hsdp": {"parallel": "hsdp", "dp_shard_size": 2},
    "tp": {"parallel": "fsdp", "tp_size": 2},
}
FOUR = {"quantization_bit": 4}
LOADS = {  # keys, the model where it is not odd
    "full": ({"finetuning_type": "full"}, None),
    "bf16": ({"bf16": True, "additional_target": "embed_tokens"}, None),
    "dora": ({"use_dora": True}, None),
    "goes on": ({"adapter_name_or_path": "first"}, None),
    "merged": ({"adapter_name_or_path": "first,second", "create_new_adapter": True}, None),
    "merged dora": ({"adapter_name_or_path": "dora,first"}, None),
    "scratch": ({"finetuning_type": "full", "train_from_scratch": True}, None),
    "rm": ({"stage": "rm"}, None),
    "nf4": (FOUR, None),
    "nf4 bf16": ({"bf16": True, **FOUR}, None),
    "nf4 dora": ({"use_dora": True, **FOUR}, None),
    "nf4 single": ({"double_quantization": False, **FOUR}, None),
    "fp4": ({"quantization_type": "fp4", **FOUR}, None),
    "int8": ({"quantization_bit": 8}, None),
    "eetq": ({"quantization_bit": 8, "quantization_method": "eetq"}, None),
    "hqq": ({"quantization_method": "hqq", **FOUR}, None),
    "hqq 3": ({"quantization_bit": 3, "quantization_method": "hqq"}, None),
    "stored nf4": ({}, "in nf4"),
    "stored int8": ({}, "in int8"),
    **{f"stored {name}": ({}, name) for name in ("gptq", "gptq act-order", "awq", "aqlm 2x8", "hqq")},
}
BROKEN = {"broken": {}, "broken nf4": FOUR, "broken int8": {"quantization_bit": 8}}
# of those in an order of their own, and of those that are made whole, one linear at a time is read
BY_ROWS = [name for name in LOADS if not re.match("merged|scratch|hqq|stored", name)]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    with tiny_runs(tmp_path_factory.mktemp("loads")) as made:
        odd = made.make_model("odd", seed=4, **ODD)
        for bits in (4, 8):
            format = quant.from_options(QuantOptions(quantization_bit=bits))
            save_model(
                load_model(odd, quantization=format),
                made.folder / f"in {format.table if bits == 4 else 'int8'}",
                odd,
            )
        for name, keys in {"first": {}, "second": {"lora_rank": 3}, "dora": {"use_dora": True}}.items():
            assert made.train(name, model_name_or_path=odd, max_steps=1, num_train_epochs=None, **keys) == 0
        broken = made.make_model("broken", seed=4, **ODD)
        tensors = load_file(broken / "model.safetensors")
        tensors["model.layers.1.mlp.up_proj.weight"][-1, -1] = math.nan
        save_file(tensors, broken / "model.safetensors", {"format": "pt"})
        groups = []
        for mode, spread in MODES.items():
            cases = []
            for name, (keys, model) in (
                LOADS | {name: (keys, "broken") for name, keys in BROKEN.items()}
            ).items():
                if mode == "tp" and re.search("nf4|fp4|int8|eetq|hqq|stored|dora", name):
                    continue  # which is refused
                if mode == "hsdp" and name not in ("full", "merged", "nf4", "int8", "broken"):
                    continue
                folder = odd if model is None else made.folder / model
                if name.startswith("stored") and not folder.exists():
                    folder = (
                        write_pair(made, model)[0] if mode == "fsdp" else made.folder / f"{model} quantised"
                    )
                keys = {"model_name_or_path": folder, **spread, **keys}
                if "adapter_name_or_path" in keys:
                    names = keys["adapter_name_or_path"].split(",")
                    keys["adapter_name_or_path"] = ",".join(str(made.folder / each) for each in names)
                cases.append((f"{mode} {name}", made.words("unused", **keys)))
            groups.append((meeting(), cases))
        made.output = made.folder / "loads"
        wait_for_all(fork_ranks(load_in_turn, (groups, made.output), made.output, RANKS), 600)
        yield [json.loads(made.output.with_suffix(f".seen-{rank}").read_text()) for rank in range(RANKS)]


def test_every_rank_has_its_rows_of_what_one_process_has_bit_by_bit(loaded):
    assert len(loaded[0]) > 35
    found = {name: told.get("differing", told) for name, told in loaded[0].items() if "broken" not in name}
    assert {name: names for name, names in found.items() if names} == {}


@pytest.mark.parametrize("case", BY_ROWS)
def test_a_rank_reads_its_rows_alone(loaded, case):
    for seen in loaded:
        size = loaded[0][f"fsdp {case}"]["whole"]
        assert 0 < seen[f"fsdp {case}"]["read"] <= (1 / RANKS + 0.05) * size


def test_what_is_wrong_with_the_rows_of_one_rank_all_ranks_say(loaded):
    named = "model.safetensors: tensor model.layers.1.mlp.up_proj.weight holds"
    for seen in loaded:
        for name, told in seen.items():
            if "broken" in name:
                assert named in told.get("refused", ""), (name, told)
