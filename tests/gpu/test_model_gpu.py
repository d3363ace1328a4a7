"""The whole decoder on a GPU: with the kernels as exact in bf16 as with the references, loss and every
gradient."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent.parent
SCRIPT = """
import sys, torch
sys.path.insert(0, ".")
from architectures import config_from_hf
from model import Decoder, initialize_weights
from checkpoints import trainable
import kernels, lora

torch.backends.cuda.matmul.allow_tf32 = False
dtype, rank = getattr(torch, sys.argv[1]), int(sys.argv[2])
hf = dict(architectures=["LlamaForCausalLM"], model_type="llama", hidden_size=256, intermediate_size=384)
hf |= dict(vocab_size=1000, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2)
hf |= dict(initializer_range=0.1)
model = Decoder(config_from_hf(hf))
initialize_weights(model, torch.Generator().manual_seed(0))
options = lora.LoraOptions("lora" if rank else "full", lora_rank=max(rank, 1))
trainable.prepare_trainable(model, options, torch.Generator().manual_seed(0))
generator = torch.Generator().manual_seed(1)
for name, parameter in model.named_parameters():
    if name.endswith("lora_b"):
        parameter.data.normal_(0, 0.05, generator=generator)
model = model.to("cuda", dtype).train()
borders = [0, 5, 134, 300]
tokens = torch.randint(1000, (300,), generator=generator).cuda()
positions = torch.cat([torch.arange(b - a) for a, b in zip(borders, borders[1:])]).int().cuda()
hidden = model(tokens, positions, torch.tensor(borders, dtype=torch.int32).cuda(), 166)
loss = kernels.linear_cross_entropy(hidden, model.head_weight(), tokens.roll(-1))
loss.backward()
grads = {name: p.grad.double().cpu() for name, p in model.named_parameters() if p.grad is not None}
torch.save({"loss": loss.double().cpu(), **grads}, sys.argv[3])
"""


def evaluate(kernels, dtype, rank, path):
    command = [sys.executable, "-c", SCRIPT, dtype, str(rank), str(path)]
    environment = os.environ | {"KERNELS": kernels}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(path, weights_only=True)


@pytest.mark.parametrize("rank", [8, 0])
def test_kernels_are_as_exact_as_references_in_the_whole_model(rank, tmp_path):
    exact = evaluate("reference", "float64", rank, tmp_path / "exact")
    plain = evaluate("reference", "bfloat16", rank, tmp_path / "plain")
    found = evaluate("auto", "bfloat16", rank, tmp_path / "found")
    assert found.keys() == exact.keys() and len(found) > 20
    for name, truth in exact.items():
        size = truth.norm().clamp_min(1e-12)
        error, allowed = (found[name] - truth).norm() / size, (plain[name] - truth).norm() / size
        # single tensors of a whole model scatter more than one operation does, so half of the error again
        assert error <= 3 * allowed + 1e-3, f"{name}: {error:.2e}, the references' {allowed:.2e}"
