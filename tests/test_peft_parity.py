"""Adapters in peft's format both ways; loss, every gradient and ten training steps equal transformers +
peft."""

import json
import shutil
import warnings
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from test_model import oracle, row_of

from architectures.config import to_hf_name
from checkpoints.huggingface import load_model
from checkpoints.peft import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    adapter_parameters,
    load_adapter,
    merge_adapters,
    prepare_adapters,
    save_adapter,
)
from checkpoints.trainable import prepare_trainable
from lora import LoraOptions, lora_layers
from pipeline.batch import Example, collate
from stages.sft import TokenLoss
from training.optimizers import clip_gradients, make_optimizer, set_learning_rate
from training.options import OptimOptions
from training.schedules import schedule

SMOLLM2 = Path(__file__).resolve().parent.parent / "models" / "SmolLM2-135M-Instruct"
EVERY_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
FAMILIES = ("llama-biases", "mistral-window", "qwen2", "qwen3")  # untied, untied, tied, untied


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """case -> folder of a tiny model as transformers saves it."""
    folders = {}

    def folder(case, scale=1.0):
        """scale: of every matrix. test_model.py's are so large that rounding grows tenfold on the way
        back."""
        if (case, scale) not in folders:
            folders[case, scale] = tmp_path_factory.mktemp(case)
            model = oracle(case)
            for parameter in model.parameters():
                parameter.data.mul_(scale if parameter.ndim > 1 else 1.0)
            model.save_pretrained(folders[case, scale])
        return folders[case, scale]

    return folder


def their_model(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def their_adapter(folder, **settings):
    """transformers' model with a peft adapter of random weights (a fresh one would change nothing)."""
    torch.manual_seed(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of tied weights, which the tests look at themselves
        config = peft.LoraConfig(**{"r": 4, "lora_alpha": 6, "task_type": "CAUSAL_LM", **settings})
        model = peft.get_peft_model(their_model(folder), config)
    shake(model)
    return model.eval()


@torch.no_grad()
def shake(model):
    """Every trained tensor moves, by the order of its own size."""
    generator = torch.Generator().manual_seed(2)
    for parameter in model.parameters():
        if parameter.requires_grad:
            spread = 0.2 * parameter.abs().mean() + 0.05
            parameter.add_(torch.randn(parameter.shape, generator=generator) * spread)


@torch.no_grad()
def logits_of(model, length=23):
    """(T, V) of one random text, from our model or from one of transformers."""
    tokens, *row = row_of([length])
    return (
        model.logits(model(tokens, *row)) if hasattr(model, "embed_tokens") else model(tokens[None]).logits[0]
    )


def assert_close(ours, theirs, tolerance=1e-5):
    torch.testing.assert_close(ours, theirs, atol=tolerance * theirs.abs().max().item(), rtol=tolerance)


THEIRS = {
    "lora": {"target_modules": EVERY_LINEAR},
    "rslora": {"target_modules": EVERY_LINEAR, "use_rslora": True},
    "dora": {"target_modules": EVERY_LINEAR, "use_dora": True},
    "dora rslora": {"target_modules": ["v_proj", "down_proj"], "use_dora": True, "use_rslora": True},
    "all-linear": {"target_modules": "all-linear", "init_lora_weights": "gaussian"},
    "regex": {"target_modules": r".*layers\.[02]\.(self_attn\.[qv]|mlp\.up)_proj"},
    "full names": {"target_modules": ["model.layers.1.self_attn.q_proj", "layers.0.mlp.down_proj"]},
    "some layers": {
        "target_modules": ["q_proj", "gate_proj"],
        "layers_to_transform": [1],
        "layers_pattern": "layers",
    },
    "all but": {"target_modules": EVERY_LINEAR, "exclude_modules": ["k_proj"]},
    "patterns": {
        "target_modules": EVERY_LINEAR,
        "rank_pattern": {"q_proj": 7, r"layers\.1\.mlp\..*": 2, "^model.layers.2.mlp.down_proj": 3},
        "alpha_pattern": {
            "layers.0.self_attn.q_proj": 11,
            r".*\.o_proj": 1,
            "up_proj": 24,
            "layers.1.mlp.up_proj": 3,
        },
        "use_rslora": True,
    },
    "modules to save": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head", "norm"]},
    "only modules of a layer": {"target_modules": ["v_proj"], "modules_to_save": ["layers.1.mlp.up_proj"]},
    "head": {"target_modules": ["v_proj", "lm_head"]},
    "dora head": {"target_modules": ["lm_head"], "use_dora": True},
    "regex of a head": {"target_modules": r".*(lm_head|k_proj)", "alpha_pattern": {"lm_head": 2.5}},
}


@pytest.mark.parametrize("kind", THEIRS)
@pytest.mark.parametrize("case", ["llama-biases", "qwen3"])
def test_their_adapter_computes_as_in_peft(bases, tmp_path, case, kind):
    their_adapter(bases(case), **THEIRS[kind]).save_pretrained(tmp_path)
    # read back: saving sorts the patterns, which changes what they mean where two fit
    theirs = peft.PeftModel.from_pretrained(their_model(bases(case)), tmp_path, is_trainable=True).eval()
    expected, plain = logits_of(theirs), logits_of(load_model(bases(case)))
    assert (expected - plain).abs().max() > 0.01  # else the test would see nothing
    beside, merged = load_model(bases(case)), load_model(bases(case))
    load_adapter(beside, tmp_path)
    assert_close(logits_of(beside), expected)
    trained_parameters(beside, theirs)  # the same ones train on
    merge_adapters(merged, [tmp_path])
    assert not lora_layers(merged) and not any(parameter.requires_grad for parameter in merged.parameters())
    assert_close(logits_of(merged), expected)
    their_weights = theirs.merge_and_unload().state_dict()
    for name, tensor in merged.named_parameters():
        assert_close(tensor.detach(), their_weights[to_hf_name(merged.config, name)], 1e-6)


OURS = {
    "lora": {},
    "rslora": {"use_rslora": True, "lora_alpha": 5.0},
    "dora": {"use_dora": True},
    "alpha of no whole number": {"lora_alpha": 2.5},
    "some": {"lora_target": ("q_proj", "down_proj")},
    "full names": {"lora_target": ("layers.0.self_attn.q_proj", "layers.2.mlp.up_proj")},
    "modules": {"additional_target": ("embed_tokens", "lm_head", "norm", "layers.1.input_layernorm")},
    "linear in full": {"lora_target": ("up_proj",), "additional_target": ("layers.1.mlp.up_proj",)},
    "head": {"lora_target": ("all", "lm_head")},
    "dora head": {"lora_target": ("lm_head",), "use_dora": True},
}


@pytest.mark.parametrize("kind", OURS)
@pytest.mark.parametrize("case", ["llama-biases", "qwen3"])
def test_our_adapter_computes_in_peft_as_here(bases, tmp_path, case, kind):
    ours = load_model(bases(case))
    prepare_trainable(ours, LoraOptions(lora_rank=3, **OURS[kind]), torch.Generator().manual_seed(3))
    shake(ours)
    save_adapter(ours, tmp_path, str(bases(case)))
    _assert_peft_agrees(ours, tmp_path, bases(case))
    again = load_model(bases(case))
    load_adapter(again, tmp_path)
    assert torch.equal(logits_of(again), logits_of(ours))
    written = json.loads((tmp_path / ADAPTER_CONFIG).read_text())
    assert isinstance(written["lora_alpha"], float if kind == "alpha of no whole number" else int)


def _assert_peft_agrees(ours, folder, base):
    """peft finds every tensor that it looks for in our file, no other one, and computes the same."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # such as "missing adapter keys"
        theirs = peft.PeftModel(their_model(base), peft.PeftConfig.from_pretrained(folder))
        report = theirs.load_adapter(folder, "default")
    assert not report.missing_keys and not report.unexpected_keys
    assert_close(logits_of(ours), logits_of(theirs.eval()))


def test_ranks_and_alphas_that_differ_are_written_as_patterns(bases, tmp_path):
    theirs = their_adapter(bases("llama-biases"), **THEIRS["patterns"])
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_model(bases("llama-biases"))
    load_adapter(ours, tmp_path / "theirs")
    ranks = {name: layer.rank for name, layer in lora_layers(ours).items()}
    assert ranks["layers.0.self_attn.q_proj"] == 7
    assert ranks["layers.1.mlp.gate_proj"] == 2
    assert ranks["layers.2.mlp.down_proj"] == 3
    save_adapter(ours, tmp_path / "ours", str(bases("llama-biases")))
    _assert_peft_agrees(ours, tmp_path / "ours", bases("llama-biases"))


def test_a_tied_embedding_trains_with_its_head_in_both(bases, tmp_path):
    ours = load_model(bases("qwen2"))
    prepare_trainable(
        ours, LoraOptions(additional_target=("embed_tokens",)), torch.Generator().manual_seed(3)
    )
    shake(ours)
    save_adapter(ours, tmp_path / "ours", str(bases("qwen2")))
    _assert_peft_agrees(ours, tmp_path / "ours", bases("qwen2"))
    theirs = their_adapter(
        bases("qwen2"), target_modules=["q_proj"], modules_to_save=["embed_tokens"], ensure_weight_tying=True
    )
    theirs.save_pretrained(tmp_path / "theirs")
    again = load_model(bases("qwen2"))
    load_adapter(again, tmp_path / "theirs")
    assert_close(logits_of(again), logits_of(theirs))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"modules_to_save": ["embed_tokens"]}, "trains embed_tokens alone"),
        ({"modules_to_save": ["lm_head"]}, "trains lm_head alone"),
        ({"modules_to_save": ["lm_head", "embed_tokens"]}, "trains embed_tokens and lm_head apart"),
        ({"target_modules": ["q_proj", "lm_head"]}, "adapts lm_head alone"),
    ],
)
def test_an_adapter_that_parts_a_tied_head_from_the_embedding_is_refused(bases, tmp_path, settings, message):
    theirs = their_adapter(bases("qwen2"), **{"target_modules": ["q_proj"], **settings})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        theirs.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"{message}.*this model's head is tied.*export.py merges it"):
        load_adapter(load_model(bases("qwen2")), tmp_path)


def test_several_adapters_are_merged_in_order(bases, tmp_path):
    first = their_adapter(bases("qwen3"), target_modules=EVERY_LINEAR, use_dora=True)
    first.save_pretrained(tmp_path / "first")
    first.merge_and_unload().save_pretrained(tmp_path / "merged")
    second = their_adapter(
        tmp_path / "merged", target_modules=["q_proj", "up_proj"], modules_to_save=["lm_head"]
    )
    second.save_pretrained(tmp_path / "second")
    folders, expected = [tmp_path / "first", tmp_path / "second"], logits_of(second)
    model = load_model(bases("qwen3"))
    merge_adapters(model, folders)
    assert_close(logits_of(model), expected)
    model = load_model(bases("qwen3"))
    prepare_adapters(model, folders, LoraOptions(lora_dropout=0.1))
    assert_close(logits_of(model), expected)
    assert {name.rpartition(".")[2] for name in lora_layers(model)} == {
        "q_proj",
        "up_proj",
    }  # the last one trains on
    assert model.lm_head.weight.requires_grad and not model.embed_tokens.weight.requires_grad
    assert {layer.dropout_probability for layer in lora_layers(model).values()} == {0.1}
    model = load_model(bases("qwen3"))
    prepare_adapters(model, folders, LoraOptions(create_new_adapter=True), torch.Generator().manual_seed(1))
    assert_close(logits_of(model), expected)
    assert len(lora_layers(model)) == 21 and not model.lm_head.weight.requires_grad
    with pytest.raises(ValueError, match="the model has an adapter already"):
        load_adapter(model, folders[0])


def test_an_embedding_that_is_only_stored_beside_an_adapter_replaces_ours_and_stays_frozen(bases, tmp_path):
    """peft adds it when the vocabulary was resized, or when it is told to."""
    theirs = their_adapter(bases("llama-biases"), target_modules=["q_proj"])
    with torch.no_grad():
        theirs.base_model.model.model.embed_tokens.weight[5] += 1.0
    theirs.save_pretrained(tmp_path, save_embedding_layers=True)
    assert "base_model.model.model.embed_tokens.weight" in load_file(tmp_path / ADAPTER_WEIGHTS)
    model = load_model(bases("llama-biases"))
    load_adapter(model, tmp_path)
    assert not model.embed_tokens.weight.requires_grad and not model.lm_head.weight.requires_grad
    assert_close(logits_of(model), logits_of(theirs))
    assert torch.equal(model.embed_tokens.weight, theirs.base_model.model.model.embed_tokens.weight)


def test_modules_trained_in_full_keep_their_precision_over_a_bf16_base(bases, tmp_path):
    theirs = their_adapter(bases("llama-biases"), target_modules=["q_proj"], modules_to_save=["lm_head"])
    theirs.save_pretrained(tmp_path)
    model = load_model(bases("llama-biases"), dtype=torch.bfloat16)
    load_adapter(model, tmp_path)
    trained = load_file(tmp_path / ADAPTER_WEIGHTS)["base_model.model.lm_head.weight"]
    assert torch.equal(model.lm_head.weight, trained)
    model = load_model(bases("llama-biases"), dtype=torch.bfloat16)
    merge_adapters(model, [tmp_path])
    assert torch.equal(model.lm_head.weight, trained.bfloat16())
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


# Refused adapters


@pytest.fixture
def adapter(bases, tmp_path):
    """A folder with a peft adapter for llama-biases that a test may damage."""
    theirs = their_adapter(
        bases("llama-biases"), target_modules=["q_proj", "up_proj"], modules_to_save=["norm"]
    )
    theirs.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def _configure(**changes):
    def damage(folder):
        config = json.loads((folder / ADAPTER_CONFIG).read_text())
        (folder / ADAPTER_CONFIG).write_text(json.dumps(config | changes))

    return damage


def _edit(change):
    def damage(folder):
        tensors = load_file(folder / ADAPTER_WEIGHTS)
        change(tensors)
        save_file({name: tensor.clone() for name, tensor in tensors.items()}, folder / ADAPTER_WEIGHTS)

    return damage


def _pickled(folder):
    (folder / ADAPTER_WEIGHTS).rename(folder / "adapter_model.bin")


Q_A = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_pickled, "only adapter_model.bin found, a pickle.*any code.*save it again"),
        (lambda folder: (folder / ADAPTER_WEIGHTS).unlink(), "adapter_model.safetensors: file not found"),
        (lambda folder: (folder / ADAPTER_CONFIG).unlink(), "adapter_config.json: file not found"),
        (lambda folder: (folder / ADAPTER_WEIGHTS).write_bytes(b"{}"), "not a complete safetensors file"),
        (shutil.rmtree, "adapter_name_or_path: no folder"),
        (_configure(peft_type="IA3"), "peft_type 'IA3'; only LORA"),
        (_configure(bias="lora_only"), "bias='lora_only' is not supported"),
        (_configure(lora_bias=True), "lora_bias=True is not supported"),
        (_configure(use_qalora=True), "use_qalora=True"),
        (_configure(layer_replication=[[0, 2]]), "layer_replication"),
        (_configure(trainable_token_indices=[1, 2]), "trainable_token_indices"),
        (_configure(target_parameters=["w"]), "target_parameters"),
        (_configure(alora_invocation_tokens=[5]), "alora_invocation_tokens"),
        (_configure(init_lora_weights="pissa_niter_4"), "init_lora_weights='pissa_niter_4'.*changed base"),
        (_configure(init_lora_weights="olora"), "init_lora_weights='olora'"),
        (_configure(use_dora=True), "up_proj lacks magnitude, so the file is incomplete"),
        (
            _configure(r=5),
            r"up_proj.lora_A has shape \(.*4.*\), this model and adapter_config.json ask for \(.*5.*\)",
        ),
        (_configure(lora_alpha="high"), "adapter_config.json: lora_alpha is 'high', expected a number"),
        (_configure(modules_to_save=5), "modules_to_save is 5, expected a list of names"),
        (_configure(alpha_pattern=[4]), r"alpha_pattern is \[4\], expected an object"),
        (_configure(rank_pattern={"q_(proj": 4}), r"rank_pattern: 'q_\(proj' is no pattern"),
        (
            _configure(modules_to_save=["norm", "lm_head"]),
            "no tensor of lm_head, but .* lists it in modules_to_save",
        ),
        (_edit(lambda t: t.pop(Q_A)), "layers.1.self_attn.q_proj lacks lora_A"),
        (_edit(lambda t: t.update({Q_A: torch.zeros(0)})), r"q_proj.lora_A has shape \(0,\)"),
        (_edit(lambda t: t.clear()), "holds no tensor"),
        (
            _edit(lambda t: t.update({"transformer.h.0.lora_A.weight": t[Q_A]})),
            "does not start with base_model.model.",
        ),
        (
            _edit(lambda t: t.update({Q_A.replace("lora_A.weight", "lora_embedding_A"): t[Q_A]})),
            "not supported",
        ),
        (
            _edit(
                lambda t: t.update({Q_A.replace("lora_A.weight", "lora_magnitude_vector"): torch.ones(60)})
            ),
            "q_proj.magnitude does not belong to an adapter of this kind",
        ),
        (
            _edit(lambda t: t.update({Q_A.replace("layers.1", "layers.7"): t[Q_A]})),
            "layers.7.self_attn.q_proj lacks lora_B",
        ),
        (
            _edit(lambda t: t.update({k.replace("layers.1.self", "layers.7.self"): v for k, v in t.items()})),
            "adapts layers.7.*, which this model does not have; the adapter was trained on .*llama-biases",
        ),
        (
            _edit(lambda t: t.update({k.replace("layers.1.mlp.up_proj", "norm"): v for k, v in t.items()})),
            "adapts norm, a RMSNorm; only linears",
        ),
        (
            _edit(lambda t: t.update({"base_model.model.score.weight": torch.zeros(2, 60)})),
            "holds score.weight, which this model does not have; the adapter was trained on",
        ),
    ],
)
def test_a_foreign_or_damaged_adapter_is_refused_and_the_model_stays_whole(bases, adapter, damage, message):
    model = load_model(bases("llama-biases"))
    before = logits_of(model)
    damage(adapter)
    with pytest.raises(ValueError, match=message) as error:
        load_adapter(model, adapter)
    assert str(adapter) in str(error.value) or "no pattern" in message or "expected a number" in message
    assert torch.equal(logits_of(model), before)
    assert not lora_layers(model)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_an_adapter_of_a_wider_model_names_file_module_and_base(bases, tmp_path):
    their_adapter(bases("llama-biases"), target_modules=["q_proj"]).save_pretrained(tmp_path)
    other = load_model(bases("qwen3"))  # heads of another size
    shapes = r"model.safetensors: layers.0.self_attn.q_proj.lora_B has shape \(60, 4\).*\(84, 4\)"
    with pytest.raises(ValueError, match=shapes + "; the adapter was trained on .*llama-biases"):
        load_adapter(other, tmp_path)


# Loss and gradients


def examples(vocabulary, lengths=((5, 9), (3, 1), (11, 20), (1, 2)), seed=0):
    """Rows of (prompt, answer) tokens; the answer is trained."""
    random = np.random.default_rng(seed)
    rows = []
    for number, (prompt, answer) in enumerate(lengths):
        n = prompt + answer
        trained, zeros = np.arange(n) >= prompt, np.zeros(n)
        tokens = random.integers(0, vocabulary, n).astype(np.int32)
        rows.append(Example(tokens, trained, zeros.astype(np.int16), zeros.astype(np.uint8), (0, number)))
    return rows


def padded(rows):
    """The same as transformers' collators make it: padded on the right, prompts masked."""
    longest = max(len(row) for row in rows)
    batch = {
        key: torch.zeros(len(rows), longest, dtype=torch.int64) for key in ("input_ids", "attention_mask")
    }
    batch["labels"] = torch.full((len(rows), longest), -100)
    for i, row in enumerate(rows):
        tokens = torch.from_numpy(row.tokens).long()
        batch["input_ids"][i, : len(row)] = tokens
        batch["attention_mask"][i, : len(row)] = 1
        batch["labels"][i, : len(row)] = torch.where(torch.from_numpy(row.trained), tokens, -100)
    return batch


def trained_parameters(ours, theirs):
    """[(our parameter, theirs)] of everything that trains; every one has its partner."""
    partners = {
        name.replace(".default", "")
        .replace(".modules_to_save", "")
        .replace("vector.weight", "vector"): parameter
        for name, parameter in theirs.named_parameters()
        if parameter.requires_grad
    }
    mine = dict(adapter_parameters(ours)) if lora_layers(ours) else {
        to_hf_name(ours.config, name): parameter for name, parameter in ours.named_parameters()
    }  # fmt: skip
    assert mine.keys() == partners.keys()
    return [(parameter, partners[name]) for name, parameter in mine.items()]


KINDS = {
    "lora": LoraOptions(lora_rank=4),
    "dora": LoraOptions(lora_rank=4, use_dora=True),
    "rslora with modules": LoraOptions(lora_rank=4, use_rslora=True, additional_target=("norm",)),
    "full": LoraOptions(finetuning_type="full"),
}


def both(folder, base, options):
    """Our model and peft's with the same trained tensors, in train mode."""
    ours = load_model(base)
    prepare_trainable(ours, options, torch.Generator().manual_seed(3))
    if options.finetuning_type == "full":
        return ours.train(), their_model(base).train()
    shake(ours)
    save_adapter(ours, folder, str(base))
    return ours.train(), peft.PeftModel.from_pretrained(their_model(base), folder, is_trainable=True).train()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", FAMILIES)
def test_loss_and_every_gradient_of_a_ragged_batch_equal_theirs(bases, tmp_path, case, kind):
    assert_equal_gradients(*both(tmp_path, bases(case, 0.4), KINDS[kind]), 131)


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_loss_and_gradients_with_an_adapted_head_equal_theirs(bases, tmp_path, kind):
    options = LoraOptions(lora_rank=4, lora_target=("q_proj", "lm_head"), use_dora=kind == "dora")
    assert_equal_gradients(*both(tmp_path, bases("llama-biases", 0.4), options), 131)


def assert_equal_gradients(ours, theirs, vocabulary):
    rows = examples(vocabulary)
    stage, batch = TokenLoss(), collate(rows)
    loss, _ = stage.loss(ours, batch)
    loss = loss / stage.weight(batch)
    loss.backward()
    expected = theirs(**padded(rows)).loss
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    pairs = trained_parameters(ours, theirs)
    errors = torch.stack([(parameter.grad - partner.grad).norm() for parameter, partner in pairs])
    norms = torch.stack([partner.grad.norm() for _, partner in pairs])
    # a floor for what is zero but for rounding, such as the gradient of k's bias, which softmax does not see
    assert (errors < 1e-5 * norms.clamp_min(1e-3 * norms.max())).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_accurate_as_theirs(bases, dtype):
    """Both against fp32; the last digits differ, the size of the error must not."""
    exact = logits_of(load_model(bases("qwen3")), 40)
    ours = logits_of(load_model(bases("qwen3"), dtype=dtype), 40).float()
    theirs = logits_of(
        transformers.AutoModelForCausalLM.from_pretrained(bases("qwen3"), dtype=dtype), 40
    ).float()
    our_error, their_error = ((x - exact).square().mean().sqrt().item() for x in (ours, theirs))
    assert 0 < our_error < 1.5 * their_error
    assert our_error < (0.03 if dtype is torch.bfloat16 else 0.004) * exact.abs().mean().item()


# The real model


@pytest.mark.skipif(
    not SMOLLM2.exists(), reason="models/SmolLM2-135M-Instruct is not there; make test puts it there"
)
@pytest.mark.parametrize("kind", ["lora", "dora", "full"])
def test_ten_steps_on_smollm2_follow_transformers_and_peft(tmp_path, kind):
    """Same rows, same initial adapters, AdamW with decay, clipping, warm-up and linear decline."""
    peak = 2e-5 if kind == "full" else 2e-3
    steps, options = 10, OptimOptions(learning_rate=peak, weight_decay=0.1, warmup_ratio=0.2)
    adapters = LoraOptions(finetuning_type="full" if kind == "full" else "lora", use_dora=kind == "dora")
    rows = [examples(49152, ((5, 14), (9, 11)), seed) for seed in (0, 1)]
    model = load_model(SMOLLM2)
    prepare_trainable(model, adapters, torch.Generator().manual_seed(3))
    if kind != "full":
        save_adapter(model, tmp_path, "SmolLM2")
    ours = our_losses(model.train(), rows, options, steps)
    del model
    model = their_model(SMOLLM2)
    if kind != "full":
        model = peft.PeftModel.from_pretrained(model, tmp_path, is_trainable=True)
    theirs = their_losses(model.train(), rows, options, steps)
    assert ours == pytest.approx(theirs, abs=1e-4)
    assert theirs[-1] < theirs[1] - 0.3  # it learns


def our_losses(model, rows, options, steps):
    stage, losses, optimizer = TokenLoss(), [], make_optimizer(model, options)
    for step in range(steps):
        set_learning_rate(optimizer, schedule(step, options, steps))
        batch = collate(rows[step % len(rows)])
        loss = stage.loss(model, batch)[0] / stage.weight(batch)
        loss.backward()
        clip_gradients(model.parameters(), options.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def their_losses(model, rows, options, steps):
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": options.weight_decay},
        {"params": [p for p in trained if p.ndim == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW([group for group in groups if group["params"]], lr=options.learning_rate)
    scheduler = transformers.get_scheduler("linear", optimizer, int(0.2 * steps), steps)
    losses = []
    for step in range(steps):
        loss = model(**padded(rows[step % len(rows)])).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, options.max_grad_norm)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses
