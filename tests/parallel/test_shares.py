"""Weights that no rank holds whole: each block is shared as soon as it is read, codes stay shares between
steps, and what is trained is what one process trains."""

import json
import os
from pathlib import Path
from typing import NamedTuple

import pytest
from parallel_cells import LIMIT, difference
from tiny_runs import TinyRuns, fork_ranks, meeting, tiny_runs, wait_for_all
from torch.distributed.tensor import DTensor
from vendor_checkpoints import write_pair

import train
from parallel.fsdp import settle
from quant.linear import quantised_linears
from training.weights import Parts

ROWS = 8  # of an update
WIDE = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32}
ADAPTED = {"lora_rank": 4}
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
}
CODED = [name for name in CASES if name.split()[0] in ("nf4", "int8", "hqq", "gptq", "awq")]


class Run(NamedTuple):
    name: str
    alone: str


def words_of(tiny: TinyRuns, case: str, run: str, **others) -> list[str]:
    keys, sizes = CASES[case]
    keys = {
        "parallel": "fsdp",
        **keys,
        "max_steps": 3,
        "num_train_epochs": None,
        "optim": "sgd",
        "learning_rate": 0.05,
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


def run_in_turn(runs: list[tuple[list[str], str]]) -> int:
    """Runs (argv, port) of train.py, with notes of what this rank holds."""
    plain, ready = train.update, Parts.__call__
    for argv, port in runs:
        os.environ["MASTER_PORT"] = port
        seen: dict[str, list] = {"whole": [], "codes": []}

        def noted_ready(self: Parts, model, part: str, seen=seen) -> None:
            ready(self, model, part)
            here = [p for p in model.parameters() if not (p.is_meta or isinstance(p, DTensor))]
            seen["whole"].append([part, sum(p.nbytes for p in here)])

        def noted_update(model, *rest, seen=seen):
            settle(model)
            numbers = [each for layer in quantised_linears(model).values() for each in layer.numbers()]
            held = sum(number.to_local().untyped_storage().nbytes() for number in numbers)
            seen["codes"].append([held, sum(number.nbytes for number in numbers)])
            return plain(model, *rest)

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
        shared = {
            "parallel": "fsdp",
            "per_device_train_batch_size": 1,
            "gradient_accumulation_steps": ROWS // 2,
        }
        for case in CASES:
            one = words_of(made, case, f"{case} one", per_device_train_batch_size=ROWS)
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
