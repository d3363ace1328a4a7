"""Merge adapters into their base model and write a model folder that stands alone (or convert and re-shard a model).

    python export.py model_name_or_path=BASE adapter_name_or_path=A,B export_dir=out export_size=2
    python export.py model_name_or_path=saves/demo export_dir=out infer_dtype=bfloat16     # a run folder names its base
    python export.py ... export_hub_model_id=owner/name hf_hub_token=...

Tensors go one at a time from the base's files through the merge into the new shards, so the model is never held as
a whole; only one shard is. W' = W + s B A in fp32 for every adapter in order, rounded once at the end (LoRA, arXiv
2106.09685); DoRA (arXiv 2402.09353) gives each row of the sum its trained length.
"""

import json
import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import torch
from torch import Tensor, nn

import config as configuration
from adapter_files import ADAPTER_PARTS, adapted_linear, read_adapter, whole_parameter
from architectures import ModelConfig, to_hf_name
from checkpoint import DTYPES, checkpoint_dtype, copy_side_files, stream_weights, write_model_json
from data import DataOptions
from hub import ModelOptions
from inference import Source, check_tokenizer, find_source, scaled_config
from lora import LoraLinear, LoraOptions
from model import Decoder
from optim import OptimOptions
from quant import QuantLinear, QuantOptions
from runs import TrainOptions
from templates import TemplateOptions, get_template
from tensor_files import write_shards
from tokenizer import Tokenizer

RECORD = "export_info.json"  # marks a folder as an export, which the next export to the same place may replace
EMBEDDING, HEAD = "embed_tokens", "lm_head"


@dataclass(frozen=True)
class ExportOptions:
    export_dir: Annotated[str | None, "folder for the merged model"] = None
    export_size: Annotated[float, "largest shard in GB (LLaMA-Factory's newer default)"] = 5.0
    export_device: Annotated[Literal["cpu", "auto"], "where weights are merged; auto = a GPU if there is one"] = "cpu"
    export_legacy_format: Annotated[bool, "only false: weights are written as safetensors"] = False
    export_hub_model_id: Annotated[str | None, "also upload to this Hugging Face repository (made private)"] = None

    def __post_init__(self):
        if not self.export_dir:
            raise ValueError("export_dir: missing; name a folder for the model, for example export_dir=out/merged")
        if not self.export_size > 0:
            raise ValueError(f"export_size: {self.export_size}; expected GB per shard, above 0")
        if self.export_legacy_format:
            raise ValueError(
                "export_legacy_format: true would write pytorch_model.bin, a pickle, which can run any code when it is "
                "read; only safetensors are written, which every current runtime reads. Set it to false"
            )


SECTIONS = [ModelOptions, TemplateOptions, ExportOptions]


def main(argv: list[str]) -> int:
    try:
        config = configuration.load(
            argv,
            SECTIONS,
            program="export.py",
            description=__doc__.splitlines()[0],
            # training files can be read too
            other_sections=[TrainOptions, QuantOptions, DataOptions, LoraOptions, OptimOptions],
        )
        for notice in config.notices:
            print(f"note: {notice}")
        given = {key for key, origin in config.origins.items() if origin != "default"}
        source = find_source(config[ModelOptions], config[TemplateOptions], given)
        for notice in source.notices:
            print(f"note: {notice}")
        options = config[ExportOptions]
        export(source, options, DTYPES.get(config[ModelOptions].infer_dtype))
        if options.export_hub_model_id:
            url = push(Path(options.export_dir), options.export_hub_model_id, config[ModelOptions].hf_hub_token)
            print(f"uploaded to {url}")
    except (ValueError, OSError) as error:
        if os.environ.get("ANVIL_TRACEBACK"):
            raise
        print(f"export.py: {error}", file=sys.stderr)
        return 2
    return 0


def export(source: Source, options: ExportOptions, dtype: torch.dtype | None) -> None:
    """Write the merged model to options.export_dir: complete, or not at all.  dtype None = each tensor's own.

    Raises ValueError for what does not fit together, OSError when the disk is full.
    """
    target = Path(options.export_dir)
    check_target(target, source)
    device = "cuda" if options.export_device == "auto" and torch.cuda.is_available() else "cpu"
    config = scaled_config(source)
    tokenizer = Tokenizer.from_folder(source.tokenizer)
    check_tokenizer(tokenizer, config, source)
    template = None
    if source.template.template:
        template = get_template(source.template.template, None, source.template.default_system)
    merge = Merge(config, [Adapter(config, folder) for folder in source.adapters], dtype, device)
    temporary = target.parent / f".{target.name}.unfinished"
    shutil.rmtree(temporary, ignore_errors=True)  # of an export that was killed
    temporary.mkdir(parents=True)
    try:
        check_space(merge.size_bytes(), target)
        written = write_shards(temporary, merge.tensors(source.base), options.export_size)
        hf = dict(config.hf) | {"tie_word_embeddings": config.tied_head and not merge.unties}
        write_model_json(temporary, hf, written)
        copy_side_files(source.base, temporary)
        tokenizer.save(temporary, template.to_jinja() if template is not None else None)
        record = {"base": str(source.base), "adapters": [str(path) for path in source.adapters]}
        (temporary / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        _put_in_place(temporary, target)
    except OSError as error:
        free = shutil.disk_usage(target.parent).free / 1e9
        raise OSError(
            f"export_dir: {target} could not be written ({error}; {free:.2f} GB are free). Nothing half-written is left"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    parts = " + ".join(str(path) for path in (source.base, *source.adapters))
    print(f"{parts} -> {target} ({str(written).removeprefix('torch.')}{', head untied' if merge.unties else ''})")


def check_target(target: Path, source: Source) -> None:
    """Raises ValueError unless the target is new, empty, or an earlier export."""
    used = [source.base, source.tokenizer, *source.adapters]
    if any(target.resolve() == path.resolve() or target.resolve() in path.resolve().parents for path in used):
        raise ValueError(f"export_dir: {target} is, or holds, a folder that is read; choose another one")
    if target.exists() and not target.is_dir():
        raise ValueError(f"export_dir: {target} is a file; name a folder")
    if target.is_dir() and any(target.iterdir()) and not (target / RECORD).is_file():
        raise ValueError(
            f"export_dir: {target} is not empty and no earlier export (it has no {RECORD}); choose another folder"
        )


def check_space(needed_bytes: int, target: Path) -> None:
    free = shutil.disk_usage(target.parent).free
    if free < needed_bytes:
        raise OSError(f"the model takes {needed_bytes / 1e9:.2f} GB")


def _put_in_place(temporary: Path, target: Path) -> None:
    old = target.parent / f".{target.name}.replaced"
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.rename(old)
    temporary.rename(target)
    shutil.rmtree(old, ignore_errors=True)


class Adapter:
    """A PEFT adapter, ready to be merged into one tensor at a time.

    Reading it checks everything against the model's shapes: ValueError names the first tensor that does not fit.
    """

    def __init__(self, config: ModelConfig, folder: Path):
        # read as if the head had a weight of its own: an adapter may give it one
        untied = replace(config, tied_head=False)
        skeleton = Decoder(untied, device="meta")  # shapes only
        self.file = read_adapter(folder, untied)
        self.layers: dict[str, LoraLinear] = {}
        for module, parts in self.file.modules.items():
            if "lora_A" in parts or "lora_B" in parts:
                self.layers[module] = adapted_linear(skeleton, module, self.file, torch.float32, 0.0)
            for part in parts.keys() - ADAPTER_PARTS:
                whole_parameter(skeleton, f"{module}.{part}", parts[part], self.file)

    def apply(self, name: str, tensor: Tensor) -> Tensor:
        """One of the model's tensors after this adapter; fp32 where an update was added."""
        module, _, part = name.rpartition(".")
        parts = self.file.modules.get(module, {})
        if part in parts:  # trained in full; or, where the head has an adapter, the base that peft stores beside it
            tensor = parts[part].to(tensor.device)
        return self._merged(module, parts, tensor) if module in self.layers and part == "weight" else tensor

    def _merged(self, module: str, parts: dict[str, Tensor], weight: Tensor) -> Tensor:
        layer = self.layers[module]
        shape_only = layer.base.weight
        layer.base.weight = nn.Parameter(weight, requires_grad=False)
        for part, name in (("lora_A", "lora_a"), ("lora_B", "lora_b"), ("magnitude", "magnitude")):
            if part in parts:
                setattr(layer, name, nn.Parameter(parts[part].to(weight.device, torch.float32), requires_grad=False))
        merged = layer.merged_weight()
        layer.base.weight = shape_only
        if not torch.isfinite(merged).all():
            raise self.file.fault(f"the merged {module} is not finite, so the adapter is broken")
        return merged

    @property
    def unties(self) -> bool:
        """Whether a tied head and the embedding differ after this adapter, as peft reads it: a module that it does not
        name keeps the base's weight. Both trained in full and equal is how a tied pair is stored."""
        embedding, head = self.file.modules.get(EMBEDDING, {}), self.file.modules.get(HEAD, {})
        if not embedding and not head:
            return False
        if not head and self.file.config.get("ensure_weight_tying"):
            return False
        pair = "weight" in embedding and "weight" in head
        return not (pair and torch.equal(embedding["weight"], head["weight"]))


class Merge:
    """The base model's dense tensors with every adapter applied, one at a time; a quantised base is dequantised."""

    def __init__(self, config: ModelConfig, adapters: list[Adapter], dtype: torch.dtype | None, device: str):
        self.config, self.adapters, self.dtype, self.device = config, adapters, dtype, device
        self.unties = config.tied_head and any(adapter.unties for adapter in adapters)
        self.shapes = _shapes(config)

    def size_bytes(self) -> int:
        """What the files will take: an estimate by the checkpoint's own dtype where none is asked for."""
        numbers = sum(torch.Size(shape).numel() for shape in self.shapes.values())
        if self.unties:
            numbers += torch.Size(self.shapes[f"{EMBEDDING}.weight"]).numel()
        return numbers * (self.dtype or checkpoint_dtype(self.config)).itemsize

    def tensors(self, folder: Path) -> Iterator[tuple[str, Tensor]]:
        """(Hugging Face name, merged dense tensor on the CPU), whatever format the base is in. Raises ValueError for
        missing, extra and misshapen tensors."""
        for name, value in stream_weights(folder, self.config, checkpoint_dtype(self.config)):
            if isinstance(value, QuantLinear):
                yield from self._dequantised(name, value.to(self.device))
                continue
            yield to_hf_name(self.config, name), self._finished(name, value, value.dtype)
            if self.unties and name == f"{EMBEDDING}.weight":
                yield f"{HEAD}.weight", self._finished(f"{HEAD}.weight", value, value.dtype)

    def _dequantised(self, module: str, layer: QuantLinear) -> Iterator[tuple[str, Tensor]]:
        """A quantised linear's weight and bias. fp32 until the adapters are in, so that it is rounded once."""
        weight = self._finished(f"{module}.weight", layer.dequantize(torch.float32), layer.dtype)
        yield to_hf_name(self.config, f"{module}.weight"), weight
        if layer.bias is not None:
            bias = self._finished(f"{module}.bias", layer.bias.detach(), layer.dtype)
            yield to_hf_name(self.config, f"{module}.bias"), bias

    def _finished(self, name: str, tensor: Tensor, own: torch.dtype) -> Tensor:
        """The tensor after all adapters, in the dtype asked for, or else in its own."""
        merged = tensor.to(self.device)
        for adapter in self.adapters:
            merged = adapter.apply(name, merged)
        result = merged.to(self.dtype or own)
        if result.dtype is torch.float16 and not torch.isfinite(result).all() and torch.isfinite(merged).all():
            raise ValueError(f"infer_dtype: {name} holds numbers too large for float16; use bfloat16")
        return result.cpu()


def _shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor of the model; nothing is allocated."""
    return {name: tuple(p.shape) for name, p in Decoder(config, device="meta").named_parameters()}


def push(folder: Path, repository: str, token: str | None, api=None) -> str:
    """Upload the folder; a repository that does not exist yet is made, private. Gives its address.

    api: a huggingface_hub.HfApi or what behaves like one.  Raises ValueError with the hub's reason.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    api = HfApi(token=token) if api is None else api
    try:
        url = api.create_repo(repository, private=True, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=str(folder), commit_message="Upload the merged model")
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"export_hub_model_id: {repository} could not be uploaded ({type(error).__name__}: {reason}); the model is "
            f"complete in {folder}. Is hf_hub_token a token that may write there?"
        ) from error
    return str(url)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
