"""Files and folders that are complete or absent: what an error, a kill and another process leave."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from options.atomic import alone_in, atomic_file, atomic_folder, locked, temporary_name
from options.errors import StopRun, UserError

ROOT = Path(__file__).resolve().parents[2]
KILLED = """
import os, sys
from pathlib import Path
from options.atomic import atomic_file, atomic_folder
with atomic_folder(Path(sys.argv[1])) as folder, atomic_file(Path(sys.argv[2])) as file:
    (folder / "half").write_text("half")
    file.write_text("half")
    os._exit(9)
"""


def test_a_file_is_the_old_or_the_new_one(tmp_path):
    path = tmp_path / "a.txt"
    with atomic_file(path) as temporary:
        temporary.write_text("one")
        assert not path.exists()
    with pytest.raises(RuntimeError), atomic_file(path) as temporary:
        temporary.write_text("two")
        raise RuntimeError
    assert path.read_text() == "one" and [each.name for each in tmp_path.iterdir()] == ["a.txt"]


def test_a_folder_is_the_old_or_the_new_one(tmp_path):
    path = tmp_path / "deep" / "a"
    for text in ("one", "two"):
        with atomic_folder(path) as temporary:
            (temporary / text).write_text(text)
    with pytest.raises(RuntimeError), atomic_folder(path) as temporary:
        (temporary / "three").write_text("three")
        raise RuntimeError
    assert [each.name for each in path.iterdir()] == ["two"]
    assert [each.name for each in path.parent.iterdir()] == ["a"]


def test_what_a_killed_process_left_goes_with_the_next_write_and_what_a_living_one_has_stays(tmp_path):
    folder, file = tmp_path / "a", tmp_path / "b"
    killed = subprocess.run([sys.executable, "-c", KILLED, str(folder), str(file)], cwd=ROOT)
    assert killed.returncode == 9 and len(list(tmp_path.iterdir())) == 2
    living = tmp_path / temporary_name(folder).name.replace(f"-{os.getpid()}-", "-1-")
    living.mkdir()
    with atomic_folder(folder):
        pass
    with atomic_file(file) as temporary:
        temporary.write_text("b")
    assert sorted(each.name for each in tmp_path.iterdir()) == sorted([living.name, "a", "b"])


def test_a_cache_that_cannot_be_written_or_is_full_is_told_by_its_key(tmp_path):
    (tmp_path / "file").write_text("")
    unwritable = "cache_dir: .*/file cannot be made or written .*; name another"
    with pytest.raises(UserError, match=unwritable), locked(tmp_path / "file" / "x"):
        pass
    full = "cache_dir: .*/cache: .*No space left; make room"
    with pytest.raises(StopRun, match=full), locked(tmp_path / "cache" / "x"):
        raise OSError(errno.ENOSPC, "No space left")
    with pytest.raises(FileNotFoundError), locked(tmp_path / "cache" / "x"):
        raise FileNotFoundError("of ours")


def test_a_planted_link_is_not_written_through(tmp_path, monkeypatch):
    victim = tmp_path / "victim"
    victim.write_text("precious")
    monkeypatch.setattr("options.atomic.secrets.token_hex", lambda count: "0" * 8)  # as if it were guessed
    monkeypatch.setattr("options.atomic.os.getpid", lambda: 2**22 + 1)
    with monkeypatch.context() as patch:
        patch.setattr("options.atomic.remove", lambda path: None)
        temporary_name(tmp_path / "a").symlink_to(victim)
        with pytest.raises(FileExistsError), atomic_file(tmp_path / "a"):
            pass
    with atomic_file(tmp_path / "a") as temporary:
        temporary.write_text("new")
    assert victim.read_text() == "precious" and (tmp_path / "a").read_text() == "new"


def test_one_process_at_a_time_is_alone_in_a_folder(tmp_path):
    folder, link = tmp_path / "real", tmp_path / "link"
    link.symlink_to(folder)
    with alone_in(link, "output_dir", "training"):
        other = f"output_dir: {folder}: another training is writing into it"
        with pytest.raises(UserError, match=other), alone_in(folder, "output_dir", "training"):
            pass
    assert not folder.exists()
    (tmp_path / "f").write_text("")
    with (
        pytest.raises(UserError, match="is a file; name another folder"),
        alone_in(tmp_path / "f" / "x", "k", "w"),
    ):
        pass
    full = f"output_dir: {folder}: could not be written: .*No space left.* make room .* GB are free"
    with pytest.raises(StopRun, match=full), alone_in(folder, "output_dir", "training"):
        (folder / "file").write_text("stays")
        raise OSError(errno.ENOSPC, "No space left", str(folder / "file"))
    assert folder.exists()
    with pytest.raises(OSError), alone_in(folder, "output_dir", "training"):
        raise OSError(errno.ENOSPC, "No space left", "/elsewhere/file")
