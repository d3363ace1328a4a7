"""The model with the Triton kernels equals the model with the references, and a choice that fails says so."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from kernel_checks import DEVICE, relative_error

triton = pytest.importorskip("triton")
ROOT = Path(__file__).resolve().parent.parent
SIZES = {
    "vocab_size": 61,
    "hidden_size": 24,
    "intermediate_size": 36,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
CONFIGS = {
    "llama": {"model_type": "llama", **SIZES},
    "llama with biases, gelu": {
        "model_type": "llama", **SIZES, "attention_bias": True, "mlp_bias": True,
        "hidden_act": "gelu_pytorch_tanh",
    },
    "qwen3, norms of q and k, a window in the second layer": {
        "model_type": "qwen3", **SIZES, "head_dim": 10, "tie_word_embeddings": True,
        "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1,
    },
}  # fmt: skip
SCRIPT = """
import json, sys, torch
sys.path.insert(0, "tests")
import old_interpreter
old_interpreter.numbers()
import kernels
from architectures import config_from_hf
from model import Decoder, initialize_weights
from kernels.recompute import Plan

configs, target, device = json.loads(sys.argv[1]), sys.argv[2], sys.argv[3]
lengths = [5, 1, 9]
tokens = torch.randint(61, (15,), generator=torch.Generator().manual_seed(3))
row = [tokens, torch.cat([torch.arange(n) for n in lengths]), torch.tensor([0, 5, 6, 15], dtype=torch.int32)]
row = [x.to(device) for x in row]
results, recorded = {}, set()
for name, config in configs.items():
    model = Decoder(config_from_hf(config))
    initialize_weights(model, torch.Generator().manual_seed(1))
    model.to(device)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)).to(device)
            parameter.mul_(1.0 + 0.2 * noise)
    for policy, plan in {"none": Plan(), "mixed": Plan(full=1, selective=1)}.items():
        model.runtime.recompute = plan
        model.zero_grad()
        hidden = model(*row, 9)
        logits = model.logits(hidden)
        loss = kernels.linear_cross_entropy(hidden, model.head_weight(), tokens.to(device).roll(-1))
        waiting = [loss.grad_fn]
        while waiting:
            node = waiting.pop()
            if node is not None and node not in recorded:
                recorded.add(node)
                waiting += [before for before, _ in node.next_functions]
        loss.backward()
        gradients = {key: parameter.grad for key, parameter in model.named_parameters()}
        results[name, policy] = {"logits": logits.detach(), "loss": loss.detach(), **gradients}
torch.save({"results": results, "functions": sorted({type(node).__name__ for node in recorded})}, target)
"""


def run(mode: str, *arguments: str, script: str = SCRIPT, interpret: bool = DEVICE == "cpu"):
    environment = {**os.environ, "KERNELS": mode, "TRITON_INTERPRET": "01"[interpret], "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", script, *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """What the script found with the references and with the kernels."""
    found = {}
    for mode in ("reference", "triton"):
        target = tmp_path_factory.mktemp(mode) / "results.pt"
        done = run(mode, json.dumps(CONFIGS), str(target), DEVICE)
        assert done.returncode == 0, done.stderr[-3000:]
        assert "takes the torch reference" not in done.stderr, done.stderr
        found[mode] = torch.load(target)
    return found


@pytest.mark.parametrize("config", CONFIGS)
def test_logits_loss_and_every_gradient_equal_those_of_the_references(both, config):
    expected, found = (both[mode]["results"][config, "none"] for mode in ("reference", "triton"))
    for name, value in expected.items():
        assert relative_error(found[name], value.double()) < 2e-5, name


@pytest.mark.parametrize("config", CONFIGS)
def test_what_is_computed_again_is_the_same_to_the_bit(both, config):
    """The first layer runs again, the second makes its norms and activations again."""
    results = both["triton"]["results"]
    for name, value in results[config, "none"].items():
        assert torch.equal(results[config, "mixed"][name], value), name


def test_it_was_the_kernels_that_ran(both):
    functions = {"_RMSNormBackward", "_RopeTritonBackward", "_GatedMLPBackward", "_FlashAttentionBackward"}
    assert functions <= set(both["triton"]["functions"])
    assert not functions & set(both["reference"]["functions"])


FIRST_USE = "import torch, kernels; kernels.rms_norm(torch.ones(2, 4), torch.ones(4), 1e-5)"


@pytest.mark.parametrize("script", ["import kernels; kernels.choices('cpu')", FIRST_USE])
def test_kernels_on_a_cpu_without_the_interpreter_fail_with_the_reason(script):
    done = run("triton", script=script, interpret=False)
    assert done.returncode != 0
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith(
        "options.errors.UserError: KERNELS=triton: Triton has no cpu backend; TRITON_INTERPRET=1 runs"
    ), last
    assert run("auto", script=script, interpret=False).returncode == 0


def test_a_shape_without_a_kernel_takes_the_reference_and_says_so_once():
    script = """
import torch, kernels
from kernels.rms_norm import rms_norm_reference
x, weight = torch.randn(2, 70000), torch.randn(70000)
for _ in range(3):
    assert torch.equal(kernels.rms_norm(x, weight, 1e-5), rms_norm_reference(x, weight, 1e-5))
kernels.rms_norm(x[:, :5], weight[:5], 1e-5)
"""
    done = run("triton", script=script, interpret=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr == "kernels: rms_norm takes the torch reference: rows of 70000 values; at most 65536\n"


def test_choices_says_what_serves_the_pointwise_operations():
    script = "import kernels; print(kernels.choices('cpu'))"
    assert "norms, rope and gated mlp torch" in run("auto", script=script).stdout
    assert "norms, rope and gated mlp Triton" in run("triton", script=script, interpret=True).stdout
