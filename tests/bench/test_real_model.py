"""bench/train.py and bench/decode.py on a CPU: both systems compute the same on a model from a folder. Each
device has its own options. The systems take turns as processes there; here they are called in this one."""

import pytest
import torch
from tiny_runs import tiny_runs

pytest.importorskip("peft")

from bench import baselines, decode, train


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    with tiny_runs(tmp_path_factory.mktemp("bench")) as made:
        yield made


@pytest.mark.parametrize("shape, tuning", [("equal", "full"), ("alpaca", "lora")])
def test_both_systems_train_alike(tiny, shape, tuning):
    options = train.ON_CPU | {"model": str(tiny.model), "tuning": tuning, "checkpointing": "full"}
    batches = [
        [row for row in rows if len(row[0]) < 400] for rows in train.make_batches(shape, tiny.model, 2)
    ]
    losses = {}
    with baselines.fresh_adapter(str(tiny.model)) as adapter:
        for name, make in train.SYSTEMS.items():
            system = make(options, adapter if tuning == "lora" else "", torch.float32)
            groups = [[train.micro_batch(rows)] for rows in [*batches, batches[0]]]
            losses[name] = [system.step(system.prepare(group)).item() for group in groups]
    assert losses["anvil"] == pytest.approx(losses["peft"], abs=1e-5)
    assert losses["anvil"][2] < losses["anvil"][0]  # it trains


def test_both_systems_write_the_same_tokens_to_prompts_of_different_lengths(tiny):
    options = decode.ON_CPU | {"model": str(tiny.model)}
    prompts = decode.make_prompts(str(tiny.model), 12, 3)
    assert len({len(prompt) for prompt in prompts}) == 3
    ours, theirs = (decode.SYSTEMS[name](options, "", "")(prompts, 5) for name in ("anvil", "transformers"))
    assert ours == theirs and [len(tokens) for tokens in ours] == [5, 5, 5]


@pytest.mark.parametrize("main, words, unknown", [
    (train.main, "device=cpu rows=T1", "rows"), (train.main, "smoke=true steps=3", "steps"),
    (decode.main, "device=cpu cases=d1", "cases"), (decode.main, "smoke=true gguf=a", "gguf"),
])  # fmt: skip
def test_options_of_the_other_device_are_refused(main, words, unknown):
    with pytest.raises(SystemExit, match=f"unknown option {unknown};"):
        main(words.split())


def test_a_smoke_test_is_no_run_on_a_gpu():
    with pytest.raises(SystemExit, match="smoke=true runs at tiny sizes on the CPU"):
        train.main(["smoke=true", "device=cuda"])
