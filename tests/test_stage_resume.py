"""Every stage, broken off anywhere and resumed, ends with the bits of a run that never stopped."""

import signal

import pytest
from stage_runs import all_stages, held_out, stage_keys, write_stage_data
from test_resume import assert_equal_runs, halves
from tiny_runs import tiny_runs

from stages import WRITES

# 12 examples in micro-batches of 2: 3 updates of 2 micro-batches an epoch; ppo draws 4 of them at once and makes 4
# updates of those, grpo draws 2 and makes 2
SHORT = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "num_train_epochs": None, "max_steps": 7}
DRAWS = {"ppo": {"ppo_buffer_size": 2}}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    with tiny_runs(tmp_path_factory.mktemp("stages")) as made:
        write_stage_data(made)
        yield made


def keys_of(tiny, stage: str, **keys) -> dict:
    return stage_keys(tiny, stage, **SHORT, **DRAWS.get(stage, {}), **keys)


# 3 is in the middle of the first epoch, 5 between two log lines; both are in the middle of a draw
@pytest.mark.parametrize("stop", [3, 5])
@pytest.mark.parametrize("stage", all_stages("pt", "sft"))
def test_a_stage_resumes_exactly(tiny, stage, stop):
    halves(tiny, f"{stage}{stop}", stop, **keys_of(tiny, stage), **held_out(stage))


@pytest.mark.parametrize("stage", all_stages("pt", "sft"))
def test_full_weights_resume_exactly(tiny, stage):
    """Where the reference is the start: that of the run, not of the checkpoint."""
    halves(tiny, f"{stage}-full", 3, **keys_of(tiny, stage, finetuning_type="full", learning_rate=1e-3))


@pytest.mark.parametrize("stage", all_stages("pt", "sft", *WRITES))
def test_packed_rows_resume_exactly(tiny, stage):
    keys = keys_of(tiny, stage, packing=True, cutoff_len=512) | {"per_device_train_batch_size": 1}
    halves(tiny, f"{stage}-packed", 3, **keys | {"gradient_accumulation_steps": 1})


# what each stage keeps is resumed above; a kill tells whether it is on the disk whole, for which two kinds will do
@pytest.mark.parametrize("stage", ["dpo", "ppo"])
def test_kill_9_changes_nothing(tiny, stage):
    keys = keys_of(tiny, stage, save_strategy="steps", save_steps=1, save_total_limit=2)
    assert tiny.train(f"{stage}-unhurt", **keys) == 0
    name = f"{stage}-killed"
    for steps in (2, 5):
        child = tiny.child(name, **keys)
        child.wait_for(lambda steps=steps: max(tiny.checkpoints(name), default=0) >= steps)
        child.signal(signal.SIGKILL)
        child.wait()
    assert tiny.train(name, **keys) == 0
    assert_equal_runs(tiny, f"{stage}-unhurt", name)
