"""Merge adapters into their base model and write a model folder that stands alone (or convert, quantise,
re-shard it).

    python export.py model_name_or_path=BASE adapter_name_or_path=A,B export_dir=out export_size=2
    python export.py model_name_or_path=model.gguf export_dir=out                    # a GGUF file as a folder
    python export.py model_name_or_path=BASE quantization_bit=4 export_dir=out       # in bitsandbytes' layout
    python export.py model_name_or_path=NF4 adapter_name_or_path=A export_merge=loftq export_dir=out
    python export.py model_name_or_path=saves/demo export_dir=out infer_dtype=bfloat16  # a run names its base
    python export.py ... export_gguf_type=Q4_K     # one file for llama.cpp: export_dir/model-Q4_K.gguf
    python export.py ... export_quantization_bit=4 export_quantization_dataset=c4_demo.jsonl    # GPTQ
    python export.py ... export_hub_model_id=owner/name hf_hub_token=...

Tensors go one at a time from the base's files through the merge (conversion/merging.py) into the new shards,
so the model is never held as a whole; only one shard is. A quantised base is dequantised on the way, or put
back into codes (conversion/requantise.py); conversion/quality.py says what that costs.
"""

if __name__ == "__main__":
    from options.errors import begin

    begin("export.py")

import shutil
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch

import quant
from architectures.config import ModelConfig
from checkpoints.hub import ModelOptions
from checkpoints.huggingface import (
    DTYPES,
    checkpoint_dtype,
    copy_generation_config,
    load_config,
    save_tokenizer,
    write_model_json,
)
from checkpoints.safetensors_files import EXPORT_RECORD, read_json, staged, write_json, write_shards
from checkpoints.source import Source, find_source, read_run, scaled_config, value_head_folder
from checkpoints.value_head import VALUE_HEAD
from conversion.gguf import write
from conversion.gptq_calibration import Calibration, CalibrationOptions, read_windows
from conversion.merging import Adapter, Merge
from conversion.quality import REMAINDER, QualityOptions, check_parent, sample, tell_quality
from conversion.requantise import RANK, MergeOptions, Requantiser
from generation.generate import context_limit
from options import config as configuration
from options.atomic import TEMPORARY, alone_in, atomic_file, free_bytes_on
from options.errors import StopRun, UserError, exit_status, fitting, refuse
from options.limits import leaves
from options.option import COMMON, option
from pipeline.sources import HubAccess
from quant import QuantOptions
from quant.linear import Format
from templates import TemplateOptions, get_template
from text.render import ChatTemplate
from text.tokenizer import Tokenizer


@dataclass(frozen=True)
class ExportOptions:
    export_dir: str | None = option(None, "folder for the merged model", COMMON)
    export_size: float = option(5.0, "largest shard in GB (LLaMA-Factory's newer default)")
    export_device: Literal["cpu", "auto"] = option("cpu", "where weights merge; auto: a GPU if there is one")
    export_legacy_format: bool = option(False, "only false: weights are written as safetensors")
    export_gguf_type: Literal["none", "F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_K"] = option(
        "none", "write one GGUF file with weights of this type", COMMON
    )
    export_hub_model_id: str | None = option(None, "also upload to this Hugging Face repository (private)")

    def __post_init__(self):
        if not self.export_dir:
            raise UserError(
                "export_dir: missing; name a folder for the model, for example export_dir=out/merged"
            )
        refuse(not self.export_size > 0, f"export_size: {self.export_size}; expected GB per shard, above 0")
        if self.export_legacy_format:
            raise UserError(
                "export_legacy_format: true would write pytorch_model.bin, a pickle, which can run any code "
                "when it is read; only safetensors are written, which every current runtime reads. Set it to "
                "false"
            )


SECTIONS = [ModelOptions, TemplateOptions, ExportOptions, QuantOptions]
SECTIONS += [MergeOptions, CalibrationOptions, QualityOptions]


def main(argv: list[str]) -> int:
    return exit_status("export.py", lambda: run(argv))


def run(argv: list[str]) -> int:
    config = configuration.load(
        argv,
        SECTIONS,
        program="export.py",
        description=__doc__.splitlines()[0],
        reads_files_of_others=True,  # training files
    )
    model, options = config[ModelOptions], config[ExportOptions]
    source = find_source(model, config[TemplateOptions], config.given)
    for notice in (*config.notices, *source.notices):
        print(f"note: {notice}")
    dtype, codes = DTYPES.get(model.infer_dtype), quant.from_options(config[QuantOptions])
    request = Request(dtype, codes, config[MergeOptions], config[QualityOptions])
    request = replace(request, calibration=calibration(source, options, request, config))
    write_it = export if options.export_gguf_type == "none" else export_gguf
    write_it(source, options, request)
    if options.export_hub_model_id:
        url = push(Path(options.export_dir), options.export_hub_model_id, model.hf_hub_token)
        print(f"uploaded to {url}")
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


@fitting("a shard", "lower export_size, or set export_device=cpu")
def export(source: Source, options: ExportOptions, request: Request) -> None:
    """Write the merged model to options.export_dir: complete, or not at all."""
    target = Path(options.export_dir)
    check_target(target, source)
    config, tokenizer, template = read_small_files(source)
    scores = value_head_folder(source)  # of a reward model
    texts = sample(request.quality, tokenizer, context_limit(config))
    if request.quality.report_parent:
        check_parent(load_config(request.quality.report_parent), config)
    tell_trained_in_codes(source, config, request)
    merge = make_merge(source, config, options, request)
    packing = requantiser(merge, request)
    hf = dict(config.hf) | {"tie_word_embeddings": config.tied_head and not merge.unties}
    with alone_in(target, "export_dir", "export"), staged(target, earlier_files(target)) as folder:
        if request.calibration is not None:
            written, codes = request.dtype or checkpoint_dtype(config), request.calibration.format
            check_space(merge.size_bytes() + request.calibration.working_bytes(written), target)
            request.calibration.write(folder, merge.tensors(source.base), options.export_size)
        elif packing is None:
            check_space(merge.size_bytes(), target)
            written, codes = write_shards(folder, merge.tensors(source.base), options.export_size), None
        else:
            write_shards(folder, packing.tensors(merge.pieces(source.base)), options.export_size)
            written, codes = packing.dtype, packing.format
            if packing.rank:
                packing.save_adapter(folder / REMAINDER, str(target))
        write_model_json(folder, hf, written, codes)
        copy_generation_config(source.base, folder)  # the tokenizer's files are those of one folder alone
        if scores is not None:
            shutil.copyfile(scores / VALUE_HEAD, folder / VALUE_HEAD)
        if template is not None or source.adapters:
            words = () if template is None else template.stop_words(tokenizer.eos_token)
            save_tokenizer(tokenizer, folder, words, None if template is None else template.to_jinja())
        else:
            tokenizer.save(folder)
        files = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
        write_record(folder, source, request, files)
    untied = ", head untied" if merge.unties else ""
    print(f"{_parts(source)} -> {target} ({str(written).removeprefix('torch.')}{untied})")
    if packing is not None:
        print(packing.summary())
        if packing.rank:
            print(f"codes and adapter together: model_name_or_path={target / REMAINDER}")
    if request.calibration is not None:
        print(request.calibration.told())
    tell_quality(request.quality, source, merge, packing, texts, target)


@fitting("a tensor", "set export_device=cpu")
def export_gguf(source: Source, options: ExportOptions, request: Request) -> None:
    """Write the merged model as options.export_dir/model-TYPE.gguf, beside the files of earlier exports.

    Weights are encoded from the fp32 merge (request.dtype: rounded to that before).
    """
    target, kind = Path(options.export_dir), options.export_gguf_type
    check_target(target, source)
    config, tokenizer, template = read_small_files(source)
    merge = make_merge(source, config, options, replace(request, dtype=request.dtype or torch.float32))
    if merge.quantization is not None and not source.adapters:
        raise UserError(f"quantization_bit: export_gguf_type={kind} has codes of its own; drop one of them")
    layout = write.lay_out(config, merge.hf_shapes(), kind, tokenizer, template, source.base.resolve().name)
    for notice in layout.notices:
        print(f"note: {notice}")
    name = f"model-{kind}.gguf"
    with alone_in(target, "export_dir", "export"), atomic_file(target / name) as file:
        check_space(layout.data_bytes, target)
        write.write(file, layout, merge.tensors(source.base))
        if not (target / EXPORT_RECORD).is_file():  # one that is there tells of weights that stay
            write_record(target, source, request, [])
    print(f"{_parts(source)} -> {target / name} ({layout.count_kinds()})")


def _parts(source: Source) -> str:
    return " + ".join(str(path) for path in (source.base, *source.adapters))


def read_small_files(source: Source) -> tuple[ModelConfig, Tokenizer, ChatTemplate | None]:
    """What can be wrong without reading weights. template: what differs from the tokenizer's own, or None."""
    config = scaled_config(source)
    tokenizer = Tokenizer.from_folder(source.tokenizer, source.base)
    if tokenizer.notice:
        print(f"note: {tokenizer.notice}")
    name, system = source.template.template, source.template.default_system
    named = tokenizer.chat_template
    return config, tokenizer, get_template(name, named, system) if name or (named and system) else None


def make_merge(source: Source, config: ModelConfig, options: ExportOptions, request: Request) -> Merge:
    adapters = [Adapter(config, folder) for folder in source.adapters]
    return Merge(config, adapters, request.dtype, device_of(options), in_codes(config, request))


def device_of(options: ExportOptions) -> str:
    return "cuda" if options.export_device == "auto" and torch.cuda.is_available() else "cpu"


def calibration(
    source: Source, options: ExportOptions, request: Request, config: configuration.Config
) -> Calibration | None:
    """What quantises the result by GPTQ, its text already read; None if nothing does."""
    chosen, model = config[CalibrationOptions], config[ModelOptions]
    if chosen.export_quantization_bit is None:
        return None
    if request.way != "dequantise":
        other = "export_merge" if request.merge.export_merge else "quantization_bit"
        raise UserError(f"export_quantization_bit: GPTQ rounds the merged 16-bit weights; drop {other}")
    if options.export_gguf_type != "none":
        raise UserError("export_quantization_bit: a GGUF file has codes of its own; drop export_gguf_type")
    check_target(Path(options.export_dir), source)
    hub = HubAccess(model.hf_hub_token, model.ms_hub_token, model.cache_dir)
    texts = read_windows(chosen, Tokenizer.from_folder(source.tokenizer, source.base), hub)
    return Calibration(chosen, scaled_config(source), texts, device_of(options))


# What it costs


def in_codes(config: ModelConfig, request: Request) -> Format | None:
    """The format into which a 16-bit base goes as it is read; None where it stays or is in codes already."""
    if not config.hf.get("quantization_config"):
        return request.quantization
    if request.quantization is not None and request.way == "dequantise":
        raise UserError("export_merge: dequantise writes 16 bit, the base has codes; drop quantization_bit")
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
        raise UserError(f"export_merge: {request.way} needs a base that is quantised; give quantization_bit")
    rank = request.merge.export_merge_rank
    if rank is None:
        rank = RANK if merge.adapters or request.way == "loftq" else 0
    rounds = request.merge.loftq_iter if request.way == "loftq" else None
    dtype = request.dtype or checkpoint_dtype(merge.config)
    return Requantiser(merge.config, request.quantization, dtype, rank, rounds)


# Folders


def check_target(target: Path, source: Source) -> None:
    """Raises UserError unless the target is new, empty, or an earlier export."""
    used = [source.base, source.tokenizer, *source.adapters]
    if any(target.resolve() == path.resolve() or target.resolve() in path.resolve().parents for path in used):
        raise UserError(f"export_dir: {target} is, or holds, a folder that is read; choose another one")
    refuse(target.exists() and not target.is_dir(), f"export_dir: {target} is a file; name a folder")
    there = target.iterdir() if target.is_dir() else ()
    others = [path for path in there if not path.name.startswith(TEMPORARY)]
    if others and not (target / EXPORT_RECORD).is_file():
        raise UserError(
            f"export_dir: {target} is not empty and no earlier export (it has no {EXPORT_RECORD}); "
            "choose another folder"
        )


def check_space(needed_bytes: int, target: Path) -> None:
    if (free := free_bytes_on(target)) < needed_bytes:
        sizes = f"the model takes {needed_bytes / 1e9:.2f} GB; {free / 1e9:.2f} GB are free"
        raise StopRun(f"export_dir: {target}: {sizes}; make room and run the same command again")


def write_record(folder: Path, source: Source, request: Request, files: list[str]) -> None:
    """Marks the folder as an export: the next one to the same place may replace these `files`, no others."""
    adapters = [str(path) for path in source.adapters]
    record = {"base": str(source.base), "adapters": adapters, "way": request.way, "files": files}
    if request.calibration is not None:
        record["calibration"] = request.calibration.record()
    write_json(folder / EXPORT_RECORD, record)


def earlier_files(target: Path) -> list[str]:
    """The files that the export that lies there wrote, as its record says; nothing that leads out of the
    folder, be it through a link."""
    record = read_json(target / EXPORT_RECORD) if (target / EXPORT_RECORD).is_file() else {}
    files = record.get("files")
    files = files if isinstance(files, list) else []
    names = [name for name in files if isinstance(name, str) and "\0" not in name and not leaves(name)]
    home = target.resolve()
    inside = [name for name in names if (target / name).parent.resolve().is_relative_to(home)]
    return [name for name in inside if (target / name).is_file() or (target / name).is_symlink()]


def push(folder: Path, repository: str, token: str | None, api=None) -> str:
    """Upload the folder; a repository that does not exist yet is made, private. Gives its address.

    api: a huggingface_hub.HfApi or what behaves like one. Raises UserError with the hub's reason.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    api = HfApi(token=token) if api is None else api
    try:
        url = api.create_repo(repository, private=True, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=str(folder), commit_message="Upload a merged model")
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"export_hub_model_id: {repository} could not be uploaded ({type(error).__name__}: {reason}); "
            f"the model is complete in {folder}. Is hf_hub_token a token that may write there?"
        ) from error
    return str(url)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
