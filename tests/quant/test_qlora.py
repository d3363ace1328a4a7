"""QLoRA through the command line: dtypes, resume, policies, chat, refusals; adapters beside a base; fp16 that
holds."""

import json

import pytest
import torch
import transformers
from test_peft_parity import shake
from tiny_runs import assert_same_weights, tiny_runs

import chat
from architectures.layers import RMSNorm
from checkpoints.hub import ModelOptions
from checkpoints.huggingface import load_model, save_model
from checkpoints.peft import apply_adapters, load_adapter, merge_adapters, save_adapter
from checkpoints.source import find_source
from checkpoints.trainable import prepare_trainable
from lora import LoraOptions, lora_layers
from options import config as configuration
from parallel.world import World
from quant import QuantOptions, from_options
from quant.linear import QuantLinear, quantised_linears
from templates import TemplateOptions
from tests.training.test_resume import halves
from training import memory, setup

NF4 = {"quantization_bit": 4}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    with tiny_runs(tmp_path_factory.mktemp("qlora")) as made:
        yield made


def built(tiny, **keys):
    """The model as train.py prepares it."""
    config = configuration.load(
        tiny.words("built", **keys), setup.SECTIONS, program="train.py", description=""
    )
    return setup.build_model(config, tiny.model, World(0, 1, 0, torch.device("cpu")))


def test_norms_are_fp32_adapters_too_and_head_and_embedding_stay_dense(tiny):
    model = built(tiny, bf16=True, **NF4)
    assert len(quantised_linears(model)) == len(lora_layers(model)) == 2 * 7
    for name, parameter in model.named_parameters():
        trained = parameter.requires_grad
        norm = "norm" in name
        assert parameter.dtype is (torch.float32 if trained or norm else torch.bfloat16), name
        assert trained == name.endswith(("lora_a", "lora_b"))
    assert all(layer.dtype is torch.bfloat16 for layer in quantised_linears(model).values())
    # asked for, or refused
    for wanted, keys in ((True, {}), (False, NF4), (False, {})):
        model = built(tiny, bf16=True, upcast_layernorm=wanted or None if not keys else wanted, **keys)
        wide = {
            module.weight.dtype is torch.float32 for module in model.modules() if isinstance(module, RMSNorm)
        }
        assert wide == {wanted}


@pytest.mark.parametrize(
    "keys",
    [
        {"lora_dropout": 0.2, "neftune_noise_alpha": 5},
        {"use_dora": True, "bf16": True, "additional_target": "embed_tokens"},
        {"fp16": True, "quantization_type": "fp4", "double_quantization": False},
    ],
    ids=lambda keys: next(iter(keys)),
)
def test_every_kind_of_run_resumes_exactly(tiny, keys):
    halves(tiny, "resume-" + next(iter(keys)), stop=4, **NF4, **keys)


def test_every_policy_trains_the_same_bits(tiny):
    for policy in ("none", "selective", "full"):
        assert tiny.train(f"policy-{policy}", gradient_checkpointing=policy, num_train_epochs=1, **NF4) == 0
    for policy in ("selective", "full"):
        assert_same_weights(tiny.weights("policy-none"), tiny.weights(f"policy-{policy}"))


REFUSED = {
    "full tuning": ({"finetuning_type": "full"}, NF4, "set finetuning_type=lora"),
    "an adapter on another": (
        {"create_new_adapter": True, "adapter_name_or_path": "x"},
        NF4,
        "with export.py first",
    ),
    "several adapters": ({"adapter_name_or_path": "x,y"}, NF4, "give one, or merge them with export.py"),
    "random weights": ({"train_from_scratch": True}, NF4, "drop one of the two"),
    "a quantised module in full": (
        {"additional_target": "down_proj"},
        NF4,
        "lora_target gives it an adapter",
    ),
    "full tuning of codes": ({"finetuning_type": "full"}, {}, "its weights have no gradient"),
    "freezing all but codes": ({"finetuning_type": "freeze"}, {}, "its weights have no gradient"),
    "random codes": ({"train_from_scratch": True}, {}, "train_from_scratch: "),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_is_refused_with_the_reason(tiny, capsys, case):
    keys, quantised, reason = REFUSED[case]
    folder = tiny.folder / "nf4"
    if not quantised and not folder.exists():
        save_model(load_model(tiny.model, quantization=from_options(QuantOptions(**NF4))), folder, tiny.model)
    status = tiny.train(
        "refused", model_name_or_path=tiny.model if quantised else folder, **quantised, **keys
    )
    assert status == 2 and reason in capsys.readouterr().err
    assert not (tiny.folder / "refused" / "trainer_log.jsonl").exists()


def test_a_library_user_is_refused_too(tiny):
    model = load_model(tiny.model, quantization=from_options(QuantOptions(**NF4)))
    for kind in ("full", "freeze"):
        with pytest.raises(ValueError, match="codes have no gradient"):
            prepare_trainable(model, LoraOptions(finetuning_type=kind))


def test_chat_loads_the_base_of_a_run_as_it_was_trained(tiny, capsys):
    assert tiny.train("talk", num_train_epochs=1, **NF4) == 0
    words = [
        f"model_name_or_path={tiny.folder / 'talk'}",
        "prompt=the hammer",
        "max_new_tokens=3",
        "do_sample=false",
    ]
    capsys.readouterr()
    assert chat.main(words) == 0
    said = capsys.readouterr().err
    assert "the base is quantised to nf4, double quantisation" in said and "base: 14 linears in nf4" in said
    assert chat.main([*words, "quantization_bit=null"]) == 0
    assert "nf4" not in capsys.readouterr().err
    source = find_source(ModelOptions(str(tiny.folder / "talk")), TemplateOptions(), (), QuantOptions())
    assert source.quantization == QuantOptions(4)
    assert (
        find_source(ModelOptions(str(tiny.folder / "talk")), TemplateOptions(), ()).quantization
        == QuantOptions()
    )


def adapter(tiny, name: str, **options):
    model = load_model(tiny.model)
    prepare_trainable(model, LoraOptions(**options), torch.Generator().manual_seed(len(name)))
    shake(model)
    save_adapter(model, tiny.folder / name, str(tiny.model))
    return tiny.folder / name


@torch.no_grad()
def logits(model):
    tokens = torch.randint(720, (11,), generator=torch.Generator().manual_seed(5))
    return model.logits(model(tokens, torch.arange(11), torch.tensor([0, 11], dtype=torch.int32), 11))


def test_adapters_lie_beside_a_quantised_base_and_do_what_merging_does(tiny):
    several = [
        adapter(tiny, "first", lora_rank=3, lora_alpha=5.0),
        adapter(
            tiny, "second one", lora_rank=2, use_rslora=True, lora_target=("q_proj", "down_proj", "lm_head")
        ),
        adapter(tiny, "the third one", lora_rank=1, lora_target=("q_proj",), additional_target=("norm",)),
    ]
    for folders in (several[:1], several, [adapter(tiny, "dora", use_dora=True, lora_rank=3)]):
        beside, merged = (
            load_model(tiny.model, quantization=from_options(QuantOptions(**NF4))) for _ in range(2)
        )
        plain = logits(merged)
        apply_adapters(beside, folders)
        merge_adapters(merged, folders)  # into the dequantised weights
        assert len(quantised_linears(beside)) == 14 and not quantised_linears(merged)
        assert not isinstance(beside.lm_head, QuantLinear) and "lm_head" not in lora_layers(beside)
        assert not any(parameter.requires_grad for parameter in beside.parameters())
        assert (logits(beside) - plain).abs().max() > 0.01
        torch.testing.assert_close(logits(beside), logits(merged), atol=1e-4, rtol=1e-4)
    model = load_model(tiny.model, quantization=from_options(QuantOptions(**NF4)))
    with pytest.raises(ValueError, match="DoRA's row lengths"):
        apply_adapters(model, [tiny.folder / "dora"] * 2)


def test_only_some_quantised_linears_adapted_are_named_in_full(tiny):
    model = load_model(tiny.model, quantization=from_options(QuantOptions(**NF4)))
    prepare_trainable(model, LoraOptions(lora_target=("layers.1.self_attn.q_proj",)))
    save_adapter(model, tiny.folder / "some", "base")
    saved = json.loads((tiny.folder / "some" / "adapter_config.json").read_text())
    assert saved["target_modules"] == ["model.layers.1.self_attn.q_proj"]
    again = load_model(tiny.model, quantization=from_options(QuantOptions(**NF4)))
    load_adapter(again, tiny.folder / "some")
    assert list(lora_layers(again)) == ["layers.1.self_attn.q_proj"]


def test_memory_counts_the_weight_that_all_quantised_layers_share(tiny):
    dense, quantised, dora = (built(tiny, **keys) for keys in ({}, NF4, NF4 | {"use_dora": True}))
    shared = memory.need(quantised, 64).fixed - memory.need(dense, 64).fixed
    assert shared == 24 * 40 * 4
    assert memory.need(dora, 64).fixed - memory.need(quantised, 64).fixed > shared


# fp16


@pytest.fixture(scope="module")
def massive(tiny):
    """A model whose first block writes numbers beyond fp16's 65,504 into a few channels, as trained ones come
    near."""
    folder = tiny.make_model("massive", seed=1)
    model = load_model(folder)
    with torch.no_grad():
        mlp = model.layers[0].mlp
        mlp.gate_proj.weight[:3].mul_(300)
        mlp.up_proj.weight[:3].mul_(300)
        mlp.down_proj.weight[:2].mul_(20)
    save_model(model, folder, None)
    return folder


def test_fp16_holds_where_naive_fp16_overflows(tiny, massive):
    tokens = torch.arange(3, 40)
    row = tokens, torch.arange(37), torch.tensor([0, 37], dtype=torch.int32), 37
    with torch.no_grad():
        theirs = transformers.AutoModelForCausalLM.from_pretrained(massive, dtype=torch.float16)(tokens[None])
        assert not theirs.logits.isfinite().all()
        exact = load_model(massive)
        assert exact(*row).isfinite().all()
        ours = load_model(massive, dtype=torch.float16)
        found = ours.logits(ours(*row)).float()
        expected = exact.logits(exact(*row))
    assert (found - expected).norm() < 0.02 * expected.norm()


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_fp16_training_on_nf4_has_no_step_that_is_not_finite(tiny, massive, seed):
    keys = {"model_name_or_path": massive, "learning_rate": 1e-3, "max_steps": 12, "seed": seed, **NF4}
    assert tiny.train(f"wide{seed}", **keys) == 0
    assert tiny.train(f"fp16-{seed}", fp16=True, **keys) == 0
    wide, half = tiny.losses(f"wide{seed}"), tiny.losses(f"fp16-{seed}")
    assert len(half) == 12
    assert list(half.values()) == pytest.approx(list(wide.values()), rel=0.02)
    assert min(tiny.losses(f"fp16-{seed}", "loss_scale").values()) >= 256
