"""Bytes of tensors that live while something runs, counted by a dispatch mode."""

import weakref

import torch
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """peak: the most bytes at a time of all storages that an operation has read or made since it was entered,
    but for those of `base`. The engine empties storages and fills them again, so sizes are asked for anew."""

    def __init__(self, base: list[torch.Tensor]):
        super().__init__()
        self.peak, self.known = 0, {}
        self.base = {storage_of(each)._cdata for each in base}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for each in tree_leaves((args, kwargs, result)):
            if torch.is_tensor(each) and each.device.type == "cpu":
                storage = storage_of(each)
                if storage._cdata not in self.base:
                    self.known.setdefault(storage._cdata, weakref.ref(storage))
        live = {key: storage for key, found in self.known.items() if (storage := found()) is not None}
        self.peak = max(self.peak, sum(storage.nbytes() for storage in live.values()))
        self.known = {key: self.known[key] for key in live}
        return result


def storage_of(tensor: torch.Tensor) -> torch.UntypedStorage:
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).untyped_storage()
