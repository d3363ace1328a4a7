"""The planner's peak is what a rank holds: live bytes of tensors, counted by a dispatch mode."""

import json
import os
import weakref
from pathlib import Path

import pytest
import torch
from tiny_runs import TinyRuns, fork_ranks, meeting, tiny_runs, wait_for_all
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

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
    "tp": {"tp_size": 2},
    "cp": {"parallel": "fsdp", "cp_size": 2},
}
CASES = {f"{mode} {name}": {**keys, **method} for mode, keys in MODES.items()
         for name, method in {"full": FULL, "lora": LORA}.items()}  # fmt: skip


class LiveBytes(TorchDispatchMode):
    """peak: the most bytes at a time of all storages that an operation has read or made since it was entered,
    but for those of `base`. The engine empties storages and fills them again, so sizes are asked for anew."""

    def __init__(self, base: list[torch.Tensor]):
        super().__init__()
        self.peak, self.known = 0, {}
        self.base = {_storage(each)._cdata for each in base}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for each in tree_leaves((args, kwargs, result)):
            if torch.is_tensor(each) and each.device.type == "cpu":
                storage = _storage(each)
                if storage._cdata not in self.base:
                    self.known.setdefault(storage._cdata, weakref.ref(storage))
        live = {key: storage for key, found in self.known.items() if (storage := found()) is not None}
        self.peak = max(self.peak, sum(storage.nbytes() for storage in live.values()))
        self.known = {key: self.known[key] for key in live}
        return result


def _storage(tensor: torch.Tensor) -> torch.UntypedStorage:
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).untyped_storage()


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
            base = sum({_storage(each)._cdata: _storage(each).nbytes() for each in held}.values())
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
        keys = {"model_name_or_path": made.folder / "large", "max_steps": 2, "num_train_epochs": None}
        keys |= {"per_device_train_batch_size": 16, "gradient_checkpointing": "none"}
        runs = [(made.words(case, **keys, **CASES[case]), mode_of(case), meeting()) for case in CASES]
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
