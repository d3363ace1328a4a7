"""From what the user writes in model_name_or_path to a local folder: a folder, a hub id, or a .gguf file.

Hugging Face's hub through huggingface_hub; ModelScope's with USE_MODELSCOPE_HUB=1 in the environment. Only
files that are read here are fetched: no pickles, no second copy of the weights in another layout. A GGUF file
is converted once into the cache (gguf/read.py). A plan fetches no weights, and of a checkpoint in codes the
first bytes of each file, which say how large its tensors are.
"""

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from checkpoints.safetensors_files import INDEX, SINGLE
from options import json_reader
from options.atomic import room_in
from options.errors import UserError, located, refuse
from options.option import COMMON, RESUMABLE, SECRET, option

WANTED_FILES = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model", "merges.txt"]
WITHOUT_WEIGHTS = [pattern for pattern in WANTED_FILES if "safetensors" not in pattern]
TOKENIZER_ONLY = ["tokenizer*", "special_tokens_map.json", "*.jinja", "*config.json"]
UNWANTED_FILES = ["*/*", "consolidated*"]  # other layouts: original/, onnx/, Mistral's own second copy
TOKEN = (RESUMABLE, SECRET)
FIRST_BYTES = 100_000  # of a file of weights; in most of them the header ends before
MOST_BYTES = 100_000_000  # of a header: safetensors' own limit
HEADER_SECONDS = 10.0  # for each answer of a hub; a server that drips takes no longer either


@dataclass(frozen=True)
class ModelOptions:
    model_name_or_path: str | None = option(
        None,
        "model folder, or a hub id such as Qwen/Qwen2.5-7B",
        COMMON,
        also="model_id_or_path model model_path base_model",
    )
    adapter_name_or_path: tuple[str, ...] = option(
        (),
        "adapter folders; all but the last are merged",
        COMMON,
        also="ckpt_dir checkpoint_dir lora_model_name_or_path lora_weights adapters",
    )
    model_revision: str = option("main", "branch, tag or commit of a hub model", also="revision")
    cache_dir: str | None = option(None, "where hub downloads are kept", RESUMABLE)
    hf_hub_token: str | None = option(None, "token for gated Hugging Face models", *TOKEN, also="hub_token")
    ms_hub_token: str | None = option(None, "token for ModelScope (with USE_MODELSCOPE_HUB=1)", *TOKEN)
    rope_scaling: Literal["none", "linear", "dynamic", "yarn", "llama3"] | None = option(
        None, "stretch the rotary embedding to longer texts"
    )
    flash_attn: Literal["auto", "triton", "sdpa", "disabled", "fa2", "fa3"] = option(
        "auto",
        "attention kernel; auto = on a GPU what measures fastest; without its package fa2 or fa3 is auto",
        RESUMABLE,
        also="attn_impl attn_implementation",
    )
    infer_dtype: Literal["auto", "float32", "bfloat16", "float16"] = option(
        "auto", "dtype for chat and export; auto = the checkpoint's", COMMON, RESUMABLE
    )


def resolve_model(options: ModelOptions, wanted=WANTED_FILES) -> Path:
    """The local folder of `model_name_or_path`.  wanted: files to fetch, if it is on a hub."""
    name = options.model_name_or_path
    refuse(not name, "model_name_or_path: missing; give a model folder or a hub id such as Qwen/Qwen2.5-0.5B")
    return resolve_folder("model_name_or_path", name, options.model_revision, options, wanted)


def resolve_adapters(options: ModelOptions, wanted=WANTED_FILES) -> list[Path]:
    """The local folders of `adapter_name_or_path`; hub ids at their main revision."""
    names = options.adapter_name_or_path
    return [resolve_folder("adapter_name_or_path", name, "main", options, wanted) for name in names]


def resolve_folder(key: str, name: str, revision: str, options: ModelOptions, wanted=WANTED_FILES) -> Path:
    """The local folder of what `key` names: downloaded if it is an id, converted if it is a GGUF file."""
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    if folder.is_file() and folder.suffix == ".gguf" and "adapter" not in key:
        from checkpoints.gguf.read import cached_folder  # takes 0.2 s to import, and few runs need it

        with located(key):
            return cached_folder(folder, options.cache_dir)
    if folder.exists():
        holds = "adapter_config.json" if "adapter" in key else "config.json"
        raise UserError(f"{key}: {name} is a file; give the folder that holds {holds}")
    if name.startswith((".", "/", "~")) or name.count("/") != 1 or name.endswith(("/", ".gguf")):
        raise UserError(f"{key}: no folder {name}, and it is not a hub id (owner/name) either")
    with located(key):
        if os.environ.get("USE_MODELSCOPE_HUB", "0").lower() in ("1", "true"):
            return _download_modelscope(name, revision, options, wanted)
        return _download_hugging_face(name, revision, options, wanted)


def _download_hugging_face(name: str, revision: str, options: ModelOptions, wanted: list[str]) -> Path:
    import huggingface_hub.constants
    from huggingface_hub.errors import GatedRepoError, HFValidationError

    places = {"revision": revision, "cache_dir": options.cache_dir, "token": options.hf_hub_token}
    files = {"allow_patterns": wanted, "ignore_patterns": UNWANTED_FILES}
    cache = Path(options.cache_dir or huggingface_hub.constants.HF_HUB_CACHE)
    try:
        with room_in(cache, "cache_dir"):
            return Path(huggingface_hub.snapshot_download(name, **places, **files))
    except (OSError, HFValidationError) as error:  # every error of the hub or the network
        gated = isinstance(error, GatedRepoError)
        remedy = "it is gated: give hf_hub_token" if gated else "check the spelling and the network"
        raise _not_fetched(name, "the Hugging Face hub", revision, error, f"; {remedy}") from error


def tensor_sizes(folder: Path, token: str | None) -> dict[str, int]:
    """Bytes of every tensor of the checkpoint whose files without weights are in `folder`, a snapshot in the
    cache of Hugging Face's hub, by the name in its files. Raises UserError."""
    home, index = folder.parents[1].name.split("--"), folder / INDEX
    refuse(folder.parent.name != "snapshots" or len(home) != 3, "it is no snapshot of the Hugging Face hub")
    files, sizes = {SINGLE}, {}
    if index.is_file():
        weight_map = json_reader.read(index).get("weight_map")
        refuse(not isinstance(weight_map, dict), f"{index}: key weight_map missing or no map; fetch it again")
        files = set(map(str, weight_map.values()))
    for file in sorted(files):
        place = f"{home[1]}/{home[2]}", file, folder.name
        first = _first_bytes(*place, token, FIRST_BYTES)
        end = 8 + int.from_bytes(first[:8], "little")
        refuse(end > MOST_BYTES, f"{file}: a header of {end:,} bytes is none of safetensors")
        data = first if end <= len(first) else _first_bytes(*place, token, end)
        header = json_reader.parse(data[8:end].decode("utf-8", "replace"), f"{file}: header")
        for name, entry in header.items():
            begin_end = entry.get("data_offsets") if isinstance(entry, dict) else None
            if name != "__metadata__":
                whole = isinstance(begin_end, list) and [type(each) for each in begin_end] == [int, int]
                refuse(not whole, f"{file}: header: {name} has no data_offsets")
                sizes[name] = begin_end[1] - begin_end[0]
    return sizes


def _first_bytes(name: str, file: str, revision: str, token: str | None, size: int) -> bytes:
    """Of a file on the hub; also from a server that knows no ranges no more than these are taken."""
    import http.client
    import urllib.request

    import huggingface_hub.constants
    from huggingface_hub.utils import build_hf_headers

    refuse(huggingface_hub.constants.HF_HUB_OFFLINE, "HF_HUB_OFFLINE is set")
    address = huggingface_hub.hf_hub_url(name, file, revision=revision)
    request = urllib.request.Request(address, headers={"Range": f"bytes=0-{size - 1}"})
    for key, value in build_hf_headers(token=token).items():
        request.add_unredirected_header(key, value)  # the token is for the hub, not for the store behind it
    data, end = b"", time.monotonic() + HEADER_SECONDS
    try:
        with urllib.request.urlopen(request, timeout=HEADER_SECONDS) as answer:
            while len(data) < size and (piece := answer.read1(size - len(data))):
                data += piece
                if time.monotonic() > end:
                    raise TimeoutError(f"not there after {HEADER_SECONDS:g} seconds")
    except (OSError, http.client.HTTPException) as error:
        raise UserError(f"{address}: {error}") from error
    return data


def _download_modelscope(name: str, revision: str, options: ModelOptions, wanted: list[str]) -> Path:
    try:
        from modelscope import snapshot_download
        from modelscope.hub.api import HubApi
    except ImportError as error:
        found = f"USE_MODELSCOPE_HUB is set and {name} is no local folder"
        raise UserError(f"{found}: pip install modelscope") from error
    if options.ms_hub_token:
        HubApi().login(options.ms_hub_token)
    revision = "master" if revision == "main" else revision  # ModelScope's name of the default branch
    try:
        files = {} if wanted == WANTED_FILES else {"allow_file_pattern": wanted}
        places = {"revision": revision, "cache_dir": options.cache_dir}
        return Path(snapshot_download(name, **places, **files))
    except (OSError, ValueError) as error:
        raise _not_fetched(name, "ModelScope", revision, error) from error


def _not_fetched(name: str, hub: str, revision: str, error: Exception, remedy: str = "") -> UserError:
    reason = next((line for line in str(error).splitlines() if line.strip()), "no message")
    missing = f"no folder {name} here, and it could not be fetched from {hub} at revision {revision} "
    return UserError(f"{missing}({type(error).__name__}: {reason}){remedy}")
