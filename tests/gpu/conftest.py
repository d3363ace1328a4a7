"""Tests that need a GPU live in this folder; anywhere else they are skipped. `make gpu` runs them."""

import pytest
import torch


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if item.path.parent.name == "gpu":
                item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU (make gpu)"))
