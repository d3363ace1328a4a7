"""The room's own name: load_model from Python, and files read without a model."""

import subprocess
import sys
from pathlib import Path

import pytest

import checkpoints
from checkpoints import huggingface

ROOT = Path(__file__).resolve().parents[2]


def test_load_model_comes_from_the_room():
    from checkpoints import load_model

    assert load_model is huggingface.load_model
    with pytest.raises(AttributeError, match="no save_everything"):
        checkpoints.save_everything  # noqa: B018


def test_reading_files_loads_no_model():
    code = "import sys, checkpoints.safetensors_files\nprint(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    loaded = {name.partition(".")[0] for name in run.stdout.split()}
    assert "checkpoints" in loaded
    assert not loaded & {"model", "architectures", "kernels", "triton", "lora", "quant", "generation"}
