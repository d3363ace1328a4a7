"""The planner's peak is what a rank holds: live bytes of tensors, counted by a dispatch mode."""

import json
import os
from pathlib import Path

import pytest
import torch
from live_bytes import LiveBytes, storage_of
from tiny_runs import TinyRuns, fork_ranks, meeting, tiny_runs, wait_for_all

import train
from kernels.recompute import Plan
from parallel.fsdp import settle
from parallel.options import ParallelOptions
from training import memory, plan

SIZES = {"hidden_size": 256, "intermediate_size": 1024, "head_dim": 64, "num_hidden_layers": 5}
FULL, LORA = {"finetuning_type": "full"}, {"lora_rank": 8}
MODES = {
    "ddp": {"parallel": "ddp"},
    "fsdp": {"parallel": "fsdp"},
    "kept": {"parallel": "fsdp", "fsdp_reshard_after_forward": False},
    "tp": {"tp_size": 2},
    "cp": {"parallel": "fsdp", "cp_size": 2},
}
CASES = {f"{mode} {name}": {**keys, **method} for mode, keys in MODES.items()
         for name, method in {"full": FULL, "lora": LORA}.items()}  # fmt: skip
CASES["fsdp full ends"] = CASES["fsdp full"]  # of a model that has most of its weights outside of the blocks


# In a rank


def run_in_turn(runs: list[tuple[list[str], dict, str]]) -> int:
    plain = train.update
    for argv, mode, port in runs:
        os.environ["MASTER_PORT"] = port
        folder = Path(dict(word.split("=", 1) for word in argv)["output_dir"])
        seen = {"updates": 0}

        def counted(model, optimizer, stage, group, *rest, seen=seen, mode=mode, folder=folder):
            seen["updates"] += 1
            if seen["updates"] != 2:
                return plain(model, optimizer, stage, group, *rest)
            settle(model)
            values = [value for state in optimizer.state.values() for value in state.values()]
            held = [*model.parameters(), *model.buffers(), *filter(torch.is_tensor, values)]
            base = sum({storage_of(each)._cdata: storage_of(each).nbytes() for each in held}.values())
            spread = memory.Spread.of(ParallelOptions(**mode), 2, torch.device("cpu"))
            tokens = max(len(batch.tokens) for batch in group)
            need = memory.need(model, tokens, spread=spread, device="cpu")
            peak = plan.predict_peak(model, Plan(), need, 0.0, torch.device("cuda"), spread=spread)
            with LiveBytes(held) as live:
                result = plain(model, optimizer, stage, group, *rest)
            found = {"base": base, "peak": live.peak + base}
            note = folder.with_name(f"{folder.name} live-{os.environ['RANK']}.json")
            note.write_text(json.dumps(found | {"planned": peak}))
            return result

        train.update = counted
        if status := train.main(argv):
            return status
    return 0


# Beside them


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    with tiny_runs(tmp_path_factory.mktemp("live")) as made:
        made.make_model("large", seed=1, **SIZES)
        made.make_model("ends", seed=1, **SIZES | {"vocab_size": 30000, "num_hidden_layers": 2})
        keys = {"max_steps": 2, "num_train_epochs": None}
        keys |= {"per_device_train_batch_size": 16, "gradient_checkpointing": "none"}
        model = {case: made.folder / ("ends" if "ends" in case else "large") for case in CASES}
        words = {
            case: made.words(case, model_name_or_path=model[case], **keys, **CASES[case]) for case in CASES
        }
        runs = [(words[case], mode_of(case), meeting()) for case in CASES]
        wait_for_all(fork_ranks(run_in_turn, (runs,), made.folder / "ranks", 2), 900)
        yield made


def mode_of(case: str) -> dict:
    return MODES[case.split()[0]]


def seen(tiny: TinyRuns, case: str, rank: int) -> dict:
    return json.loads((tiny.folder / f"{case} live-{rank}.json").read_text())


@pytest.mark.parametrize("case", CASES)
def test_the_planned_peak_is_within_a_tenth_of_the_live_bytes(tiny, case):
    for rank in range(2):
        found = seen(tiny, case, rank)
        planned = found["planned"]
        assert sum(planned.values()) == pytest.approx(found["peak"], rel=0.1)
