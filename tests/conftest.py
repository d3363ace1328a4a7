"""The repository root on the import path; tests off the network and to one thread each; a folder for data
files."""

import os
import sys
from pathlib import Path

import pytest
import torch

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent)]
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if not torch.cuda.is_available():
    os.environ.setdefault(
        "TRITON_INTERPRET", "1"
    )  # before any kernel is declared; only tests of kernels use it
import old_interpreter  # noqa: E402

old_interpreter.numbers()


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A folder of data files that is also where caches go."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path
