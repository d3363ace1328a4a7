"""How a run is spread over its ranks: the options, and the sizes of the mesh that follow from them."""

from dataclasses import dataclass
from typing import Literal

from options.errors import refuse
from options.option import RESUMABLE, option


@dataclass(frozen=True)
class ParallelOptions:
    """Many processes: how weights, rows and layers are spread over ranks"""

    parallel: Literal["auto", "ddp", "fsdp", "hsdp"] = option(
        "auto",
        "ddp: all weights on each rank; fsdp: a share; hsdp: shares in dp_shard_size; auto: ddp if it fits",
        RESUMABLE,
    )
    dp_shard_size: int | None = option(None, "hsdp: ranks of a share", RESUMABLE, when="parallel=hsdp")
    fsdp_reshard_after_forward: bool = option(
        True, "gather weights for each pass, else once for each update: less memory, more traffic", RESUMABLE
    )
    fsdp_offload: bool = option(False, "shares, gradients and optimizer state in host memory", RESUMABLE)
    gather_for_generation: bool = option(
        True, "hold all weights for texts; false: block by block", RESUMABLE, also="ds3_gather_for_generation"
    )
    tp_size: int = option(
        1, "ranks that hold each layer between them", also="tensor_parallel_size tensor_model_parallel_size"
    )
    cp_size: int = option(
        1,
        "ranks that hold each row of tokens",
        RESUMABLE,
        also="sequence_parallel_size context_parallel_size",
    )
    cp_mode: Literal["ulysses", "ring"] = option(
        "ulysses", "how: heads change places; ring: keys travel", RESUMABLE, when="cp_size!=1"
    )

    def data(self, ranks: int) -> int:
        """How many ranks, or groups of them, have rows of their own. Raises UserError."""
        for key in ("tp_size", "cp_size"):
            size = getattr(self, key)
            sizes = ", ".join(str(each) for each in range(1, ranks + 1) if ranks % each == 0)
            refuse(size < 1 or ranks % size > 0, f"{key}: {size} does not divide {ranks} ranks; {sizes} do")
        both = self.tp_size * self.cp_size
        refuse(ranks % both > 0, f"tp_size: times cp_size it is {both}, which does not divide {ranks} ranks")
        return ranks // both

    def shares_weights(self, ranks: int) -> bool:
        """Whether each rank holds a part of the weights, or has them elsewhere."""
        return self.engine(ranks)[1] * self.tp_size > 1 or self.fsdp_offload

    def engine(self, ranks: int) -> tuple[int, int]:
        """(replicate, shard) of the engine, whose product is the ranks that share no layer: those that share
        a row take part, because their gradients are sums too. Raises UserError."""
        ranks = self.data(ranks) * self.cp_size
        shard = {"auto": 1, "ddp": 1, "fsdp": ranks, "hsdp": self.dp_shard_size}[self.parallel]
        sizes = ", ".join(str(size) for size in range(2, ranks) if ranks % size == 0)
        fits = f"of {ranks} ranks it can be: {sizes or 'none, so set parallel=fsdp'}"
        refuse(shard is None, f"parallel: hsdp needs dp_shard_size, the ranks that share the weights; {fits}")
        uneven = self.parallel == "hsdp" and (not 1 < shard < ranks or ranks % shard > 0)
        refuse(uneven, f"dp_shard_size: {shard} does not divide {ranks} ranks into groups; {fits}")
        alone = "fsdp_offload: only parallel=fsdp and hsdp have shares to move"
        refuse(self.fsdp_offload and self.parallel not in ("fsdp", "hsdp"), alone)
        return ranks // shard, shard
