"""Decoding at fixed shapes, a token for every sequence per step, nothing asked of the host: for CUDA graphs.

The ordinary step in generate.py builds its tensors from what the host knows: last tokens, lengths, random
numbers. On a GPU that costs more than the step itself. Here all of it lives on the device from one step to
the next; the host starts several steps ahead and learns each step's tokens while the next ones are running.
The graph holds the model; choosing the token, a few kernels that differ with every option, follows it. On a
CPU the same step runs without a graph, and tests show that it gives the ordinary path's tokens.

    steps = TokenSteps(model, cache)
    steps.begin(last_tokens, cache.lengths, choose)
    steps.launch(); steps.launch()
    tokens = steps.read()       # of the first one
"""

from collections.abc import Callable

import torch
from torch import Tensor

import kernels
from architectures.layers import ForwardContext
from generation.cache import KVCache
from kernels.linear import LinearLayer
from kernels.lora_linear import shared_buffers
from model import Decoder

# steps on their way at once: the host's hiccups are shorter; so many are in vain after the last text's end
AHEAD = 4
DRAWS = 32  # steps that one copy of random numbers serves


class DeviceCache:
    """A KVCache whose filled lengths stand on the device. Every row brings one token for each sequence."""

    def __init__(self, cache: KVCache):
        device = cache.storage.device
        self.layers = cache.layers
        self.lengths = torch.zeros(len(cache.lengths), dtype=torch.int32, device=device)  # (B,)
        self.growth = torch.ones_like(self.lengths)

    def begin(self, lengths: list[int]) -> None:
        self.lengths.copy_(torch.tensor(lengths, dtype=torch.int32))
        self.growth.fill_(1)

    def plan(self, context: ForwardContext) -> None:
        context.lengths = context.filled = self.lengths + 1

    def attend(self, layer: int, q, k, v, context: ForwardContext, window, scale: float) -> Tensor:
        keys, values = self.layers[layer]
        kernels.store_in_cache(k, v, keys, values, context.cu_seqlens, context.filled, 1)
        return kernels.decode_attention(q, keys, values, context.cu_seqlens, context.filled, 1, window, scale)

    def advance(self, context: ForwardContext) -> None:
        self.lengths += self.growth

    @torch.inference_mode()
    def retire(self, sequence: int) -> None:
        """Its text has ended: the row stays, but sees nothing but its own token and never grows again."""
        self.lengths[sequence] = self.growth[sequence] = 0


class Replay:
    """A function without arguments that reads and writes fixed tensors; captured on a GPU, a CUDA graph.

    What is to be captured runs once as it is first: kernels compile and libraries allocate then, which a
    capture would not allow. That run counts.
    """

    def __init__(self, function: Callable[[], None], device: torch.device):
        self.function = function
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.graph: torch.cuda.CUDAGraph | None = None
        self.is_warm = False
        self.held: list[Tensor] = []

    def __call__(self, capture: bool) -> None:
        if self.graph is not None:
            self.graph.replay()
        elif self.stream is None or not capture:
            self.function()
        elif not self.is_warm:
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                self.function()
            torch.cuda.current_stream().wait_stream(self.stream)
            self.is_warm = True
        else:
            self.graph = torch.cuda.CUDAGraph()
            # other threads may go on using the GPU, so only this one's mistakes count
            with torch.cuda.graph(self.graph, stream=self.stream, capture_error_mode="thread_local"):
                self.function()
            self.held = shared_buffers()  # the graph writes there, whatever comes after it
            self.graph.replay()


class TokenSteps:
    """Tokens for every row of a cache, step after step; begin() sets out, also a second time.

    The cache must have room for every step that is launched; its `lengths` are left to the caller.
    """

    def __init__(self, model: Decoder, cache: KVCache):
        device, rows = cache.storage.device, len(cache.lengths)
        self.model = model
        self.cache = DeviceCache(cache)
        self.tokens = torch.zeros(rows, dtype=torch.int64, device=device)  # (B,) what the last step chose
        self.borders = torch.arange(rows + 1, dtype=torch.int32, device=device)
        self.logits: Tensor | None = None  # (B, V) fp32 of the last step; once captured, the same memory
        pinned = device.type == "cuda"
        self.results = [torch.zeros(rows, dtype=torch.int64, pin_memory=pinned) for _ in range(AHEAD)]
        self.arrivals = [torch.cuda.Event() if pinned else None for _ in range(AHEAD)]
        self.replay = Replay(self._forward, device)
        self.waits = any(module.waits(rows) for module in model.modules() if isinstance(module, LinearLayer))

    def begin(self, last_tokens: list[int], lengths: list[int], choose, *, draws=None, capture=True) -> None:
        """last_tokens: per row, what its cache, filled to `lengths`, does not hold yet.

        choose(logits (B, V) fp32, uniforms (B,) fp64 or None) -> (B,) tokens, -1 for a row whose logits are
        not finite; on a GPU it must not synchronise. draws(first, count) -> (count, B) fp64 on the host: the
        uniform numbers of steps first .. first + count - 1; None = nothing is drawn. capture: whether so many
        steps follow that a graph pays.
        """
        self.tokens.copy_(torch.tensor(last_tokens))
        self.cache.begin(lengths)
        self.choose, self.draws, self.capture = choose, draws, capture and not self.waits
        self.uniforms: Tensor | None = None  # (DRAWS, B) fp64
        self.launched = self.told = 0  # steps

    @property
    def waiting(self) -> int:
        """Steps that were launched and not read."""
        return self.launched - self.told

    def launch(self) -> None:
        """Start one more step for all rows; at most AHEAD may be waiting."""
        place, uniforms = self.launched % AHEAD, None
        if self.draws is not None:
            if self.launched % DRAWS == 0:
                numbers = self.draws(self.launched, DRAWS)
                numbers = numbers.pin_memory() if self.tokens.is_cuda else numbers
                self.uniforms = numbers.to(self.tokens.device, non_blocking=True)
            uniforms = self.uniforms[self.launched % DRAWS]
        self.replay(self.capture)
        self.tokens.copy_(self.choose(self.logits, uniforms))
        self.results[place].copy_(self.tokens, non_blocking=True)
        if self.arrivals[place] is not None:
            self.arrivals[place].record()
        self.launched += 1

    def read(self) -> list[int]:
        """The tokens of the oldest step that is waiting, one per row; waits for that step only."""
        place = self.told % AHEAD
        if self.arrivals[place] is not None:
            self.arrivals[place].synchronize()
        self.told += 1
        return self.results[place].tolist()

    def _forward(self) -> None:
        """From the last tokens to the next logits; only tensors that stay go in and out."""
        tokens = self.tokens.clamp(min=0)  # after logits that were not finite, until the host hears of it
        hidden = self.model(tokens, self.cache.lengths, self.borders, 1, self.cache)  # (B, E)
        self.logits = self.model.logits(hidden).float()
