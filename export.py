"""Merge adapters into their base model and write a model folder that stands alone (or convert, quantise,
re-shard it).

    python export.py model_name_or_path=BASE adapter_name_or_path=A,B export_dir=out export_size=2
    python export.py model_name_or_path=BASE quantization_bit=4 export_dir=out       # in bitsandbytes' layout
    python export.py model_name_or_path=NF4 adapter_name_or_path=A export_merge=loftq export_dir=out
    python export.py model_name_or_path=saves/demo export_dir=out infer_dtype=bfloat16     # a run folder names its base
    python export.py ... export_gguf_type=Q4_K                  # one file for llama.cpp: export_dir/model-Q4_K.gguf
    python export.py ... export_quantization_bit=4 export_quantization_dataset=c4_demo.jsonl     # GPTQ (calibrate.py)
    python export.py ... export_hub_model_id=owner/name hf_hub_token=...

Tensors go one at a time from the base's files through the merge (merging.py) into the new shards, so the
model is never held as a whole; only one shard is. A quantised base is dequantised on the way, or put back
into codes (requantise.py); quality.py says what that costs.
"""

import json
import os
import shutil
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

import quant
from architectures.config import ModelConfig
from checkpoints.hub import ModelOptions
from checkpoints.huggingface import (
    DTYPES,
    checkpoint_dtype,
    copy_side_files,
    load_config,
    load_model,
    write_model_json,
)
from checkpoints.peft import load_adapter
from checkpoints.safetensors_files import weight_files, write_json, write_shards
from checkpoints.source import (
    EXPORT_RECORD,
    Source,
    check_tokenizer,
    find_source,
    read_run,
    scaled_config,
    value_head_folder,
)
from checkpoints.value_head import VALUE_HEAD
from conversion.gguf import write
from conversion.gptq_calibration import Calibration, CalibrationOptions, read_windows
from conversion.merging import Adapter, Merge
from conversion.quality import WINDOW, QualityOptions, check_parent, mean_loss, measure, windows
from conversion.requantise import RANK, MergeOptions, Requantiser
from generation.generate import context_limit
from lora import replace_module
from model import Decoder
from options import config as configuration
from options.option import COMMON, option
from pipeline.sources import HubAccess
from quant import Format, QuantOptions
from templates import TemplateOptions, get_template
from text.render import ChatTemplate
from text.tokenizer import Tokenizer
from training import setup

REMAINDER = "adapter"  # folder inside the export: what its codes cannot hold, an adapter in PEFT's format


@dataclass(frozen=True)
class ExportOptions:
    export_dir: str | None = option(None, "folder for the merged model", COMMON)
    export_size: float = option(5.0, "largest shard in GB (LLaMA-Factory's newer default)")
    export_device: Literal["cpu", "auto"] = option(
        "cpu", "where weights are merged; auto = a GPU if there is one"
    )
    export_legacy_format: bool = option(False, "only false: weights are written as safetensors")
    export_gguf_type: Literal["none", "F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_K"] = option(
        "none", "write one GGUF file with weights of this type", COMMON
    )
    export_hub_model_id: str | None = option(
        None, "also upload to this Hugging Face repository (made private)"
    )

    def __post_init__(self):
        if not self.export_dir:
            raise ValueError(
                "export_dir: missing; name a folder for the model, for example export_dir=out/merged"
            )
        if not self.export_size > 0:
            raise ValueError(f"export_size: {self.export_size}; expected GB per shard, above 0")
        if self.export_legacy_format:
            raise ValueError(
                "export_legacy_format: true would write pytorch_model.bin, a pickle, which can run any code "
                "when it is read; only safetensors are written, which every current runtime reads. Set it to "
                "false"
            )


SECTIONS = [
    ModelOptions,
    TemplateOptions,
    ExportOptions,
    QuantOptions,
    MergeOptions,
    CalibrationOptions,
    QualityOptions,
]


def main(argv: list[str]) -> int:
    try:
        config = configuration.load(
            argv,
            SECTIONS,
            program="export.py",
            description=__doc__.splitlines()[0],
            # training files can be read too
            other_sections=setup.SECTIONS,
        )
        for notice in config.notices:
            print(f"note: {notice}")
        given = {key for key, origin in config.origins.items() if origin != "default"}
        source = find_source(config[ModelOptions], config[TemplateOptions], given)
        for notice in source.notices:
            print(f"note: {notice}")
        options = config[ExportOptions]
        request = Request(
            DTYPES.get(config[ModelOptions].infer_dtype),
            quant.from_options(config[QuantOptions]),
            config[MergeOptions],
            config[QualityOptions],
        )
        request = replace(request, calibration=calibration(source, options, request, config))
        write = export if options.export_gguf_type == "none" else export_gguf
        write(source, options, request)
        if options.export_hub_model_id:
            url = push(
                Path(options.export_dir), options.export_hub_model_id, config[ModelOptions].hf_hub_token
            )
            print(f"uploaded to {url}")
    except (ValueError, OSError) as error:
        if os.environ.get("ANVIL_TRACEBACK"):
            raise
        print(f"export.py: {error}", file=sys.stderr)
        return 2
    return 0


@dataclass(frozen=True)
class Request:
    """What is asked of the result."""

    dtype: torch.dtype | None = None  # None = each tensor's own
    quantization: Format | None = None  # of linears; None = as the base
    merge: MergeOptions = MergeOptions()
    quality: QualityOptions = QualityOptions()
    calibration: Calibration | None = None  # what quantises the 16-bit result by GPTQ

    @property
    def way(self) -> str:
        return self.merge.export_merge or ("dequantise" if self.quantization is None else "requantise")


def export(source: Source, options: ExportOptions, request: Request) -> None:
    """Write the merged model to options.export_dir: complete, or not at all.

    Raises ValueError for what does not fit together, OSError when the disk is full.
    """
    target = Path(options.export_dir)
    check_target(target, source)
    config, tokenizer, template = read_small_files(source)
    scores = value_head_folder(source)  # of a reward model
    texts = sample(request.quality, tokenizer, config)
    if request.quality.report_parent:
        check_parent(load_config(request.quality.report_parent), config)
    tell_trained_in_codes(source, config, request)
    merge = make_merge(source, config, options, request)
    packing = requantiser(merge, request)
    temporary = target.parent / f".{target.name}.unfinished"
    shutil.rmtree(temporary, ignore_errors=True)  # of an export that was killed
    temporary.mkdir(parents=True)
    try:
        hf = dict(config.hf) | {"tie_word_embeddings": config.tied_head and not merge.unties}
        if request.calibration is not None:
            written = request.dtype or checkpoint_dtype(config)
            check_space(merge.size_bytes() + request.calibration.working_bytes(written), target)
            request.calibration.write(temporary, merge.tensors(source.base), options.export_size)
            write_model_json(temporary, hf, written, request.calibration.format)
        elif packing is None:
            check_space(merge.size_bytes(), target)
            written = write_shards(temporary, merge.tensors(source.base), options.export_size)
            write_model_json(temporary, hf, written)
        else:
            write_shards(temporary, packing.tensors(merge.pieces(source.base)), options.export_size)
            written = packing.dtype
            write_model_json(temporary, hf, written, packing.format)
            if packing.rank:
                packing.save_adapter(temporary / REMAINDER, str(target))
        copy_side_files(source.base, temporary)
        if scores is not None:
            shutil.copyfile(scores / VALUE_HEAD, temporary / VALUE_HEAD)
        tokenizer.save(temporary, template.to_jinja() if template is not None else None)
        write_record(temporary, source, request)
        _put_in_place(temporary, target)
    except OSError as error:
        raise OSError(_not_written(target, error)) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    parts = " + ".join(str(path) for path in (source.base, *source.adapters))
    print(
        f"{parts} -> {target} "
        f"({str(written).removeprefix('torch.')}{', head untied' if merge.unties else ''})"
    )
    if packing is not None:
        print(packing.summary())
        if packing.rank:
            print(f"codes and adapter together: model_name_or_path={target / REMAINDER}")
    if request.calibration is not None:
        print(request.calibration.told())
    tell_quality(source, merge, packing, request, texts, target)


def export_gguf(source: Source, options: ExportOptions, request: Request) -> None:
    """Write the merged model as options.export_dir/model-TYPE.gguf, beside the files of earlier exports.

    Weights are encoded from the fp32 merge (request.dtype: rounded to that before). Raises as `export`.
    """
    target, kind = Path(options.export_dir), options.export_gguf_type
    check_target(target, source)
    config, tokenizer, template = read_small_files(source)
    merge = make_merge(source, config, options, replace(request, dtype=request.dtype or torch.float32))
    if merge.quantization is not None and not source.adapters:
        raise ValueError(
            f"quantization_bit: export_gguf_type={kind} has codes of its own; drop one of the two"
        )
    layout = write.lay_out(config, merge.hf_shapes(), kind, tokenizer, template, source.base.resolve().name)
    for notice in layout.notices:
        print(f"note: {notice}")
    name = f"model-{kind}.gguf"
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = target.parent / f".{target.name}-{name}.unfinished"  # one that was killed is written over
    try:
        check_space(layout.data_bytes, target)
        write.write(unfinished, layout, merge.tensors(source.base))
        target.mkdir(exist_ok=True)
        write_record(target, source, request)
        unfinished.replace(target / name)
    except OSError as error:
        raise OSError(_not_written(target, error)) from error
    finally:
        unfinished.unlink(missing_ok=True)
    parts = " + ".join(str(path) for path in (source.base, *source.adapters))
    print(f"{parts} -> {target / name} ({layout.count_kinds()})")


def read_small_files(source: Source) -> tuple[ModelConfig, Tokenizer, ChatTemplate | None]:
    """What can be wrong without reading weights. The template is the one asked for; None = the tokenizer's
    own."""
    config = scaled_config(source)
    tokenizer = Tokenizer.from_folder(source.tokenizer)
    check_tokenizer(tokenizer, config, source)
    chosen = source.template
    return (
        config,
        tokenizer,
        get_template(chosen.template, None, chosen.default_system) if chosen.template else None,
    )


def make_merge(source: Source, config: ModelConfig, options: ExportOptions, request: Request) -> Merge:
    adapters = [Adapter(config, folder) for folder in source.adapters]
    return Merge(config, adapters, request.dtype, device_of(options), in_codes(config, request))


def device_of(options: ExportOptions) -> str:
    return "cuda" if options.export_device == "auto" and torch.cuda.is_available() else "cpu"


def calibration(
    source: Source, options: ExportOptions, request: Request, config: configuration.Config
) -> Calibration | None:
    """What quantises the result by GPTQ, its text already read; None if nothing does. Raises ValueError."""
    chosen, model = config[CalibrationOptions], config[ModelOptions]
    if chosen.export_quantization_bit is None:
        return None
    if request.way != "dequantise":
        other = "export_merge" if request.merge.export_merge else "quantization_bit"
        raise ValueError(f"export_quantization_bit: GPTQ rounds the merged 16-bit weights; drop {other}")
    if options.export_gguf_type != "none":
        raise ValueError("export_quantization_bit: a GGUF file has codes of its own; drop export_gguf_type")
    check_target(Path(options.export_dir), source)
    hub = HubAccess(model.hf_hub_token, model.ms_hub_token, model.cache_dir)
    texts = read_windows(chosen, Tokenizer.from_folder(source.tokenizer), hub)
    return Calibration(chosen, scaled_config(source), texts, device_of(options))


# What it costs


def in_codes(config: ModelConfig, request: Request) -> Format | None:
    """The format into which a 16-bit base goes as it is read; None where it stays or is in codes already."""
    if not config.hf.get("quantization_config"):
        return request.quantization
    if request.quantization is not None and request.way == "dequantise":
        raise ValueError(
            "export_merge: dequantise writes 16 bit, and the base is quantised; drop quantization_bit"
        )
    return None


def tell_trained_in_codes(source: Source, config: ModelConfig, request: Request) -> None:
    """A line for adapters that were trained on another base than they are merged into."""
    if request.quantization is not None or config.hf.get("quantization_config"):
        return
    for folder in source.adapters:
        bits = read_run(folder).get("quantization_bit")
        if bits in (4, 8):
            print(
                f"note: {folder} was trained on the base in {bits} bits and is merged into its 16-bit "
                f"weights here; quantization_bit={bits} merges it into what it was trained on "
                "(export_merge=dequantise: in 16 bit)"
            )


def requantiser(merge: Merge, request: Request) -> Requantiser | None:
    """What puts the merged weights into codes; None where they stay in 16 bit."""
    if request.way == "dequantise":
        return None
    if request.quantization is None and not merge.config.hf.get("quantization_config"):
        raise ValueError(f"export_merge: {request.way} needs a base that is quantised; give quantization_bit")
    rank = request.merge.export_merge_rank
    if rank is None:
        rank = RANK if merge.adapters or request.way == "loftq" else 0
    rounds = request.merge.loftq_iter if request.way == "loftq" else None
    dtype = request.dtype or checkpoint_dtype(merge.config)
    return Requantiser(merge.config, request.quantization, dtype, rank, rounds)


def sample(options: QualityOptions, tokenizer: Tokenizer, config: ModelConfig) -> list[Tensor] | None:
    if not options.export_sample_text:
        return None
    length = min(WINDOW, context_limit(config))
    return windows(tokenizer, options.export_sample_text, length, options.export_sample_tokens)


def tell_quality(
    source: Source,
    merge: Merge,
    packing: Requantiser | None,
    request: Request,
    texts: list[Tensor] | None,
    target: Path,
) -> None:
    """Print the losses on the sample and the report, measured on the files that were written; both to
    quality.json."""
    if texts is None:
        if packing is not None and source.adapters:
            print("note: export_sample_text=FILE would measure what this does to the loss on a text")
        return
    found = {}
    if packing is not None:
        found["losses"] = losses(source, merge, packing, texts, target)
        count = f"{sum(map(len, texts)):,} tokens of {request.quality.export_sample_text}"
        print(
            f"loss on {count}: " + ", ".join(f"{name} {value:.5f}" for name, value in found["losses"].items())
        )
    if request.quality.report:
        parent = request.quality.report_parent
        exact = Merge(merge.config, merge.adapters, torch.float32, merge.device)
        before = load_model(parent, torch.float32, merge.device) if parent else exact.model(source.base)
        child = load_written(target, merge.device)
        files = [*weight_files(target), *target.glob(f"{REMAINDER}/*.safetensors")]
        report = measure(before, child, texts, sum(path.stat().st_size for path in files))
        print(*report.lines(), sep="\n")
        found["report"] = report.as_dict()
    write_json(target / "quality.json", found)


def losses(
    source: Source, merge: Merge, packing: Requantiser, texts: list[Tensor], target: Path
) -> dict[str, float]:
    """Nats a token, in fp32: of what was to be kept, of its nearest codes alone, and of what was written."""
    name = "base + adapter" if merge.adapters else "16 bit"
    model = Merge(merge.config, merge.adapters, torch.float32, merge.device, merge.quantization).model(
        source.base
    )
    found = {name: mean_loss(model, texts)}
    for module in packing.fits:
        linear = model.get_submodule(module)
        replace_module(
            model, module, packing.format.quantise(linear.weight.detach(), linear.bias, torch.float32)
        )
    found["quantised alone"] = mean_loss(model, texts)
    del model
    if packing.rank:
        found[f"with rank {packing.rank} beside it"] = mean_loss(load_written(target, merge.device), texts)
    return found


def load_written(target: Path, device: str) -> Decoder:
    """The exported model as a user has it, its adapter unmerged beside the codes, computing in fp32."""
    model = load_model(target, torch.float32, device)
    if (target / REMAINDER).is_dir():
        load_adapter(model, target / REMAINDER, checkpoint_dtype(model.config))
    return model.eval()


# Folders


def check_target(target: Path, source: Source) -> None:
    """Raises ValueError unless the target is new, empty, or an earlier export."""
    used = [source.base, source.tokenizer, *source.adapters]
    if any(target.resolve() == path.resolve() or target.resolve() in path.resolve().parents for path in used):
        raise ValueError(f"export_dir: {target} is, or holds, a folder that is read; choose another one")
    if target.exists() and not target.is_dir():
        raise ValueError(f"export_dir: {target} is a file; name a folder")
    if target.is_dir() and any(target.iterdir()) and not (target / EXPORT_RECORD).is_file():
        raise ValueError(
            f"export_dir: {target} is not empty and no earlier export (it has no {EXPORT_RECORD}); choose "
            "another folder"
        )


def check_space(needed_bytes: int, target: Path) -> None:
    free = shutil.disk_usage(target.parent).free
    if free < needed_bytes:
        raise OSError(f"the model takes {needed_bytes / 1e9:.2f} GB")


def write_record(folder: Path, source: Source, request: Request) -> None:
    record = {
        "base": str(source.base),
        "adapters": [str(path) for path in source.adapters],
        "way": request.way,
    }
    if request.calibration is not None:
        record["calibration"] = request.calibration.record()
    (folder / EXPORT_RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def _not_written(target: Path, error: OSError) -> str:
    free = shutil.disk_usage(target.parent).free / 1e9
    return f"export_dir: {target} could not be written ({error}; {free:.2f} GB are free). Nothing half-written is left"


def _put_in_place(temporary: Path, target: Path) -> None:
    old = target.parent / f".{target.name}.replaced"
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.rename(old)
    temporary.rename(target)
    shutil.rmtree(old, ignore_errors=True)


def push(folder: Path, repository: str, token: str | None, api=None) -> str:
    """Upload the folder; a repository that does not exist yet is made, private. Gives its address.

    api: a huggingface_hub.HfApi or what behaves like one. Raises ValueError with the hub's reason.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    api = HfApi(token=token) if api is None else api
    try:
        url = api.create_repo(repository, private=True, exist_ok=True)
        api.upload_folder(
            repo_id=repository, folder_path=str(folder), commit_message="Upload the merged model"
        )
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"export_hub_model_id: {repository} could not be uploaded ({type(error).__name__}: {reason}); "
            f"the model is complete in {folder}. Is hf_hub_token a token that may write there?"
        ) from error
    return str(url)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
