"""errors.py: which exit status and which words; a bug keeps its traceback; every section raises UserError."""

import ast
import errno
import inspect
import subprocess
import sys

import numpy as np
import pytest
from tiny_runs import ROOT

import chat
import data
import export
import train
from options.errors import StopRun, UserError, exit_status, located, refuse
from pipeline.preview import PreviewOptions
from training import setup


def raises(error):
    def body():
        raise error

    return body


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (UserError("seed: expected a number"), 2, "train.py: seed: expected a number"),
        (StopRun("the loss is not finite"), 1, "train.py: the loss is not finite"),
        (OSError(errno.ENOSPC, "No space left"), 1, "train.py: [Errno 28] No space left; make room and run"),
        (KeyboardInterrupt(), 130, "train.py: interrupted"),
        (
            PermissionError(errno.EACCES, "Permission denied", "a.json"),
            2,
            "train.py: a.json: Permission denied",
        ),
        (NotADirectoryError(errno.ENOTDIR, "Not a directory", "f/x"), 2, "train.py: f/x: Not a directory"),
    ],
)
def test_what_is_told_is_one_line_and_a_status(capsys, monkeypatch, error, status, line):
    monkeypatch.delenv("ANVIL_TRACEBACK", raising=False)
    assert exit_status("train.py", raises(error)) == status
    streams = capsys.readouterr()
    assert streams.out == "" and streams.err.count("\n") == 1 and streams.err.startswith(line)
    monkeypatch.setenv("ANVIL_TRACEBACK", "1")
    with pytest.raises(type(error)):
        exit_status("train.py", raises(error))


def test_what_is_no_mistake_of_the_user_keeps_its_traceback(capsys):
    for body, kind in (
        (lambda: np.stack([]), ValueError),
        (raises(FileNotFoundError("of ours")), OSError),
        (raises(PermissionError(errno.EACCES, "of no path")), OSError),
        (raises(BrokenPipeError("of a worker, while stdout is read")), OSError),
        (raises(KeyError("x")), KeyError),
        (raises(SystemExit(0)), SystemExit),
    ):
        with pytest.raises(kind) as caught:
            exit_status("train.py", body)
        assert not isinstance(caught.value, UserError)
    assert capsys.readouterr().err == ""
    assert exit_status("train.py", lambda: 7) == 7


def test_help_into_a_pipe_that_nobody_reads_any_more_says_nothing():
    run = subprocess.Popen([sys.executable, "chat.py", "--help"], cwd=ROOT, stdout=-1, stderr=-1)
    run.stdout.close()
    assert (run.stderr.read(), run.wait()) == (b"", 0)


@pytest.mark.parametrize("program", ["chat", "export", "data", "train"])
def test_a_bug_in_the_way_of_a_program_keeps_its_traceback(program, monkeypatch, tmp_path):
    """numpy's own ValueError, planted where the program begins to work; and a mistake there is told."""
    place, words = {
        "chat": ("chat.find_source", ["model_name_or_path=x"]),
        "export": ("export.find_source", ["model_name_or_path=x", f"export_dir={tmp_path}"]),
        "data": ("checkpoints.hub.resolve_folder", ["preview", "model_name_or_path=x", "dataset=a"]),
        "train": ("training.setup.read", [f"output_dir={tmp_path}/run", "dataset=a", "device=cpu"]),
    }[program]
    main = {"chat": chat, "export": export, "data": data, "train": train}[program].main
    monkeypatch.setattr(place, lambda *given: np.stack([]))
    with pytest.raises(ValueError, match="need at least one array to stack") as caught:
        main(words)
    assert not isinstance(caught.value, UserError)
    monkeypatch.setattr(place, lambda *given: refuse(True, "template: unknown"))
    assert main(words) == 2


def test_located_names_the_place_of_a_mistake_and_of_nothing_else():
    with pytest.raises(UserError, match=r"^a.yaml: line 3: no number$"), located("a.yaml"):
        refuse(True, "line 3: no number")
    with pytest.raises(ValueError, match="^of ours$"), located("a.yaml"):
        raise ValueError("of ours")
    refuse(False, "nothing")


SECTIONS = dict.fromkeys([*setup.SECTIONS, *chat.SECTIONS, *export.SECTIONS, PreviewOptions])


@pytest.mark.parametrize("section", SECTIONS)
def test_a_section_is_refused_by_user_errors_only(section):
    raised = [node for node in ast.walk(ast.parse(inspect.getsource(section))) if isinstance(node, ast.Raise)]
    assert {ast.unparse(node.exc.func) for node in raised} <= {"UserError"}
