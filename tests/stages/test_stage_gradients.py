"""How examples are laid out changes no gradient, in any stage: packed or separate, one by one or on two
ranks.

The same for the losses of a stage that look beyond one example: means over the group, or over all that was
seen.

Plain SGD without clipping, so that weights after an update are the gradient. Seven examples: the second rank
gets an empty batch at the end.
"""

import json

import pytest
import torch
from stage_runs import all_stages, data_of, stage_keys, write_stage_data
from tiny_runs import start_ranks, start_ranks_in_turn, tiny_runs

from pipeline.batch import Batch

SGD = {"optim": "sgd", "learning_rate": 0.1, "max_grad_norm": 0, "lr_scheduler_type": "constant"}
WHOLE = {
    "finetuning_type": "full",
    "max_steps": 2,
    "cutoff_len": 512,
    "do_train": True,
    "do_eval": True,
    **SGD,
}
WHOLE |= {"per_device_train_batch_size": 8}
LAYOUTS = {
    "one after another": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8},
    "packed": {"per_device_train_batch_size": 1, "packing": True, "cutoff_len": 4096},
}
RUNS = {
    stage: (stage, {}) for stage in all_stages()
}  # name -> stage, and the keys that choose another loss of it
RUNS |= {
    "rm last": ("rm", {"rm_loss": "last"}),
    "kto_pair": ("dpo", {"pref_loss": "kto_pair"}),
    "bco_pair": ("dpo", {"pref_loss": "bco_pair"}),
    "ipo with bco": ("dpo", {"pref_loss": "ipo", "pref_bco_weight": 0.5, "ld_alpha": 0.3, "pref_ftx": 0.2}),
    "bco": ("kto", {"kto_loss": "bco"}),
    "apo": ("kto", {"kto_loss": "apo_zero_unpaired", "kto_rejected_weight": 0.7, "pref_ftx": 0.2}),
    "ppo normalised": (
        "ppo",
        {"ppo_whiten_rewards": True, "ppo_score_norm": True, "ppo_epochs": 1, "horizon": 50},
    ),
    "dapo filtered": ("grpo", {"mask_truncated_completions": True, "stop": "e", "scale_rewards": "batch"}),
    "dr_grpo": (
        "grpo",
        {"loss_type": "dr_grpo", "scale_rewards": "none", "temperature": 0.7, "beta": 0.2, "stop": "e"},
    ),
    "gspo": ("grpo", {"loss_type": "grpo", "importance_sampling_level": "sequence", "stop": "e"}),
    # a draw each, so that the KL of the second is not 0
    "rloo": (
        "grpo",
        {
            "loss_type": "rloo",
            "advantage_estimator": "rloo",
            "beta": 0.2,
            "kl_in_reward": True,
            "num_iterations": 1,
        },
    ),
}
TWO_RANKS = {
    "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 4,
    "per_device_eval_batch_size": 1,
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    with tiny_runs(tmp_path_factory.mktemp("gradients")) as made:
        write_stage_data(made, count=7)
        yield made


@pytest.fixture(scope="module")
def together(tiny):
    """name in RUNS -> name of its run with all examples in one batch, made once."""
    made: dict[str, str] = {}

    def run(name: str) -> str:
        if name not in made:
            made[name] = f"{name}-together"
            assert tiny.train(made[name], **keys_of(tiny, name)) == 0
        return made[name]

    return run


def keys_of(tiny, name: str) -> dict:
    stage, chosen = RUNS[name]
    return stage_keys(tiny, stage, eval_dataset=f"held_{data_of(stage)}", **WHOLE) | chosen


def assert_same_training(tiny, one: str, other: str) -> None:
    """Sizes of the difference against that of the change of the weights since the start, and equal
    numbers."""
    start, mine, others = tiny.weights("model"), tiny.weights(one), tiny.weights(other)
    changes = {name: (mine[name] - start[name]).norm() for name in start}
    whole = torch.stack(list(changes.values())).norm()
    assert whole > 1e-3
    for name, change in changes.items():
        rounding = 6e-8 * start[name].norm()  # of the sum of a weight and its update
        assert (mine[name] - others[name]).norm() <= 2e-5 * max(change, 0.05 * whole) + rounding, name
    for entry, twin in zip(tiny.log(one), tiny.log(other), strict=True):
        names = entry.keys() - {"tokens_per_second", "peak_memory", "elapsed_time", "remaining_time"}
        assert {name: twin[name] for name in names} == pytest.approx(
            {name: entry[name] for name in names}, rel=1e-4, abs=2e-5
        )
    results = [
        {name: value for name, value in tiny.results(run).items() if name.startswith("eval_")}
        for run in (one, other)
    ]
    for each in results:
        del each["eval_runtime"], each["eval_samples_per_second"]
    assert results[1] == pytest.approx(results[0], rel=1e-4, abs=2e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", RUNS)
def test_a_layout_trains_the_weights_of_one_batch(tiny, together, name, layout):
    other, expected = f"{name}-{layout.partition(' ')[0]}", together(name)
    assert tiny.train(other, **keys_of(tiny, name) | LAYOUTS[layout]) == 0
    assert_same_training(tiny, expected, other)


def test_rows_that_come_twice_in_a_draw_get_texts_of_their_own_in_every_layout(tiny):
    info = tiny.folder / "stages" / "dataset_info.json"
    entries = json.loads(info.read_text()) | {"again": {"file_name": "prompts.json", "num_samples": 16}}
    info.write_text(json.dumps(entries))
    common = keys_of(tiny, "ppo") | {
        "dataset": "again",
        "max_steps": 2,
        "ppo_epochs": 1,
        "ppo_save_draws": True,
    }
    common |= {"do_eval": False, "eval_dataset": None}
    for name, keys in (LAYOUTS | {"whole": {}}).items():
        assert tiny.train(f"again-{name}", **common | keys) == 0
    ranks = start_ranks(tiny.words("again-ranks", **common | TWO_RANKS), tiny.folder / "again-ranks")
    assert [rank.wait() for rank in ranks] == [0, 0], "".join(rank.text() for rank in ranks)

    def texts(name: str) -> list:
        """(draw, row, text) of all ranks; a packed row is all data, so it is left to the first draw."""
        found = []
        for file in (tiny.folder / f"again-{name}" / "draws").iterdir():
            for batch in (Batch(**values) for values in torch.load(file)["drawn"]):
                spans = zip(batch.sources, batch.borders, batch.borders[1:])
                found += [(file.name[5], row, tuple(batch.tokens[a:b].tolist())) for row, a, b in spans]
        return sorted(found)

    drawn = texts("whole")
    assert (
        len(drawn) == 16 and len({(draw, row) for draw, row, _ in drawn}) < 16
    )  # or else the test would see nothing
    assert len(set(drawn)) == 16
    assert texts("one after another") == texts("ranks") == drawn
    packed = [text for text in texts("packed") if text[0] == "1"]
    assert len(packed) == len(set(packed)) == 16


@pytest.mark.parametrize("stage", all_stages())
def test_two_ranks_train_the_weights_of_one_batch(tiny, together, stage):
    names = [name for name in RUNS if RUNS[name][0] == stage]
    expected = [together(name) for name in names]
    words = [tiny.words(f"{name}-ranks", **keys_of(tiny, name) | TWO_RANKS) for name in names]
    ranks = start_ranks_in_turn(words, tiny.folder / f"{stage}-output")
    assert [rank.wait(60 * len(names)) for rank in ranks] == [0, 0], "".join(rank.text() for rank in ranks)
    for name, whole in zip(names, expected):
        assert_same_training(tiny, whole, f"{name}-ranks")
