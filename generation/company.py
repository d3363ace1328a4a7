"""Calls of a model by one rank alone, though all ranks hold shares of it (parallel/fsdp.py).

    with called_alone(model):
        generate(model, ...)        # ranks write texts of other lengths, and some write none

In a forward pass a block gathers its weights, and every rank that has a share of them takes part. So while
ranks have calls of their own to make, either each holds all weights, or (gather_for_generation: false) they
keep each other company: before a call a rank asks for it, and who has none left to make gathers the blocks
with the others, one after another, until nobody asks any more.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """Within it every rank holds all weights, unless ranks keep company. All ranks enter it as often; within
    itself it does nothing."""
    if not hasattr(model, "outside") or model.keeps_company or model.gathered:
        yield
        return
    with _held(model, blocks=True):
        yield


@contextmanager
def called_alone(model: nn.Module) -> Iterator[None]:
    """Within it a rank may call the model as often as it likes, whatever the others do. All ranks enter it as
    often, for one model at a time; where one fails it leaves at once, and the others notice that."""
    if not getattr(model, "keeps_company", False):
        with gathered(model):
            yield
        return
    with _held(model, blocks=False):
        hook = model.register_forward_pre_hook(lambda *_: model.world.any(True) and None, prepend=True)
        try:
            yield
            while model.world.any(False):
                for block in model.layers:
                    block.unshard()
                    block.reshard()
        finally:
            hook.remove()


@contextmanager
def _held(model: nn.Module, blocks: bool) -> Iterator[None]:
    """Weights are gathered, those of blocks too, or when it is their turn alone."""
    parts = [(block, blocks) for block in model.layers] + [(part, True) for part in model.outside]
    for part, stays in parts:
        part.unshard()  # once at least outside of inference mode, from which no backward pass could keep it
        part.set_reshard_after_forward(not stays, recurse=False)
        if not stays:
            part.reshard()
    model.gathered = blocks
    try:
        yield
    finally:
        model.gathered = False
        for part, _ in parts:
            part.set_reshard_after_forward(part.reshards, recurse=False)
            part.reshard()
