"""What is dropped and made again changes no bit, and drops what it says."""

import gc
from dataclasses import replace

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import lora
from architectures import config_from_hf
from checkpoints import trainable
from kernels import recompute
from kernels.recompute import Offload, Plan
from lora import LoraOptions
from model import Decoder, initialize_weights

LAYERS = 5
SHAPE = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 97, "hidden_size": 48,
    "intermediate_size": 72, "num_hidden_layers": LAYERS, "num_attention_heads": 3, "num_key_value_heads": 1,
    "head_dim": 16, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "rope_theta": 1e4,
    "hidden_act": "silu",
}  # fmt: skip


class Ledger:
    """Stands in for a GPU's copy engine: what is sent away lies outside torch, and every move is written
    down."""

    def __init__(self):
        self.moves = []
        self.count = 0

    def send(self, tensor):
        self.count += 1
        self.moves.append(f"send {self.count}")
        return self.count, tensor.clone().view(torch.uint8).numpy().tobytes(), tensor.dtype, tensor.shape

    def fetch(self, sent):
        number, content, dtype, shape = sent
        self.moves.append(f"fetch {number}")
        return number, torch.frombuffer(bytearray(content), dtype=dtype).view(shape)

    def arrived(self, fetched):
        self.moves.append(f"use {fetched[0]}")
        return fetched[1]


@pytest.mark.parametrize("mib", [0.001, 1, 12.4, 33, 63.5])
def test_host_memory_is_taken_in_powers_of_two_that_lose_less_than_one_mib(mib):
    """torch makes a power of two of whatever is pinned: 64 MiB of 33."""
    tensor = torch.randn(int(mib * 2**20) // 2 + 1).bfloat16()
    host = recompute.OnHost(tensor, pinned=False)
    sizes = [len(piece) for piece in host.pieces]
    assert all(size & (size - 1) == 0 for size in sizes) and 0 <= sum(sizes) - tensor.nbytes < 2**20
    host.copy(tensor, back=False)
    found = torch.zeros(host.shape, dtype=host.dtype)
    host.copy(found, back=True)
    assert torch.equal(found, tensor)


def offloading():
    return Plan(full=LAYERS, offload=Offload(Ledger()))


PLANS = {
    "full": lambda: Plan(full=LAYERS),
    "selective": lambda: Plan(selective=LAYERS),
    "offload": offloading,
    "one full": lambda: Plan(full=1),
    "mixed": lambda: Plan(full=2, selective=2),
}


def make_model(method: str = "lora", dtype=torch.float32, **shape) -> Decoder:
    model = Decoder(config_from_hf({**SHAPE, **shape}))
    initialize_weights(model, torch.Generator().manual_seed(0))
    if method != "full":
        options = LoraOptions(lora_dropout=0.2 if method == "dropout" else 0.0, use_dora=method == "dora")
        trainable.prepare_trainable(model, options, torch.Generator().manual_seed(1))
        for layer in lora.lora_layers(model).values():
            torch.nn.init.normal_(layer.lora_b, std=0.1, generator=torch.Generator().manual_seed(2))
    model.runtime.compute_dtype = dtype
    return model.train()


def row(lengths=(3, 40, 14), seed=0):
    tokens = torch.randint(97, (sum(lengths),), generator=torch.Generator().manual_seed(seed))
    positions = torch.cat([torch.arange(length) for length in lengths]).int()
    borders = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    return tokens, positions, borders, max(lengths)


def gradients(model: Decoder, plan: Plan, rows) -> list[torch.Tensor]:
    """Hidden states and every gradient after one backward pass per row, accumulated; then the next random
    number."""
    model.runtime.recompute = plan
    model.zero_grad()
    torch.manual_seed(7)
    results = []
    for one in rows:
        hidden = model(*one)
        hidden.float().square().sum().backward()
        results.append(hidden.detach())
    results += [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
    return [*results, torch.rand(3)]


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("method", ["lora", "dropout", "dora", "full"])
def test_every_policy_gives_the_bits_of_none(plan, method):
    model = make_model(method)
    model.runtime.embedding_noise = 5.0
    rows = [row(), row((31,), seed=1)]
    for one, other in zip(gradients(model, Plan(), rows), gradients(model, PLANS[plan](), rows), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [({"hidden_act": "gelu_pytorch_tanh"}, torch.float32), ({}, torch.bfloat16)],
    ids=["gelu", "bf16"],
)
def test_other_activations_and_dtypes(plan, shape, dtype):
    model, rows = make_model("full", dtype, **shape), [row()]
    for one, other in zip(gradients(model, Plan(), rows), gradients(model, PLANS[plan](), rows), strict=True):
        assert torch.equal(one, other)


def kept_bytes(model: Decoder, plan: Plan, tokens: int = 2048) -> int:
    """Of torch's memory that a forward pass leaves allocated while its graph lives."""
    model.runtime.recompute = plan
    one = row((tokens,))
    model(*one)  # what is made once is made now
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watched:
        hidden = model(*one)
    assert hidden.requires_grad
    return sum(event.self_cpu_memory_usage for event in watched.events())


@pytest.mark.parametrize("method", ["lora", "full"])
def test_each_policy_keeps_less_than_the_one_before(method):
    model, tokens = make_model(method), 2048
    kept = {name: kept_bytes(model, make(), tokens) for name, make in {"none": Plan, **PLANS}.items()}
    assert kept["none"] > kept["selective"] > kept["mixed"] > kept["full"] > kept["offload"]
    value = 4 * tokens  # bytes of one number per token
    # two norms and the activation's product of every block; but a frozen embedding's norm is dropped in
    # exchange for the embedding, which nobody else keeps. And the input of every block.
    exchanged = 48 if method == "lora" else 0
    assert kept["none"] - kept["selective"] >= value * (LAYERS * (2 * 48 + 72) - exchanged)
    assert kept["full"] - kept["offload"] == LAYERS * value * 48
    # the rotation's tables and what the last norm keeps
    assert kept["offload"] < value * (16 + 4 * 48)


def test_an_input_comes_back_one_block_ahead_and_goes_when_it_is_used():
    model, plan = make_model(), offloading()
    ledger = plan.offload.transfers
    gradients(model, plan, [row()])
    sent = [f"send {i}" for i in range(1, LAYERS + 1)]
    back = [
        "fetch 5",
        "fetch 4",
        "use 5",
        "fetch 3",
        "use 4",
        "fetch 2",
        "use 3",
        "fetch 1",
        "use 2",
        "use 1",
    ]
    assert ledger.moves == sent + back
    assert plan.offload.last is None
    ledger.moves.clear()
    model(*row()).sum().backward()  # a second pass, and a forward pass without its backward before it
    assert len(ledger.moves) == 3 * LAYERS


def test_a_value_that_is_saved_three_times_is_made_once():
    calls = []

    def double(x):
        calls.append(1)
        return x * 2

    x = torch.randn(5, 3, requires_grad=True)
    weights = [torch.randn(4, 3, requires_grad=True) for _ in range(3)]
    with recompute._Book():
        value = recompute.remember(double(x.detach()), double, x.detach())
        total = sum((value @ weight.T).sum() for weight in weights)
    assert len(calls) == 1
    total.backward(retain_graph=True)
    assert len(calls) == 2
    expected = 2 * x.detach().sum(0).expand(4, 3)
    assert all(torch.allclose(weight.grad, expected) for weight in weights)
    total.backward()  # once more through the same graph
    assert all(torch.allclose(weight.grad, 2 * expected) for weight in weights)


def test_a_changed_input_is_an_error_and_no_wrong_gradient():
    x, weight = torch.randn(5, 3), torch.randn(4, 3, requires_grad=True)
    with recompute._Book():
        result = recompute.remember(-x, torch.neg, x) @ weight.T
    x.zero_()
    with pytest.raises(RuntimeError, match="changed in place"):
        result.sum().backward()


def test_nothing_is_dropped_where_nothing_is_learned():
    model = make_model()
    model.runtime.recompute = replace(offloading(), selective=0)
    with torch.no_grad():
        model(*row())
    assert not model.runtime.recompute.offload.transfers.moves
