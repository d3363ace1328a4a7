"""train.py from the command line on a tiny random model: every option does what it says, every mistake is
said."""

import json
import math
import subprocess
import sys
import threading

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from tiny_runs import CONFIG, ROOT, assert_same_weights, make_rows, tiny_runs
from torch.utils._python_dispatch import TorchDispatchMode

import train
from checkpoints.huggingface import load_model
from checkpoints.source import RUN_CONFIG
from options import config as configuration
from pipeline import prefetch
from text.tokenizer import Tokenizer
from training import memory, run, run_folder, setup


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    with tiny_runs(tmp_path_factory.mktemp("train")) as made:
        yield made


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


def falls(losses: dict[int, float]) -> bool:
    values = list(losses.values())
    return sum(values[-4:]) / 4 < sum(values[:4]) / 4 - 0.02


# What is trained, and how


@pytest.mark.parametrize("stage", ["sft", "pt"])
@pytest.mark.parametrize(
    "method",
    [
        {},
        {"use_rslora": True},
        {"use_dora": True},
        {"lora_dropout": 0.1},
        {"lora_target": "q_proj,v_proj", "additional_target": "embed_tokens"},
        {"finetuning_type": "full", "learning_rate": 3e-3},
        {"finetuning_type": "freeze", "num_layer_trainable": 1},
    ],
    ids=["lora", "rslora", "dora", "dropout", "targets", "full", "freeze"],
)
def test_every_method_learns_in_every_stage(tiny, out, stage, method):
    data = {"dataset": tiny.folder / "text.txt", "packing": False} if stage == "pt" else {}
    assert tiny.train(out, stage=stage, num_train_epochs=4, **data, **method) == 0
    assert falls(tiny.losses(out))


@pytest.mark.parametrize("status", [True, False])
def test_print_param_status_lists_every_tensor(tiny, out, capsys, status):
    assert tiny.train(out, max_steps=1, lora_target="q_proj", print_param_status=status) == 0
    shown = capsys.readouterr().out.splitlines()
    weight = "layers.0.self_attn.q_proj"
    lines = [line for line in shown if line.startswith(weight)]
    assert [(line.split()[0], line.split()[-1]) for line in lines] == [
        (f"{weight}.lora_a", "trained"),
        (f"{weight}.lora_b", "trained"),
        (f"{weight}.base.weight", "frozen"),
    ] * status


@pytest.mark.parametrize("precision", ["bf16", "pure_bf16", "fp16"])
@pytest.mark.parametrize("method", ["lora", "full"])
def test_every_precision_learns(tiny, out, precision, method):
    rate = 1e-2 if method == "lora" else 3e-3
    keys = {"finetuning_type": method, "learning_rate": rate, "num_train_epochs": 3}
    assert tiny.train(out, **keys, **{precision: True}) == 0
    losses = tiny.losses(out)
    assert falls(losses)
    assert tiny.train(out, overwrite_output_dir=True, **keys) == 0
    exact = tiny.losses(out)
    assert losses[1] != exact[1] and losses[1] == pytest.approx(exact[1], rel=2e-2)
    # trained weights stay fp32 except under pure_bf16
    assert tiny.train(out, overwrite_output_dir=True, **keys, **{precision: True}) == 0
    trained = tiny.weights(out)
    key = next(name for name in trained if "q_proj" in name)
    assert trained[key].dtype == (torch.bfloat16 if precision == "pure_bf16" else torch.float32)


def test_fp16_skips_overflowing_updates_and_lowers_the_scale(tiny, out, monkeypatch):
    # a loss so steep that 2^16 times its gradient leaves fp16's range: 65504
    steep = tiny.make_model("steep", seed=2, initializer_range=1.5)
    assert (
        tiny.train(out, model_name_or_path=steep, fp16=True, finetuning_type="full", num_train_epochs=4) == 0
    )
    scales = list(tiny.losses(out, "loss_scale").values())
    assert scales[0] <= 2**15 and scales[-1] >= 1  # the very first update was skipped
    assert all(math.isfinite(loss) for loss in tiny.losses(out).values())


def test_neftune_changes_training_and_not_evaluation(tiny, out):
    keys = {
        "val_size": 4,
        "evaluation_strategy": "steps",
        "eval_steps": 1,
        "learning_rate": 0,
        "max_steps": 2,
    }
    assert tiny.train(out, **keys) == 0
    plain = tiny.losses(out), tiny.losses(out, "eval_loss")
    assert tiny.train(out, overwrite_output_dir=True, neftune_noise_alpha=5, **keys) == 0
    noisy = tiny.losses(out), tiny.losses(out, "eval_loss")
    assert plain[0] != noisy[0] and plain[1] == noisy[1]


class HostReads(TorchDispatchMode):
    """Notes what would make the host wait for a GPU: values or sizes read from tensors (.item(),
    bool(tensor), nonzero, a mask as an index, equal, unique) and tensors made of the host's numbers
    (torch.tensor), which are copied."""

    WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "lift_fresh")

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, arguments=(), keys=None):
        name = function.overloadpacket.__name__
        masks = (
            [index for index in arguments[1] if index is not None] if name in ("index", "index_put_") else ()
        )
        by_mask = any(index.dtype in (torch.bool, torch.uint8) for index in masks)
        # a number that takes a tensor's place in `where` is copied to the device
        by_copy = name == "where" and any(torch.is_tensor(part) and part.dim() == 0 for part in arguments[1:])
        if name in self.WAITING or name.startswith(("unique", "_unique")) or by_mask or by_copy:
            self.seen.append(name)
        return function(*arguments, **(keys or {}))


@pytest.mark.parametrize(
    "keys",
    [
        {"gradient_accumulation_steps": 2, "lora_dropout": 0.1, "neftune_noise_alpha": 5},
        {"fp16": True},
        {"finetuning_type": "full", "max_grad_norm": 0, "bf16": True},
        {"use_dora": True, "packing": True, "lr_scheduler_type": "cosine"},
        {"optim": "sgd", "gradient_checkpointing": True},
    ],
    ids=lambda keys: "-".join(keys),
)
def test_the_loop_does_not_wait_for_the_device_between_log_lines(tiny, out, monkeypatch, keys):
    # as on a GPU, batches are made in a thread: what that one does is not seen, and stops nobody
    monkeypatch.setattr(train, "ahead", lambda items, depth: prefetch.ahead(items, 2))
    seen = []
    for steps in (2, 7):
        with HostReads() as reads:
            assert tiny.train(out, max_steps=steps, logging_steps=100, overwrite_output_dir=True, **keys) == 0
        seen.append(sorted(reads.seen))
    assert seen[0] == seen[1]


def test_what_makes_the_host_wait_is_seen():
    """The counter of the test above: each of these would stop a GPU once."""
    x = torch.arange(6.0)
    waiting = {
        "item": lambda: x.sum().item(),
        "bool": lambda: bool(x[0] == 1),
        "mask": lambda: x[x > 2],
        "nonzero": lambda: x.nonzero(),
        "tensor": lambda: torch.tensor([1, 2]),
        "where": lambda: torch.where(x > 2, 1.0, x),
        "unique": lambda: x.unique(),
        "equal": lambda: torch.equal(x, x),
    }
    for name, function in waiting.items():
        with HostReads() as reads:
            function()
        assert reads.seen, name
    with HostReads() as reads:
        torch.full((), 3.0) + x.masked_fill(x > 2, 5)[torch.arange(3)].sum()
    assert not reads.seen


@pytest.mark.parametrize(
    "keys", [{"gradient_accumulation_steps": 3}, {"streaming": True, "max_steps": 6}], ids=str
)
def test_a_thread_that_prepares_batches_changes_no_bit(tiny, out, monkeypatch, keys):
    """As on a GPU, where it does; there is no such thread left when the run is over."""
    assert tiny.train(out, **keys) == 0
    losses, weights, depths = tiny.losses(out), tiny.weights(out), []

    def with_thread(items, depth):
        depths.append(depth)
        return prefetch.ahead(items, 3)

    monkeypatch.setattr(train, "ahead", with_thread)
    assert tiny.train(out, overwrite_output_dir=True, **keys) == 0
    assert losses == tiny.losses(out) and depths == [0]
    assert_same_weights(weights, tiny.weights(out))
    assert all(thread.name != "prefetch" for thread in threading.enumerate())


def test_evaluating_changes_nothing_of_the_training(tiny, out):
    keys = {"lora_dropout": 0.2, "neftune_noise_alpha": 5, "eval_dataset": tiny.folder / "few.json"}
    assert tiny.train(out, **keys) == 0
    losses, weights = tiny.losses(out), tiny.weights(out)
    assert tiny.train(out, evaluation_strategy="steps", eval_steps=1, overwrite_output_dir=True, **keys) == 0
    assert losses == tiny.losses(out)
    assert_same_weights(weights, tiny.weights(out))


def test_gradient_checkpointing_changes_no_bit_and_is_said_once(tiny, out, capsys):
    keys = {"lora_dropout": 0.2, "neftune_noise_alpha": 5, "overwrite_output_dir": True}
    found = []
    lines = {
        "none": "0 of 2 blocks (none: needs",
        "false": "0 of 2 blocks (none: needs",
        "auto": "0 of 2 blocks (auto: needs",
        "selective": "0 of 2 blocks, norms and activations of 2 (selective: needs",
        "full": "2 of 2 blocks (full: needs",
        "true": "2 of 2 blocks (full: needs",
        "offload": "2 of 2 blocks (offload: needs",
    }
    for policy, words in lines.items():
        assert tiny.train(out, gradient_checkpointing=policy, **keys) == 0
        assert capsys.readouterr().out.count(f"gradient checkpointing: {words}") == 1
        found.append((tiny.losses(out), tiny.weights(out)))
    for losses, weights in found[1:]:
        assert losses == found[0][0]
        assert_same_weights(weights, found[0][1])


def test_too_little_memory_recomputes_and_changes_no_bit(tiny, out, capsys, monkeypatch):
    assert tiny.train(out, disable_gradient_checkpointing=False) == 0
    assert "0 of 2 blocks (auto" in capsys.readouterr().out
    weights = tiny.weights(out)
    monkeypatch.setattr(memory, "free_bytes", lambda device: 1e6)
    assert tiny.train(out, overwrite_output_dir=True) == 0
    line = "2 of 2 blocks (auto: needs 0.5 of 0.0 GiB free, 0.5 without); that may be too much"
    assert line in capsys.readouterr().out
    assert_same_weights(weights, tiny.weights(out))
    assert tiny.train(out, overwrite_output_dir=True, disable_gradient_checkpointing=True) == 0
    assert "0 of 2 blocks (none" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore:Dynamo detected a call")
def test_compiled_blocks_train_the_same(tiny, out):
    """With a backend that needs no compiler: graphs are taken, then run as they are. (Of LoRA that takes a
    minute.)"""
    one_block = tiny.make_model("one", seed=1, num_hidden_layers=1)
    keys = {
        "model_name_or_path": one_block,
        "finetuning_type": "full",
        "max_steps": 2,
        "overwrite_output_dir": True,
    }
    assert tiny.train(out, **keys) == 0
    losses, weights = tiny.losses(out), tiny.weights(out)
    compiled = {"torch_compile": True, "torch_compile_backend": "eager", "gradient_checkpointing": True}
    assert tiny.train(out, **compiled, **keys) == 0
    assert losses == pytest.approx(tiny.losses(out), abs=1e-5)
    assert_same_weights(weights, tiny.weights(out), tolerance=1e-4)


def test_loss_and_weights_equal_plain_torch(tiny, out):
    """One SGD update of all weights on one batch, against cross entropy and autograd written out."""
    keys = {
        "finetuning_type": "full",
        "optim": "sgd",
        "learning_rate": 0.5,
        "max_grad_norm": 0,
        "max_steps": 1,
    }
    rows = tiny.folder / "one.json"
    rows.write_text(json.dumps(make_rows(3, seed=5)))
    assert tiny.train(out, dataset=rows, lr_scheduler_type="constant", **keys) == 0
    model, tokenizer = load_model(tiny.model), Tokenizer.from_folder(tiny.model)
    total, count = 0.0, 0
    for row in json.loads(rows.read_text()):
        prompt = f"<|im_start|>user\n{row['instruction']}<|im_end|>\n<|im_start|>assistant\n"
        start, ids = len(tokenizer.encode(prompt)), tokenizer.encode(prompt + row["output"] + "<|im_end|>")
        tokens = torch.tensor(ids)
        hidden = model(
            tokens, torch.arange(len(ids)), torch.tensor([0, len(ids)], dtype=torch.int32), len(ids)
        )
        logits = hidden @ model.head_weight().T
        total = total + torch.nn.functional.cross_entropy(
            logits[start - 1 : -1], tokens[start:], reduction="sum"
        )
        count += len(ids) - start
    (total / count).backward()
    assert tiny.losses(out)[1] == pytest.approx((total / count).item(), abs=1e-5)
    trained = load_model(out)
    for (name, before), after in zip(model.named_parameters(), trained.parameters()):
        torch.testing.assert_close(after, before - 0.5 * before.grad, atol=2e-6, rtol=1e-5, msg=name)


def test_batches_of_any_split_train_the_same_weights(tiny, out):
    """19 rows: the last group of an epoch has 3 rows, so it must not borrow from the next epoch."""
    for method in ({"finetuning_type": "full"}, {"lora_rank": 4}):
        found = []
        for rows, accumulation in ((8, 1), (1, 8), (2, 4)):
            split = {"per_device_train_batch_size": rows, "gradient_accumulation_steps": accumulation}
            keys = {"optim": "sgd", "learning_rate": 0.3, "overwrite_output_dir": True, "num_train_epochs": 3}
            assert tiny.train(out, **split, **keys, **method) == 0
            found.append((tiny.losses(out), tiny.weights(out), tiny.losses(out, "epoch")))
        for losses, weights, epochs in found[1:]:
            assert list(losses) == list(range(1, 10)) and epochs == found[0][2] and epochs[9] == 3
            assert losses == pytest.approx(found[0][0], abs=2e-5)
            assert_same_weights(weights, found[0][1], tolerance=2e-6)


@pytest.mark.parametrize(
    ("keys", "steps"),
    [
        ({"num_train_epochs": 2}, 10),
        ({"num_train_epochs": 0.5}, 3),
        ({"num_train_epochs": 1.5, "gradient_accumulation_steps": 2}, 5),
        ({"max_steps": 7}, 7),
        ({"streaming": True, "max_steps": 6, "buffer_size": 3}, 6),
        ({"packing": True, "cutoff_len": 300, "per_device_train_batch_size": 1, "num_train_epochs": 3}, None),
        ({"group_by_length": True}, 10),
        ({"max_samples": 5}, 4),
        ({"stage": "pt", "dataset": "text.txt", "cutoff_len": 100, "per_device_train_batch_size": 1}, None),
    ],
    ids=lambda value: "-".join(value)[:30] if isinstance(value, dict) else "",
)
def test_number_of_updates(tiny, out, keys, steps):
    if "dataset" in keys:
        keys = keys | {"dataset": tiny.folder / keys["dataset"]}
    assert tiny.train(out, **keys) == 0
    done = list(tiny.losses(out))
    assert done == list(range(1, done[-1] + 1))
    if steps is None:  # packed: fewer, fuller rows than examples
        assert done[-1] < 19 * keys.get("num_train_epochs", 2)
    else:
        assert done[-1] == steps


# Evaluation, the best model, checkpoints


def test_evaluation_equals_the_loss_of_the_saved_model(tiny, out):
    few = tiny.folder / "few.json"
    keys = {"eval_dataset": few, "evaluation_strategy": "epoch", "save_strategy": "epoch", "do_eval": True}
    assert tiny.train(out, do_train=True, **keys) == 0
    logged = tiny.losses(out, "eval_loss")
    assert list(logged) == [5, 10] and tiny.checkpoints(out) == [5, 10]
    results = tiny.results(out)
    assert results["eval_loss"] == logged[10] and results["eval_perplexity"] == pytest.approx(
        math.exp(logged[10])
    )
    before = (out / RUN_CONFIG).read_text()
    for batch in (1, 2, 5):  # do_eval alone, from the checkpoint's adapter
        adapter = {"adapter_name_or_path": out / "checkpoint-5", "per_device_eval_batch_size": batch}
        assert tiny.train(out, dataset=None, do_eval=True, eval_dataset=few, **adapter) == 0
        assert tiny.results(out)["eval_loss"] == pytest.approx(logged[5], abs=1e-5)
    assert (out / RUN_CONFIG).read_text() == before and tiny.checkpoints(out) == [5, 10]


@pytest.mark.parametrize("strategy", ["steps", "epoch"])
def test_the_last_step_is_evaluated_and_saved_and_may_be_the_best(tiny, out, strategy):
    """Two updates of three in the second epoch, as in transformers' trainer."""
    keys = {"evaluation_strategy": strategy, "save_strategy": strategy, "eval_steps": 2, "save_steps": 4}
    keys |= {"per_device_train_batch_size": 8, "num_train_epochs": 1.5, "load_best_model_at_end": True}
    keys |= {"eval_dataset": tiny.data, "greater_is_better": False}
    assert tiny.train(out, **keys) == 0
    evaluated = tiny.losses(out, "eval_loss")
    assert list(evaluated) == {"steps": [2, 4, 5], "epoch": [3, 5]}[strategy]
    assert tiny.checkpoints(out) == {"steps": [4, 5], "epoch": [3, 5]}[strategy]
    assert min(evaluated, key=evaluated.get) == 5
    assert_same_weights(tiny.weights(out), tiny.weights(out / "checkpoint-5"))


def test_several_evaluation_sets_are_measured_apart(tiny, out):
    more = tiny.folder / "more.json"
    more.write_text(json.dumps(make_rows(7, seed=11)))
    keys = {
        "eval_dataset": f"{tiny.folder / 'few.json'},{more}",
        "evaluation_strategy": "steps",
        "eval_steps": 4,
    }
    assert tiny.train(out, **keys) == 0
    (entry, *_) = [entry for entry in tiny.log(out) if "eval_loss" in entry]
    losses = [value for name, value in entry.items() if name.endswith("_loss") and name != "eval_loss"]
    assert len(losses) == 2 and entry["eval_loss"] == pytest.approx(sum(losses) / 2)


def test_the_best_checkpoint_is_kept_and_loaded(tiny, out, capsys):
    # the highest loss is called best here, so that it is an early one
    keys = {"greater_is_better": True, "max_steps": 12}
    keys |= {
        "val_size": 4,
        "evaluation_strategy": "steps",
        "eval_steps": 1,
        "save_strategy": "steps",
        "save_steps": 1,
    }
    assert tiny.train(out, load_best_model_at_end=True, save_total_limit=2, **keys) == 0
    evaluations = tiny.losses(out, "eval_loss")
    best = max(evaluations, key=evaluations.get)
    assert best < 5
    assert tiny.checkpoints(out) == [best, 12]
    assert_same_weights(tiny.weights(out), tiny.weights(out / f"checkpoint-{best}"))
    state = json.loads((out / "trainer_state.json").read_text())
    assert state["best_metric"] == evaluations[best] and state["best_model_checkpoint"].endswith(
        f"checkpoint-{best}"
    )
    assert f"checkpoint-{best}, eval_loss" in capsys.readouterr().out


def test_early_stopping(tiny, out, capsys):
    keys = {
        "val_size": 4,
        "evaluation_strategy": "steps",
        "eval_steps": 1,
        "learning_rate": 0,
        "logging_steps": 4,
    }
    keys |= {"early_stopping_steps": 3, "num_train_epochs": 5}
    assert tiny.train(out, save_strategy="steps", save_steps=100, **keys) == 0
    assert "early stop: no gain in 3 evaluations" in capsys.readouterr().out
    assert list(tiny.losses(out, "eval_loss")) == [1, 2, 3, 4] and tiny.checkpoints(out) == [4]
    assert list(tiny.losses(out)) == [4]
    assert tiny.train(out, save_strategy="steps", save_steps=100, **keys) == 0  # stays stopped
    assert "already trained to step 4" in capsys.readouterr().out


def test_greater_is_better_and_unknown_metrics(tiny, out, capsys):
    keys = {
        "val_size": 4,
        "evaluation_strategy": "steps",
        "eval_steps": 1,
        "save_strategy": "steps",
        "save_steps": 1,
    }
    keys |= {"max_steps": 3, "load_best_model_at_end": True}
    assert tiny.train(out, metric_for_best_model="perplexity", greater_is_better=True, **keys) == 0
    state = json.loads((out / "trainer_state.json").read_text())
    assert state["best_metric"] == max(tiny.losses(out, "eval_perplexity").values())
    assert tiny.train(out, overwrite_output_dir=True, metric_for_best_model="accuracy", **keys) == 2
    error = capsys.readouterr().err
    assert "metric_for_best_model: eval_accuracy is not measured" in error and "eval_perplexity" in error


def test_save_total_limit_and_the_checkpoint_at_the_end(tiny, out):
    assert tiny.train(out, save_strategy="steps", save_steps=3, save_total_limit=2) == 0
    assert tiny.checkpoints(out) == [9, 10]
    files = {path.name for path in (out / "checkpoint-10").iterdir()}
    wanted = {"adapter_model.safetensors", "adapter_config.json", "tokenizer.json", "trainer_state.json"}
    assert (
        wanted | {"training_state.pt", "rank_state_0.pt", "run_config.yaml", "chat_template.jinja"} <= files
    )
    assert_same_weights(tiny.weights(out), tiny.weights(out / "checkpoint-10"))


# Adapters, scratch, tokenized data


def test_adapters_chain_and_continue(tiny, tmp_path):
    assert tiny.train(tmp_path / "a") == 0
    assert tiny.train(tmp_path / "b", adapter_name_or_path=tmp_path / "a", learning_rate=0, max_steps=1) == 0
    assert_same_weights(tiny.weights(tmp_path / "a"), tiny.weights(tmp_path / "b"))  # trains the same one on
    again = {"adapter_name_or_path": tmp_path / "a", "create_new_adapter": True}
    assert tiny.train(tmp_path / "c", lora_rank=4, **again) == 0
    assert {value.shape[0] for name, value in tiny.weights(tmp_path / "c").items() if "lora_A" in name} == {4}
    both = {"adapter_name_or_path": f"{tmp_path / 'a'},{tmp_path / 'c'}"}
    assert tiny.train(tmp_path / "d", learning_rate=0, max_steps=1, **both) == 0
    assert_same_weights(tiny.weights(tmp_path / "c"), tiny.weights(tmp_path / "d"))
    assert tiny.losses(tmp_path / "d")[1] < tiny.losses(tmp_path / "a")[1] - 0.1  # it starts where c ended


def test_train_from_scratch_needs_no_weights(tiny, out):
    bare = tiny.make_model("bare", seed=1)
    (bare / "model.safetensors").unlink()
    keys = {
        "finetuning_type": "full",
        "model_name_or_path": bare,
        "learning_rate": 3e-3,
        "num_train_epochs": 3,
    }
    assert tiny.train(out, **keys) == 2
    assert tiny.train(out, train_from_scratch=True, **keys) == 0
    losses = tiny.losses(out)
    assert losses[1] == pytest.approx(math.log(CONFIG["vocab_size"]), rel=0.1) and falls(losses)


def test_tokenized_path_is_written_then_trained_on(tiny, out, tmp_path, capsys):
    saved = tmp_path / "tokens"
    assert tiny.train(out, tokenized_path=saved) == 0
    assert saved.is_dir() and not (out / "trainer_log.jsonl").exists()
    assert "run the same command again" in capsys.readouterr().out
    assert tiny.train(out, tokenized_path=saved) == 0
    losses = tiny.losses(out)
    assert tiny.train(out, overwrite_output_dir=True) == 0
    assert losses == tiny.losses(out)


# What a run leaves


def test_logs_and_results(tiny, out, capsys):
    keys = {"logging_steps": 3, "logging_first_step": True, "plot_loss": True, "val_size": 3}
    assert tiny.train(out, evaluation_strategy="steps", eval_steps=4, learning_rate=0, **keys) == 0
    log = [entry for entry in tiny.log(out) if "loss" in entry]
    steps = [entry["current_steps"] for entry in log]
    assert steps == [1, 3, 6, 8]
    wanted = "current_steps total_steps loss learning_rate epoch percentage elapsed_time remaining_time"
    for entry in log:
        assert set(wanted.split()) | {"tokens_per_second", "peak_memory", "grad_norm"} == entry.keys()
        assert (
            entry["total_steps"] == 8 and entry["tokens_per_second"] > 0 and 0.1 < entry["peak_memory"] < 20
        )
    assert log[1]["percentage"] == 37.5 and log[-1]["epoch"] == 2 and log[-1]["remaining_time"] == "0:00:00"
    state = json.loads((out / "trainer_state.json").read_text())
    assert state["global_step"] == state["max_steps"] == 8 and len(state["log_history"]) == 6
    assert {"step", "epoch", "eval_loss", "eval_perplexity"} <= state["log_history"][2].keys()
    results = tiny.results(out)
    # the mean over all updates, not over log lines
    mean = sum(entry["loss"] * count for entry, count in zip(log, (1, 2, 3, 2))) / 8
    assert results["train_loss"] == pytest.approx(mean, abs=1e-9)
    assert results["train_steps"] == 8 and results["epoch"] == 2 and results["train_samples_per_second"] > 0
    assert json.loads((out / "train_results.json").read_text()).keys() <= results.keys()
    assert (out / "training_loss.png").read_bytes().startswith(b"\x89PNG")
    text = capsys.readouterr().out
    assert (
        "step 3/8  loss" in text
        and "tok/s" in text
        and "left" in text
        and "{+" in text
        and "trainable" in text
    )


def test_tokens_are_counted_once(tiny, out):
    assert tiny.train(out, save_strategy="steps", save_steps=4, logging_steps=3, num_train_epochs=1) == 0
    seen = [json.loads((out / f"checkpoint-{n}" / "trainer_state.json").read_text()) for n in (4, 5)]
    tokens = [state["num_input_tokens_seen"] for state in seen]
    report = json.loads((out / "trainer_state.json").read_text())
    assert 0 < tokens[0] < tokens[1] == report["num_input_tokens_seen"]


def test_the_saved_configuration_reloads_to_the_same_values_and_run(tiny, out, tmp_path):
    assert tiny.train(out, lora_dropout=0.1) == 0
    first = configuration.load(
        tiny.words(out, lora_dropout=0.1), train.SECTIONS, program="train.py", description=""
    )
    again = configuration.load([str(out / RUN_CONFIG)], train.SECTIONS, program="train.py", description="")
    assert first.values == again.values
    assert yaml.safe_load((out / RUN_CONFIG).read_text())["lora_dropout"] == 0.1
    assert train.main([str(out / RUN_CONFIG), f"output_dir={tmp_path / 'again'}"]) == 0
    assert_same_weights(tiny.weights(out), tiny.weights(tmp_path / "again"))


# Mistakes


def refused(tiny, out, capsys, **keys) -> str:
    """The message of a run that must not start training; status 2, no traceback, nothing saved."""
    assert tiny.train(out, **keys) == 2
    text = capsys.readouterr().err
    assert (
        "Traceback" not in text
        and not (out / "trainer_log.jsonl").exists()
        and not run_folder.list_checkpoints(out)
    )
    return text


def test_a_poisoned_weight_stops_with_the_step_and_the_rows(tiny, out, capsys):
    poisoned = tiny.make_model("poisoned", seed=1)
    weights = load_file(poisoned / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3] = 3e38  # a number, but no product with it is
    save_file(weights, poisoned / "model.safetensors", metadata={"format": "pt"})
    assert tiny.train(out, model_name_or_path=poisoned, save_strategy="steps", save_steps=1) == 1
    error = capsys.readouterr().err
    assert (
        "not a finite number at step 1" in error and "rows.json row" in error and "Nothing was saved" in error
    )
    assert not tiny.checkpoints(out) and not (out / "adapter_model.safetensors").exists()


@pytest.mark.parametrize("keys", [{}, {"finetuning_type": "full"}, {"bf16": True}, {"fp16": True}], ids=str)
def test_a_divergence_is_found_at_its_step_although_nothing_is_logged(tiny, out, capsys, keys):
    keys = {
        "learning_rate": 1e30,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0,
        "logging_steps": 100,
        **keys,
    }
    assert tiny.train(out, save_strategy="steps", save_steps=4, num_train_epochs=5, **keys) == 1
    error = capsys.readouterr().err
    assert "is not a finite number at step 2" in error and "learning_rate" in error
    assert not tiny.checkpoints(out) and not (out / "train_results.json").exists()


def test_an_evaluation_that_is_not_finite_stops_the_run(tiny, out, capsys):
    keys = {
        "learning_rate": 1e30,
        "max_grad_norm": 0,
        "val_size": 4,
        "evaluation_strategy": "steps",
        "eval_steps": 1,
    }
    assert tiny.train(out, max_steps=1, **keys) == 1
    assert "the evaluation's loss on validation is nan" in capsys.readouterr().err


def test_a_tokenizer_of_another_model_is_refused(tiny, out, capsys):
    small = tiny.make_model("small", seed=1, vocab_size=300)
    error = refused(tiny, out, capsys, model_name_or_path=small)
    assert (
        str(small) in error and "vocab_size 300" in error and "rows.json:1 (row 0): the text holds" in error
    )
    streamed = {"streaming": True, "max_steps": 2}
    assert "vocab_size 300" in refused(tiny, out, capsys, model_name_or_path=small, **streamed)


def test_unused_token_ids_beyond_the_embedding_do_no_harm(tiny, out):
    vocabulary = Tokenizer.from_folder(tiny.model).vocab_size
    smaller = tiny.make_model("smaller", seed=1, vocab_size=vocabulary - 2)  # the last are tool marks
    assert tiny.train(out, model_name_or_path=smaller, max_steps=1) == 0


def test_missing_files_are_named(tiny, out, capsys):
    assert "nowhere" in refused(tiny, out, capsys, model_name_or_path=tiny.folder / "nowhere")
    error = refused(tiny, out, capsys, dataset="nothing", dataset_dir=ROOT / "data")
    assert "nothing" in error and "dataset_info.json" in error
    assert "gone.json" in refused(tiny, out, capsys, dataset=tiny.folder / "gone.json")
    assert "adapter" in refused(tiny, out, capsys, adapter_name_or_path=tiny.folder / "none")
    assert "output_dir: missing" in refused(tiny, out, capsys, output_dir=None)


def test_a_truncated_model_file_is_named(tiny, out, capsys):
    short = tiny.make_model("short", seed=1)
    content = (short / "model.safetensors").read_bytes()
    (short / "model.safetensors").write_bytes(content[:-1000])
    error = refused(tiny, out, capsys, model_name_or_path=short)
    assert f"{short / 'model.safetensors'}: not a complete safetensors file" in error


def test_an_unusable_output_folder_is_said_before_anything_is_read(tiny, tmp_path, capsys):
    (tmp_path / "file").write_text("in the way")
    for place in (tmp_path / "file", tmp_path / "file/out"):
        assert tiny.train("unused", output_dir=place, model_name_or_path="nowhere") == 2
        found = f"output_dir: {place}: {tmp_path / 'file'} is a file; name another folder"
        assert found in capsys.readouterr().err


def test_unknown_and_missing_monitors(tiny, out, capsys, monkeypatch):
    error = refused(tiny, out, capsys, report_to="tensorbord")
    assert "report_to: 'tensorbord' is not one of none, tensorboard, wandb, mlflow" in error
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "pip install wandb" in refused(tiny, out, capsys, report_to="wandb")


def test_options_that_make_no_sense(tiny, out, capsys):
    assert "do_train" in refused(tiny, out, capsys, do_train=False)
    assert "num_train_epochs" in refused(tiny, out, capsys, num_train_epochs=0)
    assert "per_device_train_batch_size" in refused(tiny, out, capsys, per_device_train_batch_size=0)
    assert "choose one" in refused(tiny, out, capsys, bf16=True, fp16=True)
    assert "learning_rat" in refused(tiny, out, capsys, learning_rat=1)
    assert "gradient_checkpointing" in refused(tiny, out, capsys, gradient_checkpointing="some")
    compiled = {"torch_compile": True, "gradient_checkpointing": "selective"}
    assert "of no use with torch_compile" in refused(tiny, out, capsys, **compiled)
    assert "torch_compile_backend: best is unknown" in refused(
        tiny, out, capsys, torch_compile_backend="best"
    )
    assert "torch_compile_mode: best is not one of" in refused(tiny, out, capsys, torch_compile_mode="best")
    compiled = {"torch_compile_backend": "eager", "torch_compile_mode": "default"}
    assert "is for inductor, not for eager" in refused(tiny, out, capsys, **compiled)
    compiled = {
        "torch_compile_backend": "eager",
        "gradient_checkpointing": "selective",
    }  # a backend alone turns it on
    assert "of no use with torch_compile" in refused(tiny, out, capsys, **compiled)


def test_an_interrupt_before_the_first_update(tiny, out, capsys, monkeypatch):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(setup, "build_model", interrupted)
    assert tiny.train(out) == 130
    assert "nothing was trained" in capsys.readouterr().err


def test_a_disk_that_fills_during_a_save_is_no_traceback(tiny, out, capsys, monkeypatch):
    def full(*arguments, **keys):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(run, "save_tokenizer", full)
    assert tiny.train(out, save_strategy="steps", save_steps=2) == 1
    error = capsys.readouterr().err
    assert f"output_dir: {out / 'checkpoint-2'} could not be written ([Errno 28] No space left" in error
    assert not list(out.glob("*checkpoint*"))


def test_the_command_itself(tiny, out):
    """A file, keys over it, a pipe: plain lines without a bar."""
    file = tiny.folder / "run.yaml"
    file.write_text("\n".join(word.replace("=", ": ", 1) for word in tiny.words(out)))
    command = [sys.executable, str(ROOT / "train.py"), str(file), "--max_steps", "3", "plot_loss=true"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stderr == ""
    assert "step 3/3  loss" in done.stdout and "\r" not in done.stdout and f"saved to {out}" in done.stdout


def test_what_a_stream_drops_is_told_at_the_end(tiny, capsys):
    """Before the first row is read nothing is known of it, so the report comes after the training."""
    rows = tiny.folder / "pairs.jsonl"
    answers = [(f"one two {n}", "one" if n % 2 else f"one two {n}") for n in range(6)]
    pairs = [{"prompt": "count", "chosen": chosen, "rejected": rejected} for chosen, rejected in answers]
    rows.write_text("".join(json.dumps(row) + "\n" for row in pairs))
    keys = {"streaming": True, "max_steps": 3, "buffer_size": 2, "per_device_train_batch_size": 1}
    assert tiny.train("stream-told", stage="dpo", dataset=rows, **keys) == 0
    told = capsys.readouterr().out.split("saved to")[-1]
    assert "dropped" in told and "identical answers" in told and "pairs.jsonl:1" in told
