"""LoRA and DoRA on a 4-bit base equal transformers + peft + bitsandbytes on a CPU: gradients, ten steps,
files."""

import peft
import pytest
import torch
import transformers
from test_model import oracle
from test_peft_parity import assert_equal_gradients, examples, our_losses, shake, their_losses

from checkpoints.huggingface import load_model
from checkpoints.peft import apply_adapters, load_adapter, save_adapter
from checkpoints.trainable import prepare_trainable
from lora import LoraOptions, lora_layers
from pipeline.batch import collate
from quant import QuantOptions, from_options
from training.options import OptimOptions

FORMATS = {
    "nf4": QuantOptions(quantization_bit=4, double_quantization=False),
    "nf4 twice": QuantOptions(quantization_bit=4),
    "fp4 twice": QuantOptions(quantization_bit=4, quantization_type="fp4"),
}
KINDS = {
    "lora": LoraOptions(lora_rank=4),
    "dora": LoraOptions(lora_rank=4, use_dora=True),
    "some, and modules": LoraOptions(
        lora_rank=4, use_rslora=True, lora_target=("layers.1.self_attn.q_proj", "down_proj"),
        additional_target=("embed_tokens", "norm"),
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """An untied model with biases; matrices small enough for rounding not to grow on the way back."""
    folder = tmp_path_factory.mktemp("base")
    model = oracle("llama-biases")
    for parameter in model.parameters():
        parameter.data.mul_(0.4 if parameter.ndim > 1 else 1.0)
    model.save_pretrained(folder)
    return folder


def their_model(folder, options: QuantOptions):
    settings = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=options.quantization_type,
        bnb_4bit_use_double_quant=options.double_quantization,
        bnb_4bit_compute_dtype=torch.float32,
    )
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, quantization_config=settings, device_map="cpu"
    )


def both(folder, base, format: str, options: LoraOptions):
    """Our model and peft's over bitsandbytes' layers, with the same trained tensors, in train mode."""
    ours = load_model(base, quantization=from_options(FORMATS[format]))
    prepare_trainable(ours, options, torch.Generator().manual_seed(3))
    shake(ours)
    save_adapter(ours, folder, str(base))
    theirs = peft.PeftModel.from_pretrained(their_model(base, FORMATS[format]), folder, is_trainable=True)
    return ours.train(), theirs.train()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("format", FORMATS)
def test_loss_and_every_gradient_equal_theirs(base, tmp_path, format, kind):
    """And so the adapter that was saved means the same in peft, on exactly the linears that have it here."""
    ours, theirs = both(tmp_path, base, format, KINDS[kind])
    assert sum(name.endswith("lora_A") for name, _ in theirs.named_modules()) == len(lora_layers(ours))
    assert_equal_gradients(ours, theirs, 131)


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_ten_steps_follow_theirs(base, tmp_path, kind):
    options = OptimOptions(learning_rate=1e-2, weight_decay=0.1, warmup_ratio=0.2)
    ours, theirs = both(tmp_path, base, "nf4 twice", KINDS[kind])
    rows = [examples(131, ((5, 14), (9, 11)), seed) for seed in (0, 1)]
    losses = our_losses(ours, rows, options, 10)
    assert losses == pytest.approx(their_losses(theirs, rows, options, 10), abs=1e-4)
    assert losses[-1] < losses[1] - 0.3  # it learns


def test_their_adapter_on_their_quantised_base_computes_as_here(base, tmp_path):
    settings = peft.LoraConfig(r=3, target_modules="all-linear", task_type="CAUSAL_LM")
    theirs = peft.get_peft_model(their_model(base, FORMATS["nf4 twice"]), settings)
    shake(theirs)
    theirs.train().save_pretrained(
        tmp_path
    )  # in eval mode bitsandbytes repacks, and asks for sizes that fit that
    beside, applied = (load_model(base, quantization=from_options(FORMATS["nf4 twice"])) for _ in range(2))
    load_adapter(beside, tmp_path)
    apply_adapters(applied, [tmp_path])
    batch = collate(examples(131, ((5, 14),)))
    row = batch.tokens, batch.positions, batch.cu_seqlens, batch.max_seqlen
    expected = theirs(batch.tokens[None]).logits[0].detach()
    with torch.no_grad():
        for ours in (beside, applied):
            found = ours.logits(ours(*row))
            torch.testing.assert_close(found, expected, atol=1e-5 * expected.abs().max().item(), rtol=1e-5)
