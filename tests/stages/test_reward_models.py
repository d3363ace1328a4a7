"""Rewards that a reward model gives, as an adapter on the policy's base, as a second model, or over HTTP."""

import contextlib
import http.server
import json
import re
import socket
import threading
import time
from contextlib import contextmanager

import pytest
import torch
from tiny_runs import assert_same_weights, make_rows, tiny_runs
from tiny_tokenizers import make_tokenizer

from checkpoints.huggingface import load_model, save_model, trained
from checkpoints.peft import apply_adapters, load_adapter, merge_adapters
from checkpoints.trainable import prepare_trainable
from checkpoints.value_head import VALUE_HEAD, ValueHead, load_value_head
from generation.generate import generate
from generation.sampling import GenerateOptions
from lora import LoraOptions
from options.errors import StopRun
from quant import QuantOptions
from quant import from_options as quantisation
from stages.rewards import AdapterReward, ApiReward, ModelReward, Sample
from stages.rm import score_texts
from text.tokenizer import Tokenizer

TEXTS = [([5, 6, 7], [8, 9, 2]), ([1], [2]), ([30, 31, 32, 33, 34], [35, 36, 37, 38, 39, 40, 41])]
SAMPLES = [Sample("", "", None, prompt, answer, "stop") for prompt, answer in TEXTS]
IDS = [prompt + answer for prompt, answer in TEXTS]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    with tiny_runs(tmp_path_factory.mktemp("reward")) as made:
        yield made


def stir(model, seed):
    """Adapters that do something."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if name.endswith("lora_b"):
            parameter.data.normal_(0, 0.2, generator=generator)
        elif parameter.requires_grad and parameter.dim() == 1:
            parameter.data.mul_(1.3)
    return model


def adapted(tiny, seed, quantization=None, **options):
    model = load_model(tiny.model, quantization=quantization)
    prepare_trainable(model, LoraOptions(lora_rank=3, **options), torch.Generator().manual_seed(seed))
    return stir(model, seed)


def write_reward_adapter(tiny, name, **options):
    model = adapted(tiny, 11, **options)
    model.v_head = ValueHead(model.config.hidden_size, generator=torch.Generator().manual_seed(12))
    folder = tiny.folder / name
    trained(model, str(tiny.model))(folder, tiny.model)
    return folder


def alone(tiny, folder, quantization=None):
    """Scores of the reward adapter on a base of its own."""
    model = load_model(tiny.model, quantization=quantization)
    load_adapter(model, folder)
    model.v_head = ValueHead(model.config.hidden_size)
    load_value_head(model.v_head, folder)
    return score_texts(model, IDS)


# An adapter on the same base


REWARD_KINDS = {
    "lora": {},
    "few targets": {"lora_target": ("q_proj", "down_proj")},
    "dora": {"use_dora": True},
    "whole modules": {"additional_target": ("norm", "embed_tokens")},
}


@pytest.mark.parametrize("kind", REWARD_KINDS)
@pytest.mark.parametrize("policy_target", ["all", "v_proj"])
def test_an_adapter_scores_as_on_a_base_of_its_own_and_leaves_the_policy_as_it_was(tiny, kind, policy_target):
    folder = write_reward_adapter(tiny, f"adapter-{kind}", **REWARD_KINDS[kind])
    policy = adapted(tiny, 21, lora_target=(policy_target,)).train()
    policy.v_head = values = ValueHead(policy.config.hidden_size)
    before = {name: parameter.clone() for name, parameter in policy.named_parameters()}
    modules = [id(module) for module in policy.modules()]
    modes = [module.training for module in policy.modules()]
    reward = AdapterReward(policy, folder)
    expected = alone(tiny, folder)
    for _ in range(2):
        torch.testing.assert_close(reward.scores(SAMPLES), expected, rtol=1e-5, atol=1e-5)
    own = score_texts(policy, IDS)
    assert (own - expected).abs().max() > 0.01  # or else the test would see no difference
    assert [id(module) for module in policy.modules()] == modules and policy.v_head is values
    assert [module.training for module in policy.modules()] == modes
    after = dict(policy.named_parameters())
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_an_adapter_scores_on_a_quantised_base(tiny):
    format = quantisation(QuantOptions(quantization_bit=4))
    folder = write_reward_adapter(tiny, "adapter-on-codes")
    policy = adapted(tiny, 22, quantization=format)
    torch.testing.assert_close(AdapterReward(policy, folder).scores(SAMPLES), alone(tiny, folder, format))


def test_texts_are_the_same_before_and_after_scoring(tiny):
    folder, policy = write_reward_adapter(tiny, "adapter-between"), adapted(tiny, 23).eval()
    reward, options = AdapterReward(policy, folder), GenerateOptions(do_sample=False, max_new_tokens=6)
    first = generate(policy, [[4, 5]], options, stop_ids=())
    reward.scores(SAMPLES)
    assert generate(policy, [[4, 5]], options, stop_ids=()) == first


def test_what_cannot_be_scored_on_the_policys_base_is_refused(tiny):
    folder = write_reward_adapter(tiny, "adapter-refused")
    whole = adapted(tiny, 25, additional_target=("norm",))
    with pytest.raises(ValueError, match="norm trains in full; set reward_model_type=full"):
        AdapterReward(whole, folder)
    (folder / VALUE_HEAD).unlink()
    with pytest.raises(ValueError, match=r"no value_head.safetensors in .*adapter-refused"):
        AdapterReward(adapted(tiny, 26), folder)
    wide = load_model(tiny.make_model("wide", seed=5, hidden_size=48, head_dim=12))
    prepare_trainable(wide, LoraOptions(lora_rank=3))
    with pytest.raises(ValueError, match="v_head.summary.weight has shape"):
        AdapterReward(wide, write_reward_adapter(tiny, "adapter-narrow"))


# A model of its own


def test_a_model_of_its_own_scores_with_the_head_of_its_last_adapter_that_has_one(tiny):
    first, second = (
        write_reward_adapter(tiny, f"own-{number}", lora_target=(target,))
        for number, target in enumerate(("q_proj", "v_proj"))
    )
    (second / VALUE_HEAD).unlink()
    model = load_model(tiny.model)
    apply_adapters(model, [first, second])
    reward = ModelReward(model, [second, first, tiny.model])
    merged = load_model(tiny.model)
    merge_adapters(merged, [first, second])
    merged.v_head = ValueHead(merged.config.hidden_size)
    load_value_head(merged.v_head, first)
    torch.testing.assert_close(reward.scores(SAMPLES), score_texts(merged, IDS))
    with pytest.raises(ValueError, match="no value_head.safetensors in"):
        ModelReward(model, [second, tiny.model])


# Over HTTP


@contextmanager
def server(answer, status=200, seconds=0.0, failures=0):
    """A scoring server on 127.0.0.1: gives its address and the list of what it was asked."""
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            time.sleep(seconds)
            failed = len(asked) <= failures
            body = b"" if failed else (answer(asked[-1]) if callable(answer) else answer)
            self.send_response(503 if failed else status)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *arguments):
            pass

    http_server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=http_server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{http_server.server_port}/v1/score", asked
    finally:
        http_server.shutdown()
        http_server.server_close()


def lengths(request):
    return json.dumps({"scores": [len(text) for text in request["messages"]]}).encode()


def test_a_server_gets_whole_texts_and_its_scores_are_the_reward(tiny):
    tokenizer = Tokenizer.from_folder(tiny.model)
    prompt = tokenizer.encode("<|im_start|>user\nthe anvil<|im_end|>\n<|im_start|>assistant\n")
    answer = tokenizer.encode("sings<|im_end|>")
    samples = [
        Sample("", "", None, prompt, answer, "stop"),
        Sample("", "", None, prompt, answer[:1], "length"),
    ]
    with server(lengths) as (address, asked):
        scores = ApiReward(address, tokenizer, 10.0).scores(samples)
    whole = "<|im_start|>user\nthe anvil<|im_end|>\n<|im_start|>assistant\nsings<|im_end|>"
    assert asked[0]["model"] and asked[0]["messages"][0] == whole
    assert scores.tolist() == [len(text) for text in asked[0]["messages"]]


def test_a_server_that_fails_for_a_moment_is_asked_again(tiny):
    tokenizer = Tokenizer.from_folder(tiny.model)
    with server(lengths, failures=2) as (address, asked):
        assert len(ApiReward(address, tokenizer, 10.0, pause_seconds=0.01).scores(SAMPLES)) == 3
    assert len(asked) == 3


@pytest.mark.parametrize(
    "words, reason, tries",
    [
        ({"answer": b'{"scores": [1.0, 2.0]}'}, "gave 2 scores for 3 texts", 1),
        ({"answer": b"<html>"}, "answered '<html>', expected", 1),
        ({"answer": b'{"scores": ' + b"[" * 100_000}, 'expected {"scores"', 1),
        ({"answer": b'{"scores": [1' + b"0" * 400 + b"]}"}, 'expected {"scores"', 1),
        ({"answer": b'{"score": 1}'}, 'expected {"scores"', 1),
        ({"answer": b'{"scores": [1, null, 2]}'}, 'expected {"scores"', 1),
        ({"answer": b'{"scores": [1, NaN, 2]}'}, "is nan, expected a finite number", 1),
        ({"answer": b'{"scores": "123"}'}, r'expected {"scores".*no list of scores', 1),
        ({"answer": b'{"scores": [1, true, 2]}'}, r'expected {"scores".*a score that is no number', 1),
        ({"answer": b'{"scores": ["1", "2", "3"]}'}, r'expected {"scores".*a score that is no number', 1),
        ({"answer": b'{"scores": [1, 2, 3], "scores": [1, 2, 4]}'}, "'scores' is there twice", 1),
        ({"answer": b"[1, 2, 3]"}, "found a list, expected a JSON object", 1),
        ({"answer": b'{"scores": [1, 2, ' + b"7" * 400 + b"]}"}, "a number of 400 digits", 1),
        ({"answer": b'{"scores": [1, 2, ' + b"7" * 300 + b"]}"}, "is inf, expected a finite number", 1),
        ({"answer": b"", "status": 404}, "Not Found", 1),
        ({"answer": b"", "failures": 9}, "Service Unavailable", 3),
        ({"answer": b"", "seconds": 0.4}, r"no answer within 0.1 seconds \(reward_api_timeout\)", 3),
    ],
)
def test_a_server_that_does_not_serve_stops_the_run_and_says_why(tiny, words, reason, tries):
    with server(**words) as (address, asked):
        reward = ApiReward(
            address, Tokenizer.from_folder(tiny.model), 0.1 if "seconds" in words else 10.0, 0.01
        )
        with pytest.raises(StopRun, match=reason):
            reward.scores(SAMPLES)
        assert len(asked) == tries


@pytest.mark.parametrize("begin", [b"HTTP/1.0 200 OK\r\n\r\n", b"HTTP/1.0 200 OK\r\nA: ", b""])
def test_a_server_that_drips_is_not_waited_for_longer_than_one_that_is_silent(tiny, begin):
    """A byte now and then, in the body, in the headers or before them, never reaches a socket's own limit."""

    def drip(listening):
        with contextlib.suppress(OSError):
            while True:
                connection, _ = listening.accept()
                threading.Thread(target=one, args=(connection,), daemon=True).start()

    def one(connection):
        with contextlib.suppress(OSError), connection:
            connection.sendall(begin)
            while True:
                connection.sendall(b"H" if not begin else b"1")
                time.sleep(0.05)

    with socket.create_server(("127.0.0.1", 0)) as listening:
        threading.Thread(target=drip, args=(listening,), daemon=True).start()
        address, started = f"http://127.0.0.1:{listening.getsockname()[1]}", time.monotonic()
        with pytest.raises(StopRun, match=r"no answer within 0.3 seconds \(reward_api_timeout\)"):
            ApiReward(address, Tokenizer.from_folder(tiny.model), 0.3, 0.01).scores(SAMPLES)
        assert time.monotonic() - started < 10


def test_no_server_stops_the_run(tiny):
    with server(b"") as (address, _):
        pass
    with pytest.raises(StopRun, match="refused.*does the server run"):
        ApiReward(address, Tokenizer.from_folder(tiny.model), 1.0, 0.01).scores(SAMPLES)


# The command line

RUN = {
    "stage": "grpo",
    "num_generations": 2,
    "max_new_tokens": 4,
    "max_steps": 1,
    "beta": 0.0,
    "per_device_train_batch_size": 2,
}


@pytest.mark.parametrize(
    ("words", "said"), [({"status": 404}, "HTTP status 404"), ({}, 'expected {"scores"')]
)
def test_a_wrong_address_is_refused_before_the_model_is_read(tiny, capsys, words, said):
    with server(b"<html>", **words) as (address, asked):
        keys = RUN | {"reward_model": address, "reward_model_type": "api"}
        assert tiny.train("nowhere", **keys) == 1
        assert tiny.train("planned", **keys, plan=True) == 0  # asks nobody
    told = capsys.readouterr()
    assert f"train.py: reward_model: {address}" in told.err and said in told.err
    assert [request["messages"] for request in asked] == [["Hello"]]
    assert not list((tiny.folder / "nowhere").glob("*"))


@pytest.mark.parametrize("stage", ["ppo", "grpo"])
def test_a_server_that_is_gone_for_good_costs_nothing_that_was_trained(tiny, capsys, stage):
    keys = RUN | {
        "stage": stage,
        "reward_model_type": "api",
        "max_steps": 4,
        "ppo_epochs": 2,
        "num_iterations": 2,
    }
    keys |= {"save_steps": 50, "save_strategy": "steps", "ppo_score_norm": stage == "ppo"}
    left = [3]  # the question at the start, and two draws of which the second has no answer

    def few(request):
        left[0] -= 1
        return lengths(request) if left[0] > 0 else b"busy"

    with server(few) as (address, _):
        assert tiny.train(f"{stage}-gone", **keys, reward_model=address) == 1
        assert "the same command continues from" in capsys.readouterr().err
        assert tiny.checkpoints(f"{stage}-gone") == [2]
        left[0] = 99
        assert tiny.train(f"{stage}-gone", **keys, reward_model=address) == 0
        assert tiny.train(f"{stage}-here", **keys, reward_model=address) == 0
    assert_same_weights(tiny.weights(f"{stage}-here"), tiny.weights(f"{stage}-gone"))


def test_runs_are_rewarded_by_each_kind_of_reward_model(tiny):
    adapter = write_reward_adapter(tiny, "run-adapter")
    full = tiny.folder / "run-full"
    model = load_model(tiny.model)
    save_model(model, full, tiny.model)
    model.v_head = ValueHead(model.config.hidden_size)
    trained(model, "x")(full, tiny.model)
    assert tiny.train("by-adapter", **RUN, reward_model=adapter) == 0
    assert tiny.train("by-model", **RUN, reward_model=full, reward_model_type="full") == 0
    keys = {"reward_model": tiny.model, "reward_model_type": "full", "reward_model_adapters": adapter}
    assert tiny.train("by-both", **RUN, **keys, reward_model_quantization_bit=8) == 0
    assert tiny.train("ppo-by-adapter", **(RUN | {"stage": "ppo"}), reward_model=adapter) == 0
    with server(lengths) as (address, asked):
        assert tiny.train("by-server", **RUN, reward_model=address, reward_model_type="api") == 0
    assert (
        sum(len(request["messages"]) for request in asked) == 1 + 4
    )  # one text at the start, to see that it answers
    assert all(
        "reward" in tiny.log(name)[0] for name in ("by-adapter", "by-model", "by-both", "ppo-by-adapter")
    )


@pytest.mark.parametrize(
    "keys, reason",
    [
        ({}, "answers need a reward; name a reward_file"),
        ({"reward_model": "run-bare"}, "no value_head.safetensors in .*run-bare"),
        (
            {"reward_model": "run-other", "reward_model_type": "full"},
            "reward_model: .*run-other has another tokeni",
        ),
        (
            {"reward_model": "run-bare", "reward_model_type": "full"},
            "run-bare is an adapter; set reward_model_type",
        ),
        ({"reward_model": "nowhere/at/all"}, "reward_model: no folder"),
        (
            {"reward_model": "run-bare", "finetuning_type": "full"},
            "set reward_model_type=full, or finetuning_type",
        ),
    ],
)
def test_a_reward_model_that_cannot_serve_is_refused_before_training(tiny, capsys, keys, reason):
    if not (tiny.folder / "run-bare").exists():
        bare = write_reward_adapter(tiny, "run-bare")
        (bare / VALUE_HEAD).unlink()
        tiny.make_model("run-other", seed=3)
        make_tokenizer(tiny.folder / "run-other", "llama3")
    if str(keys.get("reward_model", "")).startswith("run-"):
        keys = keys | {"reward_model": tiny.folder / keys["reward_model"]}
    assert tiny.train("refused", **RUN, **keys) == 2
    assert re.search(reason, capsys.readouterr().err)


def test_an_adapter_that_lies_on_other_adapters_is_refused(tiny, capsys):
    pairs = [
        {"instruction": row["instruction"], "output": [row["output"] + " yes", "no"]} for row in make_rows(9)
    ]
    (tiny.folder / "pairs.json").write_text(json.dumps(pairs))
    info = {"pairs": {"file_name": "pairs.json", "ranking": True}, "rows": {"file_name": "rows.json"}}
    (tiny.folder / "dataset_info.json").write_text(json.dumps(info))
    keys = {"dataset_dir": tiny.folder, "num_train_epochs": 1}
    assert tiny.train("sft", dataset="rows", **keys) == 0
    rm = {
        "stage": "rm",
        "dataset": "pairs",
        "adapter_name_or_path": tiny.folder / "sft",
        "create_new_adapter": True,
    }
    assert tiny.train("rm", **keys, **rm) == 0
    run = {**RUN, "reward_model": tiny.folder / "rm", "adapter_name_or_path": tiny.folder / "sft"}
    assert tiny.train("continued", **run) == 2
    assert "was trained on the base with" in capsys.readouterr().err
    assert tiny.train("stacked", **run, create_new_adapter=True) == 0
