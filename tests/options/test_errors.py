"""errors.py: which exit status and which words; a bug keeps its traceback; every section raises UserError."""

import ast
import errno
import inspect
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from tiny_runs import ROOT

import chat
import data
import export
import train
from options.errors import StopRun, UserError, begin, exit_status, fitting, listen_to_ctrl_c, located, refuse
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
        (
            IsADirectoryError(errno.EISDIR, "Is a directory", ".tmp", None, "out/a.json"),
            2,
            "train.py: out/a.json: Is a directory",
        ),
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


def out_of_gpu_memory(count):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0\nMore")


@pytest.mark.parametrize(
    ("take", "size"),
    [
        (torch.empty, " (4503599.63 GB more were asked for)"),  # a RuntimeError
        (np.empty, " (8.00 PiB more were asked for)"),
        (lambda count: bytearray(2**11 * count), ""),
        (out_of_gpu_memory, " (20.00 GiB more were asked for)"),
    ],
    ids=["torch", "numpy", "python", "gpu"],
)
def test_where_memory_runs_out_a_line_says_what_did_not_fit_and_which_key_is_to_lower(capsys, take, size):
    @fitting("a training step", "lower cutoff_len")
    def step():
        take(2**50)

    assert exit_status("train.py", step) == 1
    expected = f"train.py: out of memory: a training step does not fit{size}; lower cutoff_len\n"
    assert capsys.readouterr().err == expected
    assert exit_status("train.py", lambda: take(2**50)) == 1  # where no place of its own says it
    told = f"train.py: out of memory{size}; take a smaller model, batch or text\n"
    assert capsys.readouterr().err == told
    with pytest.raises(RuntimeError, match="of ours"):
        exit_status("train.py", fitting("a step", "lower it")(raises(RuntimeError("of ours"))))


def test_a_program_of_one_process_refuses_torchrun(monkeypatch, capsys):
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert exit_status("export.py", raises(AssertionError())) == 2
    told = "export.py: it works in one process, and torchrun has started 2; start it with python\n"
    assert capsys.readouterr().err == told
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert exit_status("export.py", lambda: 0) == 0


def test_what_is_nested_without_end_is_one_line(capsys):
    def deeper():
        return deeper()

    assert exit_status("train.py", deeper) == 1
    assert capsys.readouterr().err.startswith("train.py: something that was read is nested too deeply")


def test_no_line_steers_the_terminal(capsys):
    """Names and texts of files may hold anything."""
    assert exit_status("chat.py", raises(UserError("a\x1b]0;x\x07\x9b1m\u202eb\tc\nd"))) == 2
    assert capsys.readouterr().err == "chat.py: a\u241b]0;x\u2407\ufffd1m\ufffdb\tc\nd\n"


def test_a_full_output_is_one_line():
    with open("/dev/full", "w") as full:
        run = subprocess.run(
            [sys.executable, "chat.py", "--help"], cwd=ROOT, stdout=full, stderr=subprocess.PIPE
        )
    expected = b"chat.py: the output cannot be written (No space left on device); send it to another place\n"
    assert (run.stderr, run.returncode) == (expected, 1)


def test_ctrl_c_while_a_program_is_imported_is_one_line():
    run = subprocess.Popen(
        [sys.executable, "-v", "train.py", "--help"],
        cwd=ROOT,
        stdout=-1,
        stderr=-1,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # tests in the background ignore it
    )
    for line in run.stderr:  # -v tells of every module
        if "torch/__init__" in line:
            break
    run.send_signal(signal.SIGINT)
    lines = run.stderr.read().splitlines()
    assert run.wait() == 130 and "train.py: interrupted" in lines[-1]
    assert not any(line.startswith("Traceback") for line in lines)


def test_a_python_without_torch_is_told_how_to_get_one(capsys, monkeypatch):
    found = signal.signal(signal.SIGINT, signal.default_int_handler)  # tests in the background ignore it
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SystemExit) as ended:
        begin("train.py")
    listen_to_ctrl_c()
    assert signal.signal(signal.SIGINT, found) is signal.default_int_handler
    told = f"train.py: this Python ({sys.executable}) has no torch; make env && source .venv/bin/activate\n"
    assert (ended.value.code, capsys.readouterr().err) == (2, told)


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
