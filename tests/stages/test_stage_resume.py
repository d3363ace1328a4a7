"""Every stage, broken off anywhere and resumed, ends with the bits of a run that never stopped."""

import shutil
import signal

import pytest
from stage_runs import all_stages, held_out, stage_keys, write_stage_data
from tiny_runs import tiny_runs

from stages import WRITES
from tests.training.test_resume import assert_equal_runs, halves
from training import run_folder

# 12 examples in micro-batches of 2: 3 updates of 2 micro-batches an epoch; ppo draws 4 of them at once and
# makes 4 updates of those, grpo draws 2 and makes 2
SHORT = {
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "num_train_epochs": None,
    "max_steps": 7,
}
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


def test_a_run_is_not_continued_on_files_that_have_changed(tiny, capsys):
    """Their names are the same; a run in the place of the adapter that it trains on is its own business."""
    program = tiny.folder / "rewards.py"
    shutil.copyfile(tiny.folder / "stages" / "rewards.py", program)
    other = tiny.make_model("other", seed=5)
    assert tiny.train("below", **stage_keys(tiny, "sft", max_steps=1)) == 0
    keys = keys_of(
        tiny, "grpo", save_strategy="steps", save_steps=1, reward_file=program, ref_model=other, beta=0.1
    )
    keys |= {"adapter_name_or_path": tiny.folder / "below"}
    assert tiny.train("changed", **keys | {"max_steps": 1}) == 0
    for key, file in (
        ("reward_file", program),
        ("ref_model", other / "model.safetensors"),
        ("adapter_name_or_path", tiny.folder / "below" / "adapter_model.safetensors"),
    ):
        content = file.read_bytes()
        file.write_bytes(content + b"\n" if file == program else content[:-1] + bytes([content[-1] ^ 1]))
        capsys.readouterr()
        assert tiny.train("changed", **keys | {"max_steps": 2}) == 2
        assert f"other settings: content of {key} was " in capsys.readouterr().err
        file.write_bytes(content)
    assert tiny.train("changed", **keys | {"max_steps": 2}) == 0
    inside = keys | {
        "adapter_name_or_path": tiny.folder / "changed",
        "overwrite_output_dir": True,
        "max_steps": 1,
    }
    assert tiny.train("changed", **inside) == 0  # writes another adapter
    assert tiny.train("changed", **inside | {"overwrite_output_dir": False, "max_steps": 2}) == 0


def test_a_digest_sees_every_byte_of_a_small_file_and_pieces_of_a_large_one(tmp_path, monkeypatch):
    monkeypatch.setattr(run_folder, "PIECES", 4)
    monkeypatch.setattr(run_folder, "PIECE_BYTES", 10)

    def digest(size: int, changed: int | None = None) -> str:
        content = bytearray(size)
        if changed is not None:
            content[changed] = 1
        (tmp_path / "weights").write_bytes(content)
        return run_folder.digest([tmp_path / "weights"])

    assert len({digest(39), *(digest(39, place) for place in range(39))}) == 40
    assert sum(digest(400, place) != digest(400) for place in range(400)) == 40
    assert digest(400, 300) != digest(400) and digest(0) != digest(1)


# what each stage keeps is resumed above; a kill tells whether it is on the disk whole, for which two kinds
# will do
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
