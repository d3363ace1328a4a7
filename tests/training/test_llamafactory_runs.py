"""LLaMA-Factory's example files run as they are, but for the model, the folders, and how much they train."""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file
from tiny_runs import ROOT, tiny_runs

import export
import train
from checkpoints.source import Source, load_source
from quant import QuantOptions
from templates import TemplateOptions

ROWS = json.loads((ROOT / "tests" / "fixtures" / "llamafactory_examples.json").read_text())
EXAMPLES = {row[0].partition("/")[2]: row[3] for row in ROWS if row[0].startswith(("ff6d4d12", "v0.7.0"))}
SMALL = {"max_steps": 2, "max_samples": 24, "cutoff_len": 96, "gradient_accumulation_steps": 2}
SMALL |= {"preprocessing_num_workers": 1, "dataset_dir": ROOT / "data"}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    with tiny_runs(tmp_path_factory.mktemp("llamafactory")) as made:
        yield made


def words_of(example: str, folder: Path, **changes) -> list[str]:
    """The example as a file, or as its words, with the changes behind it."""
    options = EXAMPLES[example]
    if isinstance(options, list):
        words = list(options)
    else:
        path = folder / f"{example.replace('/', '-')}.json"
        path.write_text(json.dumps(options))
        words = [str(path)]
    return [*words, *(f"{key}={value}" for key, value in changes.items())]


def run(tiny, example: str, name: str, **changes) -> Path:
    output = tiny.folder / name
    changes = SMALL | {"model_name_or_path": tiny.model, "output_dir": output} | changes
    assert train.main(words_of(example, tiny.folder, **changes)) == 0
    return output


@pytest.mark.parametrize(
    "example",
    ["train_lora/qwen3_lora_sft.yaml", "train_lora/qwen3_lora_dpo.yaml", "train_lora/qwen3_lora_kto.yaml",
     "train_lora/qwen3_lora_pretrain.yaml", "train_lora/qwen3_lora_reward.yaml",
     "train_qlora/qwen3_lora_sft_otfq.yaml"],
)  # fmt: skip
def test_a_training_example_trains_an_adapter(tiny, example):
    output = run(tiny, example, Path(example).stem)
    weights = load_file(output / "adapter_model.safetensors")
    assert any(tensor.any() for name, tensor in weights.items() if "lora_B" in name)
    assert len(json.loads((output / "trainer_state.json").read_text())["log_history"]) > 0


def test_an_example_that_asks_for_a_package_goes_on_without_it(tiny, capsys):
    output = run(tiny, "ascend/qwen3_full_sft_fsdp2.yaml", "without_fa2")
    assert (output / "model.safetensors").is_file()
    assert "attention fa2" not in capsys.readouterr().out


def test_an_sft_script_of_0_7_trains(tiny):
    """Bare flags, fp16, and steps of evaluation with the best model at the end."""
    held = {"val_size": 0.2, "fp16": False, "dataset": "identity", "eval_steps": 1, "save_steps": 1}
    output = run(tiny, "lora_single_gpu/sft.sh", "sft_0_7", **held)
    assert "eval_loss" in (output / "trainer_log.jsonl").read_text()


def test_preprocessing_writes_the_tokens_and_ends(tiny, capsys):
    saved = tiny.folder / "tokens"
    run(tiny, "train_lora/qwen3_preprocess.yaml", "preprocess", tokenized_path=saved)
    assert saved.is_dir() and "run the same command again to train on it" in capsys.readouterr().out


def test_predict_and_merge_take_the_trained_adapter(tiny):
    trained = run(tiny, "train_lora/qwen3_lora_sft.yaml", "to_merge")
    for number, example in enumerate(
        ("extras/nlg_eval/llama3_lora_predict.yaml", "lora_single_gpu/predict.sh")
    ):
        dataset = {} if number == 0 else {"dataset": "identity"}
        few = {"adapter_name_or_path": trained, "template": "chatml", "max_new_tokens": 3, "max_samples": 2}
        output = run(tiny, example, f"predicted_{number}", **few, **dataset)
        rows = (output / "generated_predictions.jsonl").read_text(encoding="utf-8").splitlines()
        assert len(rows) == (4 if number == 0 else 2)
    places = {"model_name_or_path": tiny.model, "adapter_name_or_path": trained}
    merged = tiny.folder / "merged"
    words = words_of("merge_lora/qwen3_lora_sft.yaml", tiny.folder, **places, export_dir=merged)
    assert export.main(words) == 0
    source = Source(merged, (), merged, TemplateOptions(template="chatml"), None, None, (), QuantOptions())
    load_source(source, None, "cpu")
