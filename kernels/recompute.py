"""Activation memory for time: what each block keeps for its backward pass. Knows torch only.

none       what autograd asks for stays
selective  what one pass over memory makes again (norms, the gated activation) goes; products and attention
stay
full       the block's input alone stays and the block runs again (Chen et al., arXiv 1604.06174)
offload    full, with that input in pinned host memory until the backward pass comes near

Nothing here changes a bit of the loss or the gradients: what is made again is made by the same operations
from the same values, with the random numbers of the first time.

    model.runtime.recompute = recompute.Plan(full=8, selective=24)      # of 32 blocks
"""

from collections.abc import Callable
from contextlib import nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

POLICIES = ("auto", "none", "full", "selective", "offload")


@dataclass
class Plan:
    """Blocks 0 .. full-1 run again, the next `selective` ones drop what is cheap, the others keep everything.

    The first blocks run again because their backward comes last, when the memory of the others is free.
    """

    full: int = 0
    selective: int = 0
    offload: "Offload | None" = None  # where the inputs of the `full` blocks wait

    def run(self, number: int, block: Callable, x: Tensor, delta: Tensor | None):
        """block(x, delta), block `number` < full + selective, where gradients are enabled."""
        if number >= self.full:
            with _Book():
                return block(x, delta)
        if delta is not None:
            x, delta = x + delta, None  # such a block keeps its input: one tensor, not two
        with nullcontext() if self.offload is None else self.offload.block(number):
            return checkpoint(block, x, delta, use_reentrant=False)


# selective: a saved tensor whose recipe is known is kept as the recipe
#
# torch's own selective checkpointing (create_selective_checkpoint_contexts) chooses by operator in a dispatch
# mode. It does not see Triton kernels, refuses products that are updated in place (LoRA's), and runs every
# operator of the block through Python twice. A recipe needs neither, whoever saves the tensor.


def remember(value: Tensor, function: Callable, *inputs) -> Tensor:
    """Gives back `value`, which function(*inputs) would make bit by bit; the inputs are kept anyway."""
    # a compiled block has no recipes (train.py refuses the pair); asking would break its graph in two
    book = None if torch.compiler.is_compiling() else BOOK.get()
    if book is not None:
        book.add(value, function, inputs)
    return value


class _Recipe:
    def __init__(self, function: Callable, inputs: tuple):
        self.function = function
        self.inputs = [value.detach() if torch.is_tensor(value) else value for value in inputs]
        self.versions = [value._version for value in inputs if torch.is_tensor(value)]
        self.wanted = 0  # times that the value was saved: q, k and v of one norm want it three times
        self.value: Tensor | None = None

    def make(self) -> Tensor:
        value, self.wanted = self.value, self.wanted - 1
        if value is None:
            if self.versions != [value._version for value in self.inputs if torch.is_tensor(value)]:
                raise RuntimeError("recompute: an input of a dropped tensor was changed in place")
            with torch.no_grad():
                value = self.function(*self.inputs)
        self.value = value if self.wanted > 0 else None
        return value


class _Book:
    """Within it, a tensor that was remembered is saved for the backward pass as its recipe."""

    def __init__(self):
        self.recipes: dict[tuple, tuple[Tensor, _Recipe]] = {}  # with it, for no other to have its address
        self.hooks = saved_tensors_hooks(self._pack, _unpack)

    def add(self, value: Tensor, function: Callable, inputs: tuple) -> None:
        self.recipes[_identity(value)] = (value, _Recipe(function, inputs))

    def __enter__(self) -> None:
        self.token = BOOK.set(self)
        self.hooks.__enter__()

    def __exit__(self, *error) -> None:
        self.hooks.__exit__(*error)
        BOOK.reset(self.token)
        self.recipes.clear()

    def _pack(self, tensor: Tensor) -> "Tensor | _Recipe":
        entry = self.recipes.get(_identity(tensor))
        if entry is None:
            return tensor
        entry[1].wanted += 1
        return entry[1]


def _identity(tensor: Tensor) -> tuple:
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, tensor._version


def _unpack(kept: "Tensor | _Recipe") -> Tensor:
    return kept.make() if isinstance(kept, _Recipe) else kept


BOOK: ContextVar[_Book | None] = ContextVar("book", default=None)  # per thread, as autograd's own hooks are


# offload


class Transfers(Protocol):
    """Moves tensors between a device and the host without waiting."""

    def send(self, tensor: Tensor) -> object: ...
    def fetch(self, sent: object) -> object: ...  # starts; the same bits
    def arrived(self, fetched: object) -> Tensor: ...  # usable by what is queued from now on


class OnHost:
    """Pinned memory for one tensor. torch takes it in powers of two, of 33 MiB it would make 64; so it is
    asked for pieces that are such powers, and less than the smallest of them is lost."""

    SMALLEST = 2**20  # bytes

    def __init__(self, tensor: Tensor, pinned: bool):
        self.shape, self.dtype = tensor.shape, tensor.dtype
        count = -(-tensor.nbytes // self.SMALLEST)
        bits = [bit for bit in reversed(range(count.bit_length())) if count >> bit & 1]
        sizes = [self.SMALLEST << bit for bit in bits]
        self.pieces = [torch.empty(size, dtype=torch.uint8, pin_memory=pinned) for size in sizes]

    def copy(self, tensor: Tensor, back: bool) -> None:
        """Between tensor (contiguous) and here, without waiting."""
        rest = tensor.view(-1).view(torch.uint8)
        for piece in self.pieces:
            part, rest = rest[: len(piece)], rest[len(piece) :]
            target, source = (part, piece[: len(part)]) if back else (piece[: len(part)], part)
            target.copy_(source, non_blocking=True)


class CudaTransfers:
    """Copies on a stream of their own, through pinned memory. (Not measured on a GPU yet.)"""

    def __init__(self, device: torch.device):
        self.device, self.stream = device, torch.cuda.Stream(device)

    def send(self, tensor: Tensor) -> OnHost:
        tensor = tensor.contiguous()
        host = OnHost(tensor, pinned=True)
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            host.copy(tensor, back=False)
        tensor.record_stream(self.stream)  # not to be given away before it is copied
        return host

    def fetch(self, sent: OnHost) -> tuple[Tensor, torch.cuda.Event]:
        tensor = torch.empty(sent.shape, dtype=sent.dtype, device=self.device)
        self.stream.wait_stream(torch.cuda.current_stream(self.device))  # the memory may be in use until here
        with torch.cuda.stream(self.stream):
            sent.copy(tensor, back=True)
        tensor.record_stream(self.stream)
        return tensor, self.stream.record_event()

    def arrived(self, fetched: tuple[Tensor, torch.cuda.Event]) -> Tensor:
        torch.cuda.current_stream(self.device).wait_event(fetched[1])
        return fetched[0]


class _Parcel:
    """The inputs of one block while they are away."""

    def __init__(self, before: "_Parcel | None"):
        self.before = before  # the next to be needed: the backward pass goes from the last block to the first
        self.sent: list = []
        self.fetched: list | None = None


class Offload:
    """Block inputs wait in host memory. One block ahead of its use, an input starts on its way back."""

    def __init__(self, transfers: Transfers):
        self.transfers = transfers
        self.last: _Parcel | None = None

    def block(self, number: int) -> saved_tensors_hooks:
        """Within it the tensors that a checkpoint keeps (and no other) go to the host."""
        parcel = self.last = _Parcel(None if number == 0 else self.last)

        def pack(tensor: Tensor) -> Tensor | tuple[_Parcel, int]:
            if tensor.numel() == 0:
                return tensor  # torch before 2.12 keeps an empty one of its own
            parcel.sent.append(self.transfers.send(tensor.detach()))
            return parcel, len(parcel.sent) - 1

        return saved_tensors_hooks(pack, self._unpack)

    def _unpack(self, place: Tensor | tuple[_Parcel, int]) -> Tensor:
        if torch.is_tensor(place):
            return place
        parcel, index = place
        self.last = None  # a backward pass has begun: nothing is chained to this forward pass any more
        self._start(parcel)
        if parcel.before is not None:
            self._start(parcel.before)
            parcel.before = None  # else the whole chain would live as long as its end
        tensor = self.transfers.arrived(parcel.fetched[index])
        parcel.fetched[index] = None
        if all(item is None for item in parcel.fetched):
            parcel.fetched = None
        return tensor

    def _start(self, parcel: _Parcel) -> None:
        if parcel.fetched is None:
            parcel.fetched = [self.transfers.fetch(sent) for sent in parcel.sent]
