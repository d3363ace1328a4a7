"""Weights that no rank holds whole: each block is shared as soon as it is read, codes stay shares between
steps, and what is trained is what one process trains."""

import json
import os
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from parallel_cells import LIMIT, difference
from tiny_runs import TinyRuns, fork_ranks, meeting, tiny_runs, wait_for_all
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from vendor_checkpoints import write_pair

import train
from parallel.fsdp import local, settle
from quant.linear import quantised_linears
from training.weights import Parts

ROWS = 8  # of an update
WIDE = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32}
ADAPTED = {"lora_rank": 4}
# a large epsilon: else AdamW divides small gradients by their own size, and roundings with them
ADAMW = {"finetuning_type": "full", "optim": "adamw_torch", "adam_epsilon": 0.1, "parallel": None}
ZERO = {
    f"zero {stage}": ADAMW | {"deepspeed": {"zero_optimization": {"stage": stage}}} for stage in (1, 2, 3)
}
CASES = {  # keys, sizes of the model
    "tied head": ({"finetuning_type": "full"}, {"tie_word_embeddings": True}),
    "freeze": ({"finetuning_type": "freeze", "num_layer_trainable": 1}, {}),
    "offload": ({"finetuning_type": "full", "fsdp_offload": True}, {}),
    "dora": ({"use_dora": True, **ADAPTED}, {}),
    "embedding": ({"additional_target": "embed_tokens", **ADAPTED}, {"tie_word_embeddings": True}),
    "adapter": ({"adapter_name_or_path": "dora"}, {}),
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
    if case == "adapter":
        keys["adapter_name_or_path"], folder = tiny.folder / "dora one", tiny.folder / "model of dora"
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
    plain, ready = train.update, Parts.__call__
    for argv, port in runs:
        os.environ["MASTER_PORT"] = port
        seen: dict[str, list] = {"whole": [], "codes": [], "gathers": [], "state": []}

        def noted_ready(self: Parts, model, part: str, seen=seen) -> None:
            ready(self, model, part)
            here = [p for p in model.parameters() if not (p.is_meta or isinstance(p, DTensor))]
            seen["whole"].append([part, sum(p.nbytes for p in here)])

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

        train.update, Parts.__call__ = noted_update, noted_ready
        if status := train.main(argv):
            return status
        folder = Path(dict(word.split("=", 1) for word in argv)["output_dir"])
        (folder / f"seen-{os.environ['RANK']}.json").write_text(json.dumps(seen))
    return 0


# Beside them


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    with tiny_runs(tmp_path_factory.mktemp("shares")) as made:
        shared = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": ROWS // 2}
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
    for rank in range(2):
        *blocks, outside = seen(tiny, case, rank)["whole"]
        assert len(blocks) == 2 and all(part and whole == 0 for part, whole in blocks)
        assert outside[0] == "" and outside[1] > 0


@pytest.mark.parametrize("case", CODED)
def test_between_steps_a_rank_holds_its_share_of_the_codes(tiny, case):
    for rank in range(2):
        codes = seen(tiny, case, rank)["codes"]
        assert len(codes) == 3
        for held, whole in codes:
            assert 0 < held <= (1 / 2 + 0.05) * whole


def test_zero_1_and_2_share_the_state_and_gather_weights_once_for_an_update(tiny):
    """4 micro-batches, 2 blocks and what lies outside of them; in the third update of 3 rows it is 2."""
    for stage, gathers in {1: 3, 2: 3, 3: 4 * (2 * 2 + 1)}.items():
        for rank in range(2):
            found = seen(tiny, f"zero {stage}", rank)
            assert found["gathers"][:2] == [gathers] * 2
            for held, whole in found["state"]:
                assert 0.4 * whole < held < 0.6 * whole


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
