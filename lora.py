"""Adapters by composition: LoRA, rsLoRA, DoRA; merging them.

LoRA    y = W x + s B A drop(x)               Hu et al., arXiv 2106.09685, eq. 3; s = alpha / R
rsLoRA  the same with s = alpha / sqrt(R)     Kalajdzievski, arXiv 2312.03732
DoRA    y = m (W + s B A) x / ||W + s B A||   Liu et al., arXiv 2402.09353, eq. 5; norms of rows, no gradient

W (out, in) is any frozen base layer: an nn.Linear or a kernels.linear.LinearLayer, dense or quantised. A (R,
in) starts uniform (kaiming, a = sqrt(5)), B (out, R) at zero and m at ||W||, so training starts at the base
model. Adapters are fp32 unless asked otherwise and are cast to x's dtype where they are used; norms and
merged weights are computed in fp32. What of an adapter trains is decided in LoraLinear alone: new adapters
(add_lora) and given ones (checkpoints/peft.py, prepare_adapters) are both made by it, and an A or B that is
frozen there costs no gradient. freeze and full tuning: checkpoints/trainable.py.

    lora.add_lora(model, LoraOptions(lora_rank=16), torch.Generator().manual_seed(42))
    with lora.lora_off(model): ...          # the base model, without a second copy
    lora.merge_for_good(model)              # plain linears again
"""

import itertools
import math
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kernels
from architectures.find import find_modules, inside, target_names
from architectures.layers import Linear
from kernels.linear import LinearLayer, Part
from kernels.lora_linear import low_rank
from options.errors import UserError, located, refuse
from options.option import COMMON, option
from quant.linear import quantised_linears

LORA, FREEZE = "finetuning_type=lora", "finetuning_type=freeze"  # when an option is read


@dataclass(frozen=True)
class LoraOptions:
    finetuning_type: Literal["lora", "full", "freeze"] = option(
        "lora", "what is trained", COMMON, also="sft_type train_type tuner_type"
    )
    lora_rank: int = option(8, "rank R of the update", COMMON, also="lora_r", when=LORA)
    lora_alpha: float | None = option(None, "numerator of the scale; default 2 lora_rank", COMMON, when=LORA)
    lora_dropout: float = option(0.0, "dropout on the adapters' input", also="lora_dropout_p", when=LORA)
    lora_target: tuple[str, ...] = option(
        ("all",),
        "linears that get an adapter, by the end of their name; all = each but the head",
        COMMON,
        also="lora_target_modules target_modules",
        when=LORA,
    )
    additional_target: tuple[str, ...] = option(
        (),
        "modules trained in full and saved with the adapter, such as embed_tokens",
        also="modules_to_save lora_modules_to_save",
    )
    create_new_adapter: bool = option(False, "merge given adapters, train a new one (else the last one on)")
    use_rslora: bool = option(False, "scale by alpha / sqrt(R) instead of alpha / R", also="use_rs_lora")
    use_dora: bool = option(False, "train the row magnitudes apart from the directions")
    num_layer_trainable: int = option(
        2,
        "freeze: how many layers train; n the last n, -n the first n",
        also="freeze_trainable_layers",
        when=FREEZE,
    )
    name_module_trainable: tuple[str, ...] = option(
        ("all",),
        "freeze: modules that train inside those layers; all = the whole layer",
        also="freeze_trainable_modules",
        when=FREEZE,
    )
    freeze_extra_modules: tuple[str, ...] = option(
        (), "freeze: further modules that train, outside the layers: embed_tokens, norm, lm_head", when=FREEZE
    )
    print_param_status: bool = option(False, "list tensors with shape, dtype, device and whether they train")

    def __post_init__(self):
        refuse(self.lora_rank < 1, f"lora_rank: {self.lora_rank} must be at least 1")
        if self.lora_alpha is not None and not (math.isfinite(self.lora_alpha) and self.lora_alpha > 0):
            raise UserError(f"lora_alpha: {self.lora_alpha} must be above 0")
        refuse(not 0 <= self.lora_dropout < 1, f"lora_dropout: {self.lora_dropout} is not in [0, 1)")
        for key in ("lora_target", "name_module_trainable"):
            refuse(not getattr(self, key), f"{key}: empty; name modules or write all")
        told = "num_layer_trainable: 0 layers train, and freeze_extra_modules names nothing else"
        refuse(self.num_layer_trainable == 0 and not self.freeze_extra_modules, told)
        for key in ("use_dora", "use_rslora", "additional_target", "create_new_adapter"):
            if getattr(self, key) and self.finetuning_type != "lora":
                raise UserError(
                    f"{key}: it is a part of LoRA, and finetuning_type is {self.finetuning_type}; set "
                    f"finetuning_type=lora, or drop {key}"
                )

    @property
    def alpha(self) -> float:
        return 2.0 * self.lora_rank if self.lora_alpha is None else self.lora_alpha


class LoraLinear(LinearLayer):
    """A frozen base layer with a trainable low-rank update beside it.

    base        an nn.Linear or a LinearLayer
    lora_a      (R, in), lora_b (out, R), magnitude (out,) for DoRA or None; all trainable
    off         forward is the base alone, without the update (see lora_off)
    generator   draws A on the CPU in fp32, so a seed gives the same adapter on every device
    """

    def __init__(
        self,
        base: nn.Module,
        rank: int,
        alpha: float,
        *,
        dropout_probability: float = 0.0,
        rslora: bool = False,
        dora: bool = False,
        dtype: torch.dtype = torch.float32,
        generator: torch.Generator | None = None,
    ):
        super().__init__()
        self.base = base
        self.in_features, self.out_features = base.in_features, base.out_features
        self.rank, self.alpha, self.rslora = rank, alpha, rslora
        self.scale = alpha / math.sqrt(rank) if rslora else alpha / rank
        self.dropout_probability = dropout_probability
        self.off = False
        self.seed = None if generator is None else generator.initial_seed()  # so that it can be made again
        self._frozen_ratio: Tensor | None = None  # (out,) fp32, see freeze_adapter
        device = next(itertools.chain(base.parameters(), base.buffers())).device
        self.lora_a = nn.Parameter(first_a(rank, self.in_features, generator).to(device, dtype))
        self.lora_b = nn.Parameter(torch.zeros(self.out_features, rank, device=device, dtype=dtype))
        self.magnitude = nn.Parameter(self.updated_norm().to(dtype)) if dora else None

    def part(self) -> Part:
        """W x + b + s B A x for kernels.linears; without a weight where that is not the formula."""
        if self.off:
            return self._base_part()
        if self.magnitude is not None or self._drops:
            return Part(None, layer=self)
        return self._updated_part()

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) -> (..., out) in the dtype that the base gives for x."""
        part = self.part()
        if part.weight is not None:
            return kernels.linears(x, [part])[0]
        if self.magnitude is not None:
            return self._dora(x)
        result = self.base(x)
        return result + low_rank(self._dropout(x), self._updated_part()).to(result.dtype)

    def _dora(self, x: Tensor) -> Tensor:
        # the ratio stays fp32: bf16 would round it to steps of 1/128, coarser than what training moves it by
        ratio = self._frozen_ratio  # (out,)
        if ratio is None:
            ratio = _wide(self.magnitude) / self.updated_norm()
        part = self._updated_part()
        if self._drops:
            # peft drops the input of both branches here; only the untouched base output sees x whole
            result, dropped = self.base(x), self._dropout(x)
            straight = self.base(dropped)  # W drop(x), once the bias is taken off again
            if part.bias is not None:
                straight = _wide(straight) - part.bias
            update = (ratio - 1) * straight + ratio * low_rank(dropped, part)
            return (result + update).to(result.dtype)
        # peft's base + (m/n - 1) W x + (m/n) s B A x, collected: one product serves both terms
        result = ratio * kernels.linears(x, [part._replace(bias=None)])[0]
        if part.bias is not None:
            result = result + part.bias
        return result.to(x.dtype)

    def _base_part(self) -> Part:
        base = self.base
        return base.part() if isinstance(base, LinearLayer) else Part(base.weight, base.bias, layer=base)

    def _updated_part(self) -> Part:
        update = {"lora_a": self.lora_a, "lora_b": self.lora_b, "scale": self.scale}
        return self._base_part()._replace(layer=self, **update)

    @property
    def _drops(self) -> bool:
        return self.training and self.dropout_probability > 0

    def _dropout(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout_probability, self.training)

    @property
    def bias(self) -> Tensor | None:
        return self.base.bias

    def base_weight(self) -> Tensor:
        """W (out, in), dequantised where the base is quantised."""
        return self.base.weight if isinstance(self.base, nn.Linear) else self.base.dequantize()

    @torch.no_grad()
    def updated_norm(self) -> Tensor:
        """||W + s B A|| of every row, (out,) fp32, without gradient and without forming the sum:

        ||w + s b A||^2 = ||w||^2 + 2 s (w A^T) . b + s^2 b (A A^T) . b.  These products have only R columns.
        """
        weight = self.base_weight()
        lora_a, lora_b = _wide(self.lora_a), _wide(self.lora_b)
        wide = torch.promote_types(weight.dtype, torch.float32)
        squares = torch.linalg.vector_norm(weight, dim=1, dtype=wide).square()
        cross = _wide(kernels.linear(weight, lora_a))  # (out, R)
        update = lora_b @ (lora_a @ lora_a.T) * self.scale  # (out, R)
        squares = squares + self.scale * ((2 * cross + update) * lora_b).sum(1)
        # a row of zeros has no direction: with a tiny norm in place of 0 it stays zero instead of 0 / 0
        return squares.clamp_min(torch.finfo(torch.float32).tiny).sqrt()

    def _updated_weight(self) -> Tensor:
        """The matrix (out, in) that base and adapter are together, fp32, with gradient for the adapter."""
        updated = _wide(self.base_weight()) + self.scale * (_wide(self.lora_b) @ _wide(self.lora_a))
        if self.magnitude is not None:
            updated = updated * (_wide(self.magnitude) / self.updated_norm())[:, None]
        return updated

    @property
    def weight(self) -> Tensor:
        """The matrix (out, in) of forward as it is now, with gradient: for whom a product is not enough, such
        as the reader of model.head_weight(). forward is cheaper, and exact in bf16 too."""
        if self.off:
            return self.base_weight()
        refuse(self._drops, "lora_dropout: with dropout an adapted layer is no single matrix; call the layer")
        return self._updated_weight()

    @torch.no_grad()
    def merged_weight(self) -> Tensor:
        """The weight (out, in) that alone does what base and adapter do together; fp32, not yet rounded."""
        return self._updated_weight()

    @torch.no_grad()
    def freeze_adapter(self, dtype: torch.dtype) -> None:
        """For an adapter that will not change any more: A and B in the dtype they are used in, DoRA's norms
        once."""
        if self.magnitude is not None:
            self._frozen_ratio = _wide(self.magnitude) / self.updated_norm()
        self.lora_a.data, self.lora_b.data = self.lora_a.data.to(dtype), self.lora_b.data.to(dtype)

    @torch.no_grad()
    def merged_base(self) -> nn.Module:
        """The base with the update in its weight, for good; a dense Linear in place of a quantised base."""
        merged = self.merged_weight()
        refuse(not torch.isfinite(merged).all(), "the merged weight is not finite; the adapter is broken")
        if isinstance(self.base, nn.Linear):
            self.base.weight.copy_(merged)
            return self.base
        plain = Linear(self.in_features, self.out_features, bias=False, device="meta")
        plain.weight = nn.Parameter(merged.to(self.base.dtype), requires_grad=False)
        plain.bias = self.base.bias
        return plain

    def extra_repr(self) -> str:
        kind = "DoRA" if self.magnitude is not None else "rsLoRA" if self.rslora else "LoRA"
        return f"{kind} rank {self.rank}, alpha {self.alpha:g}, dropout {self.dropout_probability:g}"


def first_a(rank: int, inputs: int, generator: torch.Generator | None) -> Tensor:
    """A (R, in) as it starts, fp32 on the CPU."""
    return nn.init.kaiming_uniform_(torch.empty(rank, inputs), a=math.sqrt(5), generator=generator)


def add_lora(
    model: nn.Module,
    options: LoraOptions,
    generator: torch.Generator | None = None,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Wrap the linears that lora_target names, train additional_target in full, freeze everything else.

    Each A depends on one number drawn from the generator and on the linear's own name, so neither the other
    targets nor the order of modules changes it. Raises UserError when a name matches nothing.
    """
    if lora_layers(model):
        raise ValueError("the model has adapters already; call lora.merge_for_good before adding new ones")
    names, full = adapted_names(model, options)
    seed = int(torch.randint(2**31, (), generator=generator))
    model.requires_grad_(False)
    for name in names:
        own = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
        kind = {"rslora": options.use_rslora, "dora": options.use_dora, "dtype": dtype, "generator": own}
        kind["dropout_probability"] = options.lora_dropout
        layer = LoraLinear(model.get_submodule(name), options.lora_rank, options.alpha, **kind)
        replace_module(model, name, layer.train(model.training))
    for name in full:
        model.get_submodule(name).requires_grad_(True)


def adapted_names(model: nn.Module, options: LoraOptions) -> tuple[list[str], list[str]]:
    """The linears that lora_target names, and the modules that additional_target names, of a model that
    may lie on the meta device. UserError when a name matches nothing."""
    full = find_modules(model, options.additional_target, "additional_target")
    for name in quantised_linears(model):
        if inside(name, full):
            raise UserError(
                f"additional_target: {name} is quantised, and codes have no gradient; lora_target gives it "
                "an adapter"
            )
    return target_names(model, options.lora_target, without=full), full


def lora_layers(model: nn.Module) -> dict[str, LoraLinear]:
    """Adapted linears by the name of the linear they replaced, in the model's order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLinear)}


def full_modules(model: nn.Module) -> list[str]:
    """Names of the modules with trainable weights of their own beside adapters (peft's modules_to_save)."""
    return [
        name
        for name, module in model.named_modules()
        if not isinstance(module, LoraLinear)
        and not name.startswith("v_head")  # has a file of its own
        and any(p.requires_grad for p in module.parameters(recurse=False))
    ]


def merge_for_good(model: nn.Module) -> None:
    """Put the updates into the weights and plain linears in place of the adapters, one at a time."""
    for name, layer in _some_layers(model).items():
        with located(name):
            replace_module(model, name, layer.merged_base())


@contextmanager
def lora_off(model: nn.Module) -> Iterator[None]:
    """Within it the model is the base model: the reference policy without a second copy. May be nested."""
    layers = list(_some_layers(model).values())
    full = full_modules(model)
    if full:
        raise UserError(
            f"{', '.join(full)} train in full (additional_target), so the base model is gone: "
            "give a reference model or train without additional_target"
        )
    before = [layer.off for layer in layers]
    for layer in layers:
        layer.off = True
    try:
        yield
    finally:
        for layer, off in zip(layers, before):
            layer.off = off


def _some_layers(model: nn.Module) -> dict[str, LoraLinear]:
    layers = lora_layers(model)
    if not layers:
        raise ValueError("the model has no adapters")
    return layers


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, module)


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
