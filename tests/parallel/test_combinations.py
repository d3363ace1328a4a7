"""Options beside a mode that change what is kept, trained or read: two ranks train what one process trains,
or they are refused by name."""

import pytest
import torch
from parallel_cells import LIMIT, MODES, ROWS
from stage_runs import stage_keys, write_stage_data
from tiny_runs import start_ranks_in_turn, tiny_runs, wait_for_all

from options.errors import UserError
from parallel.options import ParallelOptions
from training.weights import refuse_mixed

FULL, LORA = {"finetuning_type": "full"}, {"lora_rank": 3}
ONE_ROW_EACH_SAVE = {"val_size": 1, "evaluation_strategy": "steps", "eval_steps": 1, "save_strategy": "steps"}
ONE_ROW_EACH_SAVE |= {"save_steps": 1, "load_best_model_at_end": True, "save_only_model": True}
CASES = {  # keys, modes
    "inputs of blocks in host memory": (FULL | {"gradient_checkpointing": "offload"}, ("fsdp", "tp", "ring")),
    "compiled": (LORA | {"torch_compile_backend": "eager", "gradient_checkpointing": True}, ("fsdp", "cp")),
    "embedding and head": (LORA | {"additional_target": "embed_tokens,lm_head"}, ("tp", "cp")),
    "packed": (LORA | {"packing": True, "cutoff_len": 48}, ("cp", "ring")),
    "one row to evaluate on": (FULL | ONE_ROW_EACH_SAVE, ("fsdp",)),
    "fewer rows than ranks": (LORA | {"max_samples": 1}, ("fsdp", "cp")),
    "stream": (LORA | {"streaming": True, "buffer_size": 7}, ("cp",)),
    "drawn weights": (FULL | {"train_from_scratch": True}, ("fsdp",)),
}
RUNS = [(case, mode) for case, (_, modes) in CASES.items() for mode in modes]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    with tiny_runs(tmp_path_factory.mktemp("combinations")) as made:
        write_stage_data(made, count=11)
        words = []
        for case, mode in RUNS:
            rows = 2 if case == "packed" else ROWS
            each = rows // ParallelOptions(**MODES[mode]).data(2)
            sizes = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": each}
            words.append(made.words(f"{case} {mode}", **keys_of(made, case), **sizes, **MODES[mode]))
        ranks = start_ranks_in_turn(words, made.folder / "ranks", 2)
        for case in CASES:
            rows = {"per_device_train_batch_size": 2 if case == "packed" else ROWS}
            assert made.train(case, **keys_of(made, case), **rows) == 0
        wait_for_all(ranks, 1200)
        yield made


def keys_of(tiny, case: str) -> dict:
    short = {"max_steps": 2, "num_train_epochs": None, "optim": "sgd", "learning_rate": 0.05, "seed": 3}
    return stage_keys(tiny, "sft", **short | CASES[case][0])


@pytest.mark.parametrize(("case", "mode"), RUNS)
def test_two_ranks_train_what_one_process_trains(tiny, case, mode):
    for key in ("loss", "grad_norm", "eval_loss"):
        mine, others = tiny.losses(f"{case} {mode}", key), tiny.losses(case, key)
        assert mine == pytest.approx(others, rel=LIMIT, abs=LIMIT)
    mine, others = tiny.weights(f"{case} {mode}"), tiny.weights(case)
    assert mine.keys() == others.keys()
    for name, weight in others.items():
        assert (mine[name] - weight).abs().max() <= LIMIT * weight.abs().max().clamp_min(1e-9), name


def test_weights_of_two_kinds_that_train_in_a_block_are_refused():
    block = torch.nn.Sequential(torch.nn.Linear(2, 2).bfloat16(), torch.nn.RMSNorm(2))
    with pytest.raises(UserError, match="pure_bf16: bfloat16 and float32 train side by side"):
        refuse_mixed(block)
    refuse_mixed(block[1].requires_grad_(False) and block)
