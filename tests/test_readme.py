"""The README's commands and snippets run as written (shortened by overrides at the end of the line)."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import chat
import data
import export
import train
from options import config
from pipeline.preview import PreviewOptions
from templates import TemplateOptions
from text.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "models" / "SmolLM2-135M-Instruct"
README = (ROOT / "README.md").read_text(encoding="utf-8")

# what keeps a real command to seconds: options that the README's reader would not need
SHORTER = {
    "train.py": ["max_steps=1", "max_samples=12", "cutoff_len=64", "evaluation_strategy=no", "val_size=0"],
    "chat.py": ["max_new_tokens=3"],
    "export.py": ["export_sample_tokens=48"],
}

needs_model = pytest.mark.skipif(
    not MODEL.is_dir(), reason="the demonstration model is not here; make test fetches it"
)


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def commands() -> list[str]:
    return [line for block in blocks("bash") for line in block.splitlines() if line.strip()]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder that looks like the repository, so that the commands' outputs land beside nobody's work."""
    folder = tmp_path_factory.mktemp("readme")
    for path in ROOT.iterdir():
        if path.suffix == ".py" or path.name in ("configs", "data") or (path / "__init__.py").is_file():
            (folder / path.name).symlink_to(path)
    (folder / "models").mkdir()
    (folder / "models" / MODEL.name).symlink_to(MODEL)
    return folder


@needs_model
def test_every_command_of_the_readme_runs_in_order(workplace):
    assert len(commands()) >= 4
    for line in commands():
        words = shlex.split(line, comments=True)
        assert words[0] in ("python", "torchrun"), f"the test runs python and torchrun only: {line}"
        program = next(word for word in words if word.endswith(".py"))
        more = SHORTER.get(program, []) if "export_sample_text" in line or program != "export.py" else []
        start = ["-m", "torch.distributed.run"] if words[0] == "torchrun" else []
        environment = os.environ | {"OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(workplace / "cache")}
        done = subprocess.run(
            [sys.executable, *start, *words[1:], *more],
            cwd=workplace,
            env=environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, f"{line}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"


@needs_model
def test_the_python_snippet_gives_hidden_states_and_logits(workplace, monkeypatch):
    monkeypatch.chdir(workplace)
    (snippet,) = blocks("python")
    names: dict = {}
    exec(compile(snippet, "README.md", "exec"), names)
    count = len(names["tokens"])
    assert names["hidden"].shape == (count, 576) and names["logits"].shape == (count, 49152)
    tokenizer = Tokenizer.from_folder(f"models/{MODEL.name}")
    assert tokenizer.decode([names["logits"][-1].argmax().item()]) == " Paris"


def test_the_options_of_the_page_on_your_own_data_are_accepted(monkeypatch):
    """Its commands are the README's on a file that is not here; only the words are looked at."""
    monkeypatch.chdir(ROOT)
    page = (ROOT / "docs" / "your_own_data.md").read_text(encoding="utf-8")
    programs = {"train.py": train.SECTIONS, "chat.py": chat.SECTIONS, "export.py": export.SECTIONS}
    programs["data.py"] = [PreviewOptions, data.DataOptions, TemplateOptions]
    lines = "".join(re.findall(r"```bash\n(.*?)```", page, flags=re.DOTALL)).splitlines()
    assert {line.split()[1] for line in lines} == programs.keys()
    for line in lines:
        _, program, *given = shlex.split(line)
        about = {"program": program, "description": "", "reads_files_of_others": program != "train.py"}
        config.load([word for word in given if word != "preview"], programs[program], **about)


@needs_model
def test_the_rows_of_the_page_on_your_own_data_are_all_learnt(monkeypatch, tmp_path, capsys):
    """Its preview of each of the files that it shows, as it is written there."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    page = (ROOT / "docs" / "your_own_data.md").read_text(encoding="utf-8")
    files = [text for text in re.findall(r"```json\n(.*?)```", page, flags=re.DOTALL) if text.count("\n{")]
    assert len(files) == 2
    for number, text in enumerate(files):
        path = tmp_path / f"{number}.jsonl"
        path.write_text(text, encoding="utf-8")
        assert data.main(["preview", "configs/sft_lora.yaml", f"dataset={path}"]) == 0
        row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith(str(path)))
        count = len(text.splitlines())
        assert [int(value) for value in row.split()[1:4]] == [count, count, 0]  # rows, used, dropped


def test_files_that_the_readme_names_exist():
    for name in set(re.findall(r"`([a-z_]+\.py|[a-z]+/[a-z_./]*)`", README)):
        if name != "__init__.py" and not name.startswith(("saves/", "models/", "output_dir/")):
            assert (ROOT / name).exists(), name
