"""The token loss is a sum over labelled tokens that neither packing, nor empty rows, nor an adapted head
changes."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_model import oracle

from checkpoints.huggingface import load_model
from checkpoints.trainable import prepare_trainable
from lora import LoraOptions, lora_off
from pipeline.batch import Example, collate
from stages import logprobs
from stages.logprobs import head_loss
from stages.sft import TokenLoss

KINDS = {
    "lora": LoraOptions(lora_rank=3),
    "dora": LoraOptions(lora_rank=3, use_dora=True),
    "lora with head": LoraOptions(lora_rank=3, lora_target=("all", "lm_head")),
    "dora with head": LoraOptions(lora_rank=3, lora_target=("all", "lm_head"), use_dora=True),
    "lora with modules": LoraOptions(lora_rank=3, additional_target=("embed_tokens", "lm_head", "norm")),
    "full": LoraOptions(finetuning_type="full"),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    model = oracle("llama-biases")
    for parameter in model.parameters():
        parameter.data.mul_(
            0.25 if parameter.ndim > 1 else 1.0
        )  # test_model.py's are large: rounding would grow
    model.save_pretrained(folder)
    return folder


def prepared(base, options, dtype=torch.float32):
    model = load_model(base, dtype=dtype)
    prepare_trainable(model, options, torch.Generator().manual_seed(1), dtype)
    generator = torch.Generator().manual_seed(2)
    for name, parameter in model.named_parameters():
        if name.endswith("lora_b"):
            parameter.data.normal_(0, 0.1, generator=generator)
        elif name.endswith("magnitude"):
            parameter.data.mul_(1.2)
    return model.train()


def examples(lengths=((4, 7), (1, 1), (9, 14), (3, 1), (0, 12), (5, 0))):
    """(prompt, answer) lengths; only the answer is trained."""
    random, rows = np.random.default_rng(0), []
    for number, (prompt, answer) in enumerate(lengths):
        n = prompt + answer
        zeros = np.zeros(n)
        tokens = random.integers(0, 131, n).astype(np.int32)
        trained = np.arange(n) >= prompt
        rows.append(Example(tokens, trained, zeros.astype(np.int16), zeros.astype(np.uint8), (0, number)))
    return rows


def run(model, batches):
    """(summed loss, {name: gradient}) over these batches."""
    model.zero_grad()
    total = 0.0
    for batch in batches:
        loss, _ = TokenLoss().loss(model, batch)
        assert loss.dtype in (torch.float32, torch.float64) and loss.shape == ()
        loss.backward()
        total += loss.item()
    return total, {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


def assert_equal_gradients(ours, expected, tolerance=1e-6):
    """The tolerance holds for the whole gradient; a single tensor may have more cancellation."""
    assert ours.keys() == expected.keys()
    errors = torch.stack([(ours[name] - grad).norm() for name, grad in expected.items()])
    norms = torch.stack([grad.norm() for grad in expected.values()])
    assert errors.norm() <= tolerance * norms.norm()
    # the floor is for k's bias, which has no gradient but rounding: softmax does not see it
    assert (errors <= 5 * tolerance * norms.clamp_min(1e-3 * norms.max())).all()


@pytest.mark.parametrize("kind", KINDS)
def test_packed_loss_and_every_gradient_equal_the_sum_of_separate_rows(base, kind):
    model = prepared(base, KINDS[kind])
    rows = examples()
    packed, packed_gradients = run(model, [collate(rows)])
    alone, gradients = run(model, [collate([row]) for row in rows])
    halves, half_gradients = run(model, [collate(rows[:2]), collate(rows[2:])])
    assert packed == pytest.approx(alone, rel=1e-6)
    assert halves == pytest.approx(alone, rel=1e-6)
    assert_equal_gradients(packed_gradients, gradients)
    assert_equal_gradients(half_gradients, gradients)


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_is_the_cross_entropy_of_the_logits_at_the_labels(base, kind):
    model, batch = prepared(base, KINDS[kind]), collate(examples())

    def plain():
        hidden = model(batch.tokens, batch.positions, batch.cu_seqlens, batch.max_seqlen)
        return F.cross_entropy(model.logits(hidden), batch.labels, ignore_index=-100, reduction="sum")

    expected = plain()
    expected.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    loss, found = run(model, [batch])
    assert loss == pytest.approx(expected.item(), rel=1e-6)
    assert_equal_gradients(found, gradients)
    # the first token of a row is never predicted: the row without a prompt has one label less
    assert TokenLoss().weight(batch) == 7 + 1 + 14 + 1 + 11


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_without_labels_has_loss_zero_and_gradients_of_zero(base, kind):
    """The ranks that have no row left in a round still take part in it."""
    model = prepared(base, KINDS[kind])
    for batch in (collate([]), collate(examples([(6, 0), (2, 0)]))):
        assert TokenLoss().weight(batch) == 0
        loss, gradients = run(model, [batch])
        assert loss == 0
        assert all(grad.eq(0).all() for grad in gradients.values())


@pytest.mark.parametrize("kind", ["lora with head", "dora with head"])
def test_an_adapted_head_runs_some_rows_at_a_time(base, kind, monkeypatch):
    model, batch = prepared(base, KINDS[kind]), collate(examples())
    whole, gradients = run(model, [batch])
    sizes = []
    forward = type(model).logits
    monkeypatch.setattr(
        type(model), "logits", lambda self, rows: sizes.append(len(rows)) or forward(self, rows)
    )
    monkeypatch.setattr(logprobs, "CHUNK_BYTES", 4 * 131 * 5)
    chunked, chunked_gradients = run(model, [batch])
    assert max(sizes) == 5 and sum(sizes) == 2 * 34  # each row once forward, once more in the backward pass
    assert chunked == pytest.approx(whole, rel=1e-6)
    assert_equal_gradients(chunked_gradients, gradients)


def test_an_adapted_head_drops_out_the_same_in_both_passes(base, monkeypatch):
    """Finite differences of the loss with one seed; a second mask in the backward pass would not fit them."""
    monkeypatch.setattr(logprobs, "CHUNK_BYTES", 8 * 131 * 7)
    options = LoraOptions(lora_rank=3, lora_target=("lm_head",), lora_dropout=0.5)
    model, batch = prepared(base, options, torch.float64), collate(examples())

    def loss():
        torch.manual_seed(7)
        return TokenLoss().loss(model, batch)[0]

    first = loss()
    assert first.item() == loss().item()
    loss().backward()
    parameter, step = model.lm_head.lora_b, 1e-3  # the loss is summed in fp32
    direction = parameter.grad / parameter.grad.norm()
    with torch.no_grad():
        parameter.add_(step * direction)
        above = loss().item()
        parameter.sub_(2 * step * direction)
        below = loss().item()
    assert (above - below) / (2 * step) == pytest.approx(parameter.grad.norm().item(), rel=1e-2)
    model.eval()
    assert abs(loss().item() - first.item()) > 1e-2


def test_a_small_update_of_a_bf16_head_is_seen(base, monkeypatch):
    """Added to the weight and rounded, most of it would vanish: bf16 keeps 8 bits. In a sum over E it does
    not."""
    model = load_model(base, dtype=torch.bfloat16)
    prepare_trainable(
        model, LoraOptions(lora_rank=1, lora_target=("lm_head",)), torch.Generator().manual_seed(1)
    )
    seen, logits, generator = [], type(model).logits, torch.Generator().manual_seed(1)
    monkeypatch.setattr(type(model), "logits", lambda self, rows: seen.append(logits(self, rows)) or seen[-1])
    rows, labels = (
        torch.randn(40, 60, generator=generator).abs().bfloat16(),
        torch.zeros(40, dtype=torch.int64),
    )
    head_loss(model, rows, labels)
    head = model.lm_head
    head.lora_a.data.fill_(1.0)
    head.lora_b.data = 5e-5 * torch.randn(head.lora_b.shape, generator=generator)
    head_loss(model, rows, labels)
    update, old = (head.scale * head.lora_b @ head.lora_a).double(), head.base.weight.double()
    expected = rows.double() @ update.T

    def share(change):  # of the expected change that is found, by regression over 40 x 131 logits
        return ((change * expected).sum() / expected.square().sum()).item()

    assert share(seen[1].double() - seen[0].double()) == pytest.approx(1, abs=0.1)
    assert share(rows.double() @ ((old + update).bfloat16().double() - old).T) < 0.7


@pytest.mark.parametrize("dora", [False, True])
def test_the_weight_of_an_adapted_head_is_what_the_layer_computes(base, dora):
    model = prepared(base, LoraOptions(lora_rank=3, lora_target=("lm_head",), use_dora=dora), torch.float64)
    head, x = (
        model.lm_head,
        torch.randn(9, 60, dtype=torch.float64, generator=torch.Generator().manual_seed(3)),
    )
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    weight = torch.randn(9, 131, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    expected = torch.autograd.grad((head(x) * weight).sum(), trained)
    found = torch.autograd.grad((x @ model.head_weight().T * weight).sum(), trained)
    torch.testing.assert_close(x @ model.head_weight().T, head(x), rtol=1e-6, atol=1e-6)
    for one, other in zip(found, expected):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    with lora_off(model):
        assert torch.equal(model.head_weight(), head.base.weight)
    assert torch.equal(model.head_weight(), head.merged_weight())


def test_with_dropout_an_adapted_head_is_no_matrix(base):
    model = prepared(base, LoraOptions(lora_target=("lm_head",), lora_dropout=0.1))
    with pytest.raises(ValueError, match="lora_dropout: with dropout an adapted layer is no single matrix"):
        model.head_weight()
    assert model.eval().head_weight().shape == (131, 60)
