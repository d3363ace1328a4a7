"""Predicting: the texts are the model's own, the same wherever they are written, and cost a training
nothing."""

import json

import pytest
import torch
from stage_runs import data_of, stage_keys, write_stage_data
from tiny_runs import assert_same_weights, make_rows, start_ranks, tiny_runs

from chat import Conversation
from checkpoints.source import Source, load_source
from evaluation.rouge_bleu import NAMES, mean_scores
from generation.sampling import GenerateOptions
from quant import QuantOptions
from templates import TemplateOptions

GENERATES = {"predict_with_generate": True, "max_new_tokens": 9}
NOISY = {"lora_dropout": 0.2, "neftune_noise_alpha": 5}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    with tiny_runs(tmp_path_factory.mktemp("predict")) as made:
        (made.folder / "held.json").write_text(json.dumps(make_rows(7, seed=21)))
        (made.folder / "other.json").write_text(json.dumps(make_rows(3, seed=22)))
        write_stage_data(made)
        yield made


def predictions(tiny, name: str) -> list[dict]:
    return [
        json.loads(line)
        for line in (tiny.folder / name / "generated_predictions.jsonl").open(encoding="utf-8")
    ]


def samples(tiny, name: str) -> list[dict]:
    return [
        json.loads(line) for line in (tiny.folder / name / "generated_samples.jsonl").open(encoding="utf-8")
    ]


def predict(tiny, name: str, **keys) -> list[dict]:
    """A run that does nothing else."""
    keys = {
        "dataset": None,
        "eval_dataset": tiny.folder / "held.json",
        "do_predict": True,
        **GENERATES,
        **keys,
    }
    assert tiny.train(name, **keys) == 0
    return predictions(tiny, name)


def source(tiny) -> Source:
    """The tiny model for inference."""
    return Source(
        tiny.model, (), tiny.model, TemplateOptions(template="chatml"), None, None, (), QuantOptions()
    )


@pytest.mark.parametrize(
    "keys",
    [
        {
            **NOISY,
            "gradient_checkpointing": True,
            "packing": True,
            "cutoff_len": 90,
            "per_device_train_batch_size": 1,
        },
        {"finetuning_type": "full", "bf16": True, "neftune_noise_alpha": 5},
        {"quantization_bit": 4, **NOISY},
        {"stage": "dpo"},
    ],
    ids=["lora", "full", "qlora", "dpo"],
)
def test_a_training_that_also_generates_ends_with_the_bits_of_one_that_does_not(tiny, keys, request):
    name = request.node.callspec.id
    if keys.get("stage"):
        keys = stage_keys(tiny, keys["stage"], eval_dataset="held_pairs")
    else:
        keys = {"eval_dataset": tiny.folder / "held.json", **keys}
    keys |= {"evaluation_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 3}
    assert tiny.train(f"{name}-silent", **keys) == 0
    assert tiny.train(f"{name}-writing", **keys, **GENERATES) == 0
    assert_same_weights(tiny.weights(f"{name}-silent"), tiny.weights(f"{name}-writing"))
    assert tiny.losses(f"{name}-silent") == tiny.losses(f"{name}-writing")
    evaluated = tiny.losses(f"{name}-writing", "eval_loss")
    assert evaluated == tiny.losses(f"{name}-silent", "eval_loss") and len(evaluated) > 1
    assert tiny.losses(f"{name}-writing", "eval_bleu-4").keys() == evaluated.keys()
    assert {entry["current_steps"] for entry in samples(tiny, f"{name}-writing")} == evaluated.keys()


def test_during_a_training_at_its_end_and_in_a_run_of_their_own_the_texts_are_the_same(tiny, capsys):
    keys = {"eval_dataset": tiny.folder / "held.json", "evaluation_strategy": "epoch", **GENERATES, **NOISY}
    assert tiny.train("at-end", do_train=True, do_eval=True, do_predict=True, **keys) == 0
    shown = capsys.readouterr().out
    alone = predict(tiny, "alone", adapter_name_or_path=tiny.folder / "at-end")
    assert alone == predictions(tiny, "at-end") and len(alone) == 7
    last = max(entry["current_steps"] for entry in samples(tiny, "at-end"))
    drawn = [entry["predict"] for entry in samples(tiny, "at-end") if entry["current_steps"] == last]
    assert drawn[:3] == [alone[i]["predict"] for i in (0, 2, 4)]  # from all over the rows
    assert json.dumps(alone[2]["predict"], ensure_ascii=False) in shown
    assert len({row["predict"] for row in alone}) == 7
    measured = mean_scores((row["predict"], row["label"]) for row in alone)
    for kind in ("eval", "predict"):
        assert {name: tiny.results("at-end")[f"{kind}_{name}"] for name in NAMES} == measured
    written = json.loads((tiny.folder / "alone" / "predict_results.json").read_text())
    assert written == tiny.results("alone")
    assert tiny.results("alone")["predict_samples_per_second"] > 0 and "train_loss" not in tiny.results(
        "alone"
    )


@pytest.mark.parametrize("stage", ["kto", "ppo", "grpo"])
def test_every_stage_with_prompts_predicts_texts_after_its_training_and_alone(tiny, stage):
    keys = stage_keys(
        tiny, stage, eval_dataset=f"held_{data_of(stage)}", do_predict=True, predict_with_generate=True
    )
    keys |= {"max_new_tokens": 6, "evaluation_strategy": "steps", "eval_steps": 2, "max_steps": 2}
    assert tiny.train(f"{stage}-whole", do_train=True, **keys) == 0
    written = predictions(tiny, f"{stage}-whole")
    assert tiny.train(f"{stage}-alone", **keys, adapter_name_or_path=tiny.folder / f"{stage}-whole") == 0
    assert predictions(tiny, f"{stage}-alone") == written and len(written) == 5
    assert {"eval_bleu-4", "eval_exact_match", "eval_loss" if stage == "kto" else "eval_reward"} <= {
        key for entry in tiny.log(f"{stage}-whole") for key in entry
    }


def test_the_texts_are_those_that_chat_gives_and_the_labels_the_answers_of_the_rows(tiny):
    found = predict(tiny, "greedy", do_sample=False)
    model, tokenizer, template = load_source(source(tiny), None, "cpu")
    options = GenerateOptions(do_sample=False, max_new_tokens=9)
    for row, written in zip(make_rows(7, seed=21), found):
        conversation = Conversation(model, tokenizer, template, options, True, torch.Generator())
        assert written["predict"] == "".join(conversation.ask(row["instruction"]))
        assert written["label"] == row["output"]
        assert (
            written["prompt"] == f"<|im_start|>user\n{row['instruction']}<|im_end|>\n<|im_start|>assistant\n"
        )


def test_a_drawn_text_depends_on_its_row_and_the_seed_but_not_on_its_neighbours(tiny):
    together = predict(tiny, "together", per_device_eval_batch_size=7)
    assert predict(tiny, "single", per_device_eval_batch_size=1) == together
    other = predict(tiny, "other-seed", seed=1)
    assert all(mine["predict"] != theirs["predict"] for mine, theirs in zip(together, other))


def test_a_text_ends_at_the_stop_word_of_the_user(tiny):
    model, tokenizer, template = load_source(source(tiny), None, "cpu")
    whole = predict(tiny, "whole", do_sample=False, max_new_tokens=20)[0]["predict"]
    stop = whole[len(whole) // 2 :][:3]
    cut = predict(tiny, "cut", do_sample=False, max_new_tokens=20, stop=stop)
    assert cut[0]["predict"] == whole.split(stop)[0]


def test_two_ranks_write_what_one_writes_in_the_order_of_the_rows(tiny):
    """7 rows in batches of 2: the last rank has one batch less; the training is shared too."""
    keys = {"do_train": True, "do_eval": True, "do_predict": True, **GENERATES}
    keys |= {"eval_dataset": tiny.folder / "held.json", "evaluation_strategy": "epoch", "optim": "sgd"}
    keys |= {"learning_rate": 0.1, "per_device_eval_batch_size": 2}
    assert tiny.train("one", per_device_train_batch_size=8, **keys) == 0
    ranks = start_ranks(tiny.words("two", per_device_train_batch_size=4, **keys), tiny.folder / "two-output")
    assert [rank.wait() for rank in ranks] == [0, 0], "".join(rank.text() for rank in ranks)
    assert predictions(tiny, "two") == predictions(tiny, "one")
    for name in NAMES:
        assert tiny.losses("two", f"eval_{name}") == tiny.losses("one", f"eval_{name}")
        assert tiny.results("two")[f"predict_{name}"] == tiny.results("one")[f"predict_{name}"]
    assert ranks[1].text() == ""


def test_of_several_sets_each_is_measured_and_named_and_val_size_predicts_the_rows_it_holds_out(tiny):
    found = predict(tiny, "several", eval_dataset=f"{tiny.folder / 'held.json'},{tiny.folder / 'other.json'}")
    names = [str(tiny.folder / name) for name in ("held.json", "other.json")]
    assert [row["dataset"] for row in found] == [names[0]] * 7 + [names[1]] * 3
    results = tiny.results("several")
    each = [mean_scores((r["predict"], r["label"]) for r in found if r["dataset"] == name) for name in names]
    assert [results[f"predict_{name}_bleu-4"] for name in names] == [scores["bleu-4"] for scores in each]
    assert results["predict_bleu-4"] == pytest.approx(sum(scores["bleu-4"] for scores in each) / 2, abs=1e-4)
    held = predict(tiny, "held-out", dataset=tiny.data, eval_dataset=None, val_size=5)
    answers = {row["instruction"]: row["output"] for row in make_rows(19)}
    assert len(held) == 5
    for row in held:
        assert (
            row["label"]
            == answers[row["prompt"].removeprefix("<|im_start|>user\n").partition("<|im_end|>")[0]]
        )


def test_pairs_are_answered_too_and_compared_with_the_chosen_answer(tiny):
    keys = stage_keys(tiny, "dpo", dataset=None, eval_dataset="held_pairs", evaluation_strategy="epoch")
    found = predict(tiny, "pairs", **keys)
    rows = json.loads((tiny.folder / "stages" / "held_pairs.json").read_text())
    assert [row["label"] for row in found] == [row["chosen"] for row in rows]


def test_rows_without_an_answer_are_answered_and_not_measured(tiny):
    rows = [{"instruction": row["instruction"]} for row in make_rows(4, seed=30)]
    (tiny.folder / "questions.json").write_text(json.dumps(rows))
    found = predict(tiny, "questions", eval_dataset=tiny.folder / "questions.json")
    assert [row["label"] for row in found] == [None] * 4 and all(row["predict"] for row in found)
    assert not any(name.startswith("predict_rouge") for name in tiny.results("questions"))


def test_a_reward_model_predicts_scores(tiny):
    keys = stage_keys(tiny, "rm", eval_dataset="held_pairs", do_predict=True, do_eval=True, do_train=True)
    assert tiny.train("scores", **keys) == 0
    found, results = predictions(tiny, "scores"), tiny.results("scores")
    assert [row["row"] for row in found] == list(range(5))
    wins = sum(row["chosen"] > row["rejected"] for row in found)
    assert results["predict_accuracy"] == results["eval_accuracy"] == wins / 5
    margins = sum(row["chosen"] - row["rejected"] for row in found) / 5
    assert results["eval_rewards/margins"] == pytest.approx(margins, abs=1e-5)
    keys |= {
        "do_train": False,
        "adapter_name_or_path": tiny.folder / "scores",
        "per_device_eval_batch_size": 2,
    }
    ranks = start_ranks(tiny.words("scores2", **keys), tiny.folder / "scores2-output")
    assert [rank.wait() for rank in ranks] == [0, 0], "".join(rank.text() for rank in ranks)
    for mine, theirs in zip(found, predictions(tiny, "scores2"), strict=True):
        assert mine == pytest.approx(theirs, abs=1e-5)


def test_the_best_checkpoint_may_be_chosen_by_a_metric_of_the_texts(tiny, capsys):
    keys = {
        "eval_dataset": tiny.folder / "held.json",
        "evaluation_strategy": "epoch",
        "save_strategy": "epoch",
    }
    keys |= {"load_best_model_at_end": True, "metric_for_best_model": "bleu-4"}
    assert tiny.train("best", **keys, **GENERATES) == 0
    state = json.loads((tiny.folder / "best" / "trainer_state.json").read_text())
    assert state["best_metric"] == max(tiny.losses("best", "eval_bleu-4").values())
    assert tiny.train("unmeasured", **keys) == 2
    assert "eval_bleu-4 is not measured" in capsys.readouterr().err


def test_a_resumed_run_does_not_show_a_sample_twice(tiny):
    keys = {
        "eval_dataset": tiny.folder / "held.json",
        "evaluation_strategy": "steps",
        "eval_steps": 2,
        **GENERATES,
    }
    keys |= {"save_strategy": "steps", "save_steps": 4}
    assert tiny.train("resumed", num_train_epochs=2, **keys) == 0
    before = samples(tiny, "resumed")
    again = {**keys, "resume_from_checkpoint": tiny.folder / "resumed" / "checkpoint-4"}
    assert tiny.train("resumed", num_train_epochs=2, **again) == 0
    assert samples(tiny, "resumed") == before


def test_where_nothing_trains_the_data_set_is_what_is_predicted(tiny):
    """LLaMA-Factory's predict.sh names `dataset` alone."""
    held = tiny.folder / "held.json"
    alone = predict(tiny, "alone", dataset=held, eval_dataset=None)
    assert alone == predict(tiny, "named")
    few = predict(tiny, "few", dataset=held, eval_dataset=None, max_samples=3)
    assert few == alone[:3]
    assert tiny.train("evaluated", dataset=held, do_eval=True) == 0
    assert "eval_loss" in tiny.results("evaluated")


@pytest.mark.parametrize(
    "keys, message",
    [
        ({"do_predict": True}, "set predict_with_generate=true"),
        ({"do_predict": True, "stage": "pt", "template": None}, "documents have no prompts"),
        ({"do_predict": True, "stage": "rm", "predict_with_generate": True}, "rm gives scores"),
        (
            {"do_predict": True, "predict_with_generate": True, "eval_dataset": None, "dataset": None},
            "set val_size or eval_dataset",
        ),
        ({"do_predict": True, "predict_with_generate": True, "num_beams": 4}, "num_beams"),
    ],
    ids=["no texts", "pt", "rm", "no data", "beams"],
)
def test_what_cannot_be_predicted_is_refused_by_name(tiny, keys, message, capsys):
    assert tiny.train("refused", **{"eval_dataset": tiny.folder / "held.json", **keys}) == 2
    assert message in capsys.readouterr().err


def test_a_prompt_that_leaves_no_room_for_an_answer_names_its_row(tiny, capsys):
    rows = [*make_rows(1, seed=3), {"instruction": "sparks " * 150, "output": "a"}]
    (tiny.folder / "long.json").write_text(json.dumps(rows))
    keys = {"do_predict": True, "dataset": None, "eval_dataset": tiny.folder / "long.json", **GENERATES}
    assert tiny.train("long", cutoff_len=2000, truncation_strategy="right", **keys) == 2
    message = capsys.readouterr().err
    assert "long.json row 1: the prompt has" in message and "the model takes 512" in message
    # beside a training too before its first step
    keys |= {"do_predict": False, "dataset": tiny.data, "evaluation_strategy": "epoch"}
    assert tiny.train("long-too", cutoff_len=2000, truncation_strategy="right", **keys) == 2
    said = capsys.readouterr()
    assert "long.json row 1: the prompt has" in said.err and "step 1/" not in said.out
