"""How many of LLaMA-Factory's own example files are accepted here as they are, and why the others are not.

    python bench/llamafactory_examples.py folder=LLaMA-Factory/examples
    python bench/llamafactory_examples.py folder=... revision=v0.9.5 out=result.json

Each file's options are read with the sections of the program it is for: merge_lora/ by export.py, inference/
by chat.py, all others by train.py. Neither model nor data is looked at, so `accepted` says that no option is
refused. Counted are files of FOLDERS that name a model of text; pictures, video and sound are left out by
name (OTHERS). The first reason stands for all of a file.
"""

import sys
from contextlib import chdir
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import yaml  # noqa: E402

import chat  # noqa: E402
import export  # noqa: E402
from bench.measure import commit, read_options, table  # noqa: E402
from bench.turns import write_report  # noqa: E402
from options import config  # noqa: E402
from options.errors import UserError  # noqa: E402
from training import setup  # noqa: E402

DEFAULTS = {"folder": "", "revision": "", "out": ""}
FOLDERS = ("train_full", "train_lora", "train_qlora", "extras", "inference", "merge_lora", "ascend")
PROGRAMS = {"merge_lora": ("export.py", export.SECTIONS), "inference": ("chat.py", chat.SECTIONS)}
OTHERS = ("vl", "omni", "audio", "video", "llava")  # of a path or of a model's name


def main(argv: list[str]) -> int:
    options = read_options(argv, DEFAULTS, __doc__)
    folder = Path(options["folder"]).resolve()
    files = {str(path.relative_to(folder)): path for path in text_files(folder)} if options["folder"] else {}
    if not files:
        raise SystemExit(f"folder={options['folder']}: no example of LLaMA-Factory there; give its examples/")
    with chdir(folder.parent):  # files name others of the examples from there
        reasons = {name: refusal(name, path) for name, path in files.items()}
    accepted = sum(reason is None for reason in reasons.values())
    print(table([{"file": name, "": reason or "accepted"} for name, reason in reasons.items()]))
    print(f"{accepted} of {len(files)} files are accepted")
    words = [f"folder={folder.name}" if word.startswith("folder=") else word for word in argv]
    report = {"command": " ".join(["python bench/llamafactory_examples.py", *words]), "commit": commit()}
    report |= {"revision": options["revision"], "files": reasons}
    write_report(report | {"accepted": accepted, "total": len(files)}, options["out"])
    return 0


def text_files(folder: Path) -> list[Path]:
    found = []
    for path in sorted(path for name in FOLDERS for path in (folder / name).rglob("*.yaml")):
        model = yaml.safe_load(path.read_text(encoding="utf-8")).get("model_name_or_path")
        about = f"{path.relative_to(folder)} {model}".lower()
        if model and not any(word in about for word in OTHERS):  # without a model: a file for another file
            found.append(path)
    return found


def refusal(name: str, path: Path) -> str | None:
    """The first reason why the program that the file is for would refuse its options."""
    program, sections = PROGRAMS.get(name.split("/")[0], ("train.py", setup.SECTIONS))
    about = {"program": program, "description": "", "reads_files_of_others": program != "train.py"}
    try:
        config.load([str(path)], sections, **about)
    except UserError as error:
        return str(error).splitlines()[0].replace(str(path), path.name)
    return None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
