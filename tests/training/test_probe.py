"""test_oom and optim_in_backward: neither changes what is learnt."""

import pytest
import torch
from tiny_runs import assert_same_weights, tiny_runs

from model import Decoder
from tests.training.test_memory import large
from training import memory


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    with tiny_runs(tmp_path_factory.mktemp("probe")) as made:
        yield made


def test_the_largest_batch_is_tried_first_and_nothing_of_it_stays(tiny, capsys):
    keys = {"num_train_epochs": 1, "lora_dropout": 0.2}
    assert tiny.train("plain", **keys) == 0
    capsys.readouterr()
    assert tiny.train("tried", test_oom=True, **keys) == 0
    said = capsys.readouterr().out
    assert "test_oom: the largest batch" in said.split("step 1/")[0]
    assert_same_weights(tiny.weights("plain"), tiny.weights("tried"))


def test_the_largest_batch_that_does_not_fit_ends_the_run_before_its_first_update(tiny, capsys, monkeypatch):
    def too_large(*rest):
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(Decoder, "forward", too_large)
    assert tiny.train("large", test_oom=True) == 1
    assert "test_oom: the largest batch" in capsys.readouterr().err


@pytest.mark.parametrize("optim", ["adamw_torch", "adafactor", "sgd"])
@pytest.mark.parametrize("tied", [False, True])
def test_updates_in_the_backward_pass_are_those_behind_it(tiny, optim, tied):
    model = tiny.make_model(f"tied {tied}", seed=2, tie_word_embeddings=tied)
    keys = {"finetuning_type": "full", "max_grad_norm": 0, "max_steps": 3, "num_train_epochs": None}
    keys |= {"model_name_or_path": model, "optim": optim, "learning_rate": 1e-3}
    assert tiny.train("behind", overwrite_output_dir=True, **keys) == 0
    assert tiny.train("within", overwrite_output_dir=True, optim_in_backward=True, **keys) == 0
    assert_same_weights(tiny.weights("behind"), tiny.weights("within"))


@pytest.mark.parametrize(
    "keys", [{}, {"max_grad_norm": 0, "gradient_accumulation_steps": 2}, {"max_grad_norm": 0, "fp16": True}]
)
def test_what_needs_all_gradients_at_once_is_refused(tiny, keys, capsys):
    assert tiny.train("refused", finetuning_type="full", optim_in_backward=True, **keys) == 2
    assert "optim_in_backward" in capsys.readouterr().err


def test_one_gradient_at_a_time_is_what_is_counted():
    model = large("full")
    all_of_them, one = memory.need(model, 512), memory.need(model, 512, in_backward=True)
    largest = max(parameter.nbytes for parameter in model.parameters())
    assert one.gradients == largest < all_of_them.gradients / 10
    assert one.optimizer == all_of_them.optimizer
