"""Stage rm: the loss is LLaMA-Factory's on padded rows, scores do not depend on neighbours, the head goes
into files and comes back, and train.py makes a reward model of pairs."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tiny_runs import WORDS, assert_same_weights, tiny_runs
from transformers import AutoModelForSequenceClassification

import chat
import export
from checkpoints.hub import ModelOptions
from checkpoints.huggingface import load_model
from checkpoints.peft import load_adapter
from checkpoints.source import find_source, load_head, load_source
from checkpoints.trainable import prepare_trainable
from checkpoints.value_head import ValueHead, load_value_head, save_value_head, value_head_state
from lora import LoraOptions
from options.errors import UserError
from pipeline.batch import Example, collate
from stages.rm import RewardModel, RewardModelOptions, pair_scores, score_dialogues, score_texts, span_loss
from stages.stage import Stage
from templates import TemplateOptions, get_template
from text.render import Message
from text.tokenizer import Tokenizer

# prompt tokens, chosen, rejected: different lengths, a late difference, one a beginning of the other, equal
# ones
PAIRS = [
    ([5, 6, 7], [8, 9, 10, 11, 2], [8, 9, 12, 2]),
    ([5], [3, 2], [4, 4, 4, 4, 4, 4, 2]),
    ([7, 7], [9, 9, 9], [9, 9, 9, 9, 9]),
    ([1, 2, 3, 4], [5, 6, 7], [5, 6, 7]),
    ([9], [2], [3, 2]),
]


def example(prompt, chosen, rejected, behind=0, row=0):
    """`behind` tokens that the template puts behind an answer."""
    segments = [prompt + answer + [0] * behind for answer in (chosen, rejected)]
    trained = [np.arange(len(s)) >= len(prompt) for s in segments]
    for mask in trained:
        mask[len(mask) - behind :] = False
    zeros = np.zeros(sum(map(len, segments)))
    tokens = np.array(segments[0] + segments[1], np.int32)
    arrays = (tokens, np.concatenate(trained), zeros.astype(np.int16), zeros.astype(np.uint8))
    return Example(*arrays, (0, row), split=len(segments[0]))


def padded_loss(values, texts):
    """LLaMA-Factory's loop over padded rows: values and texts are lists of a chosen and a rejected row per
    pair."""
    losses = []
    for (chosen, rejected), (chosen_ids, rejected_ids) in zip(values, texts):
        longest = max(len(chosen), len(rejected))
        pad = [
            F.pad(torch.tensor(ids), (0, longest - len(ids)), value=-1) for ids in (chosen_ids, rejected_ids)
        ]
        rows = [torch.cat([row, row[-1:].expand(longest - len(row))]) for row in (chosen, rejected)]
        different = (pad[0] != pad[1]).nonzero()
        start = int(different[0]) if len(different) else len(chosen) - 1
        losses.append(-F.logsigmoid(rows[0][start:longest] - rows[1][start:longest]).mean())
    return torch.stack(losses)


@pytest.mark.parametrize("spare", [0, 4])  # places behind the longest
@pytest.mark.parametrize("which", [[0, 1, 2, 3, 4], [3], [2, 0]])
def test_the_loss_is_that_of_padded_rows_in_value_and_gradient(which, spare):
    texts = [(PAIRS[i][0] + PAIRS[i][1], PAIRS[i][0] + PAIRS[i][2]) for i in which]
    ordered = [pair[0] for pair in texts] + [pair[1] for pair in texts]
    lengths = torch.tensor([len(text) for text in ordered])
    borders = F.pad(lengths.cumsum(0), (1, 0))
    values = torch.randn(int(borders[-1]), dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    values.requires_grad_()
    flat = torch.tensor(sum(ordered, []))
    found = span_loss(values, flat, borders[:-1], borders[1:], int(lengths.max()) + spare)
    rows = values.split(lengths.tolist())
    expected = padded_loss(list(zip(rows[: len(which)], rows[len(which) :])), texts)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    weights = torch.arange(1.0, len(which) + 1, dtype=torch.float64)
    (mine,) = torch.autograd.grad((found * weights).sum(), values)
    (theirs,) = torch.autograd.grad((expected * weights).sum(), values)
    torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-15)


def test_the_loss_of_a_pair_by_hand():
    """Equal up to token 1; then differences 1, 2 and, where the chosen one has ended and stays at 3, 3 - 7 =
    -4."""
    values = torch.tensor([9.0, 5.0, 3.0, 8.0, 4.0, 1.0, 7.0])
    tokens = torch.tensor([1, 2, 3, 1, 4, 5, 6])
    found = span_loss(values, tokens, torch.tensor([0, 3]), torch.tensor([3, 7]), 4)
    expected = sum(np.log1p(np.exp(-d)) for d in (1.0, 2.0, -4.0)) / 3
    np.testing.assert_allclose(found.item(), expected, rtol=1e-6)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    with tiny_runs(tmp_path_factory.mktemp("rm")) as made:
        pairs = [
            {
                "instruction": WORDS[i % 12],
                "chosen": " ".join(WORDS[: 1 + i % 5]) + " good",
                "rejected": " ".join(WORDS[6 : 7 + i % 7]) + " bad",
            }
            for i in range(23)
        ]
        (made.folder / "pairs.json").write_text(json.dumps(pairs))
        columns = {"prompt": "instruction", "chosen": "chosen", "rejected": "rejected"}
        info = {"pairs": {"file_name": "pairs.json", "ranking": True, "columns": columns}}
        (made.folder / "dataset_info.json").write_text(json.dumps(info))
        yield made


@pytest.fixture(scope="module")
def model(tiny):
    model = load_model(tiny.model)
    model.v_head = ValueHead(model.config.hidden_size, generator=torch.Generator().manual_seed(0))
    return model


def gradients(model, batches, rm_loss="span"):
    stage, total = RewardModel(RewardModelOptions(rm_loss)), sum(batch.pairs for batch in batches)
    model.zero_grad()
    metrics, summed = dict.fromkeys(stage.evaluation_names[1:], 0), 0.0
    for batch in batches:
        loss, found = stage.loss(model, batch)
        (loss / total).backward()
        summed += loss.item() / total
        metrics = {name: metrics[name] + found[name] for name in metrics}
    return (
        summed,
        metrics,
        {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None},
    )


@pytest.mark.parametrize("rm_loss", ["span", "last"])
def test_one_batch_single_pairs_and_empty_batches_give_the_same_gradients(model, rm_loss):
    model.requires_grad_(True)
    examples = [example(*pair, behind=1, row=row) for row, pair in enumerate(PAIRS)]
    together = gradients(model, [collate(examples).rounded(32)], rm_loss)
    alone = [collate([each]) for each in examples] + [collate([]), collate([]).rounded(32)]
    apart = gradients(model, alone, rm_loss)
    assert together[0] == pytest.approx(apart[0], rel=1e-6)
    names = {name for name, _ in model.named_parameters()}
    assert together[2].keys() == apart[2].keys() == names - {"lm_head.weight"}
    for name in together[2]:
        assert (
            together[2][name].abs().sum() > 0 or name == "v_head.summary.bias"
        )  # it cancels in a difference
        torch.testing.assert_close(together[2][name], apart[2][name], rtol=1e-4, atol=1e-6)
    for name, value in together[1].items():
        torch.testing.assert_close(value, apart[1][name], rtol=1e-5, atol=1e-6)
    assert together[1]["accuracy"][1] == len(PAIRS)


def test_the_loss_at_the_last_tokens_is_that_of_transformers_classifier_as_trl_trains_it(tiny, model):
    """trl's RewardTrainer: -log sigmoid(chosen - rejected), meaned over pairs, of a classifier with one
    label."""
    texts = [prompt + pair[side] for side in (0, 1) for prompt, *pair in PAIRS]
    longest = max(map(len, texts))
    ids = torch.tensor([text + [0] * (longest - len(text)) for text in texts])
    theirs = AutoModelForSequenceClassification.from_pretrained(
        tiny.model, num_labels=1, pad_token_id=0
    ).eval()
    theirs.score.weight.data.copy_(model.v_head.summary.weight)
    chosen, rejected = theirs(ids, attention_mask=(ids != 0).long()).logits.view(2, len(PAIRS))
    expected = -F.logsigmoid(chosen - rejected).mean()
    expected.backward()
    model.requires_grad_(True)
    batch = collate([example(*pair, behind=2, row=row) for row, pair in enumerate(PAIRS)])
    loss, metrics, found = gradients(model, [batch], "last")
    assert loss == pytest.approx(expected.item(), rel=1e-6)
    assert metrics["rewards/margins"][0].item() == pytest.approx((chosen - rejected).sum().item(), rel=1e-4)
    assert loss != pytest.approx(gradients(model, [batch], "span")[0], rel=1e-3)
    pairs = {
        "embed_tokens.weight": "model.embed_tokens.weight",
        "layers.0.mlp.gate_proj.weight": None,
        "layers.1.self_attn.q_proj.weight": None,
        "v_head.summary.weight": "score.weight",
    }
    others = dict(theirs.named_parameters())
    for name, other in pairs.items():
        expected = others[other or f"model.{name}"].grad
        assert expected.abs().max() > 1e-6
        mine = next(value for key, value in found.items() if key.endswith(name))
        torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-6)


def test_the_score_is_the_value_at_the_answers_last_token_whatever_follows_or_lies_beside_it(model):
    texts = [prompt + answer for prompt, *answers in PAIRS for answer in answers]
    alone = torch.cat([score_texts(model, [text]) for text in texts])
    for most_tokens in (1, 12, 4096):
        torch.testing.assert_close(score_texts(model, texts, most_tokens), alone, rtol=1e-5, atol=1e-6)
    for behind in (0, 3):
        batch = collate([example(*pair, behind=behind) for pair in PAIRS])
        with torch.no_grad():
            metrics = RewardModel(RewardModelOptions()).loss(model, batch)[1]
        chosen, rejected = pair_scores(model, batch)
        torch.testing.assert_close(torch.tensor(chosen), alone[::2], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(torch.tensor(rejected), alone[1::2], rtol=1e-5, atol=1e-6)
        assert metrics["accuracy"][0] == (alone[::2] > alone[1::2]).sum()
        torch.testing.assert_close(metrics["rewards/margins"][0], (alone[::2] - alone[1::2]).sum())
    assert score_texts(model, []).shape == (0,)


def test_a_dialogue_is_scored_at_its_stop_token_and_without_dropout(tiny, model):
    tokenizer = Tokenizer.from_folder(tiny.model)
    say = [Message("user", "sparks"), Message("assistant", "the anvil good")]
    text = "<|im_start|>user\nsparks<|im_end|>\n<|im_start|>assistant\nthe anvil good<|im_end|>"
    other = load_model(tiny.model)
    other.v_head = model.v_head
    prepare_trainable(other, LoraOptions(lora_rank=3, lora_dropout=0.5), torch.Generator().manual_seed(1))
    for name, parameter in other.named_parameters():
        parameter.data += 0.1 if name.endswith("lora_b") else 0.0
    expected = score_texts(other.eval(), [tokenizer.encode(text)])
    found = score_dialogues(other.train(), tokenizer, get_template("chatml", None), [say])
    torch.testing.assert_close(found, expected)
    assert other.training


def test_scores_need_a_value_head(tiny):
    with pytest.raises(ValueError, match="no value head"):
        score_texts(load_model(tiny.model), [[1]])


# Files


def test_the_head_is_saved_as_trl_and_llama_factory_name_it_and_read_in_any_dtype(tmp_path):
    head, other = ValueHead(7, generator=torch.Generator().manual_seed(1)), ValueHead(7)
    save_value_head(value_head_state(head), tmp_path)
    tensors = load_file(tmp_path / "value_head.safetensors")
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    assert shapes == {"v_head.summary.weight": (1, 7), "v_head.summary.bias": (1,)}
    load_value_head(other, tmp_path)
    hidden = torch.randn(3, 7)
    assert torch.equal(head(hidden), other(hidden))
    torch.testing.assert_close(head(hidden), hidden @ head.summary.weight[0] + head.summary.bias)
    save_file(
        {name: tensor.bfloat16() for name, tensor in tensors.items()}, tmp_path / "value_head.safetensors"
    )
    load_value_head(other, tmp_path)
    assert other.summary.weight.dtype == torch.float32
    assert torch.equal(other.summary.bias, tensors["v_head.summary.bias"].bfloat16().float())


@pytest.mark.parametrize(
    "tensors, reason",
    [
        ({"v_head.summary.weight": torch.ones(1, 7)}, "v_head.summary.bias is missing, expected"),
        ({"v_head.summary.weight": torch.ones(2, 7)}, r"has shape \(2, 7\), expected \(1, 7\)"),
        (
            {"v_head.summary.weight": torch.ones(1, 7), "v_head.summary.bias": torch.full((1,), torch.nan)},
            "not finite",
        ),
        (
            {
                "v_head.summary.weight": torch.ones(1, 7),
                "v_head.summary.bias": torch.ones(1),
                "x": torch.ones(1),
            },
            "x belongs to no value head",
        ),
    ],
)
def test_a_file_that_is_no_value_head_is_refused(tmp_path, tensors, reason):
    save_file(tensors, tmp_path / "value_head.safetensors")
    with pytest.raises(ValueError, match=reason):
        load_value_head(ValueHead(7), tmp_path)


def test_a_pickled_value_head_is_refused_with_the_way_out(tmp_path):
    with pytest.raises(ValueError, match="file not found"):
        load_value_head(ValueHead(7), tmp_path)
    (tmp_path / "value_head.bin").write_bytes(b"x")
    with pytest.raises(ValueError, match="value_head.bin: a pickle.*safetensors.torch.save_file"):
        load_value_head(ValueHead(7), tmp_path)


# The command line


KEYS = {
    "stage": "rm",
    "dataset": "pairs",
    "eval_dataset": "pairs",
    "evaluation_strategy": "epoch",
    "num_train_epochs": 6,
    "learning_rate": 1e-2,
}


def test_a_reward_model_learns_which_answer_is_better_and_scores_single_dialogues(tiny):
    keys = KEYS | {"dataset_dir": tiny.folder}
    assert tiny.train("lora", **keys) == 0
    log = tiny.log("lora")
    assert next(entry for entry in log if "accuracy" in entry)["loss"] == pytest.approx(np.log(2), abs=0.3)
    last = [entry for entry in log if "eval_accuracy" in entry][-1]
    assert last["eval_accuracy"] >= 0.95
    assert last["eval_rewards/margins"] == pytest.approx(
        last["eval_rewards/chosen"] - last["eval_rewards/rejected"], abs=1e-4
    )
    model = load_model(tiny.model)
    load_adapter(model, tiny.folder / "lora")
    model.v_head = ValueHead(model.config.hidden_size)
    load_value_head(model.v_head, tiny.folder / "lora")
    tokenizer = Tokenizer.from_folder(tiny.model)
    template = get_template("chatml", None)
    say = [[Message("user", "sparks"), Message("assistant", f"the anvil {word}")] for word in ("good", "bad")]
    good, bad = score_dialogues(model, tokenizer, template, say).tolist()
    assert good > bad
    with pytest.raises(ValueError, match="dialogue 0 does not end with an answer"):
        score_dialogues(model, tokenizer, template, [say[0][:1]])


def test_chat_scores_an_answer_and_an_exported_reward_model_is_one_too(tiny, capsys):
    keys = KEYS | {"dataset_dir": tiny.folder, "num_train_epochs": 1, "evaluation_strategy": "no"}
    assert tiny.train("to-score", **keys) == 0
    words = [f"model_name_or_path={tiny.folder / 'to-score'}", "prompt=sparks", "score=the anvil good"]
    capsys.readouterr()
    assert chat.main(words) == 0
    score = float(capsys.readouterr().out)
    source = find_source(
        ModelOptions(model_name_or_path=str(tiny.folder / "to-score")), TemplateOptions(), given=()
    )
    model, tokenizer, template = load_source(source, dtype=None, device="cpu")
    load_head(model, source)
    dialogue = [Message("user", "sparks"), Message("assistant", "the anvil good")]
    assert score == pytest.approx(score_dialogues(model, tokenizer, template, [dialogue]).item(), abs=1e-4)
    target = tiny.folder / "exported"
    assert export.main([words[0], f"export_dir={target}"]) == 0
    capsys.readouterr()
    assert chat.main([f"model_name_or_path={target}", *words[1:], "template=chatml"]) == 0
    assert float(capsys.readouterr().out) == pytest.approx(score, abs=1e-3)
    assert chat.main([f"model_name_or_path={tiny.model}", *words[1:], "template=chatml"]) == 2
    assert "no reward model" in capsys.readouterr().err
    assert chat.main([words[0], "score=x"]) == 2
    assert "give prompt too" in capsys.readouterr().err


def test_a_value_head_that_was_trained_with_a_question_is_refused(tmp_path):
    """Earlier versions kept the tokens of a question behind each answer in the file's metadata."""
    tensors = {"v_head.summary.weight": torch.ones(1, 7), "v_head.summary.bias": torch.ones(1)}
    save_file(tensors, tmp_path / "value_head.safetensors", {"ending": "[5, 6]"})
    with pytest.raises(
        UserError, match="value_head.safetensors: this value head was trained with rm_question"
    ):
        load_value_head(ValueHead(7), tmp_path)


@pytest.mark.parametrize("finetuning_type", ["lora", "full"])
def test_a_value_head_that_lies_there_is_the_start(tiny, finetuning_type, capsys):
    keys = KEYS | {"dataset_dir": tiny.folder, "finetuning_type": finetuning_type, "num_train_epochs": 1}
    first, second = f"first-{finetuning_type}", f"second-{finetuning_type}"
    assert tiny.train(first, **keys) == 0
    start = (
        {"adapter_name_or_path": tiny.folder / first}
        if finetuning_type == "lora"
        else {"model_name_or_path": tiny.folder / first}
    )
    assert tiny.train(second, **(keys | start | {"learning_rate": 1e-12})) == 0
    assert "the value head starts from" in capsys.readouterr().out
    mine, theirs = (load_file(tiny.folder / name / "value_head.safetensors") for name in (first, second))
    assert_same_weights(mine, theirs, 1e-9)


def test_resumed_is_bit_identical_the_head_included(tiny):
    keys = KEYS | {
        "dataset_dir": tiny.folder,
        "num_train_epochs": 1,
        "evaluation_strategy": "no",
        "eval_dataset": None,
    }
    whole = keys | {"save_strategy": "steps", "save_steps": 3}
    assert tiny.train("whole", **whole) == 0
    assert (
        tiny.train("resumed", **(whole | {"resume_from_checkpoint": tiny.folder / "whole" / "checkpoint-3"}))
        == 0
    )
    for file in ("value_head.safetensors", "adapter_model.safetensors"):
        assert_same_weights(*(load_file(tiny.folder / name / file) for name in ("whole", "resumed")))


def test_the_stage_is_one_like_the_others():
    assert issubclass(RewardModel, Stage) and RewardModel.has_value_head
    assert {"loss", "accuracy"} < set(RewardModel.evaluation_names)
