"""limits.py: what others wrote ends in time and memory, wherever it is run; and the least of the limits of
memory counts."""

import multiprocessing
import os
import resource
import signal
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor

import pytest
import tokenizers

from checkpoints.peft import _by_pattern
from checkpoints.source import merged_into, read_run
from conversion.quality import windows
from options import json_reader, limits
from options.config import read_values
from options.errors import UserError
from options.limits import bounded, free_host_bytes, leaves
from pipeline.sources import read_dataset_info
from text.jinja_template import JinjaTemplate
from text.render import Message
from text.tokenizer import Tokenizer

DIALOGUE = [Message("user", "Hello"), Message("assistant", "Hello")]
LOOP = "{% for a in range(99999) %}{% for b in range(99999) %}{% set c = a * b %}{% endfor %}{% endfor %}"
GROW = "{{% set n = namespace(s={}) %}}{{% for i in range(60) %}}{{% set n.s = n.s {} n.s %}}{{% endfor %}}"


@pytest.fixture
def soon(monkeypatch):
    monkeypatch.setattr(limits, "SECONDS", 0.3)
    monkeypatch.setattr(limits, "BYTES", 2**26)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (LOOP, "takes more than 0.3 seconds; choose a built-in one"),
        ("{{ 'x' * 10**10 }}", "takes more than 0.0625 GiB of memory"),
        ("{{ 'x' | center(10**10) }}", "takes more than 0.0625 GiB of memory"),
        (GROW.format("'xy'", "~"), "GiB"),
        (GROW.format("[1]", "+"), "GiB"),
        ("{{ '%1000000000d' % 1 }}", "GiB of memory"),
        ("{{ 7 ** 7 ** 7777 }}", "refuses a dialogue"),
        (GROW.format("3", "*"), "bits"),
        ("{{ 5 | round(-10**10) }}", "bits"),
        ("{{ ('f' * 9999999) | int(base=16) // 7 }}", "bits"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "refuses a dialogue"),
        ("{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}", "is not valid jinja"),
        ("{% for m in messages %}" * 30 + "{% endfor %}" * 30, "is not valid jinja"),
    ],
)
def test_a_template_ends_in_time_and_memory(soon, source, message):
    started = time.monotonic()
    before = resource.getrlimit(resource.RLIMIT_AS)
    with pytest.raises(UserError, match=message):
        JinjaTemplate(source).render(DIALOGUE, "<s>", "</s>")
    assert time.monotonic() - started < 30 and resource.getrlimit(resource.RLIMIT_AS) == before
    assert JinjaTemplate("{{ 'x' * 3 }}{{ 2 ** 5 }}").render([], "<s>", "</s>")[0].text == "xxx32"


def test_a_template_is_bounded_wherever_it_is_asked(soon):
    for ask in (lambda t: t.stop_words("</s>"), lambda t: t.content("x")):
        with pytest.raises(UserError, match="takes more than 0.3 seconds"):
            ask(JinjaTemplate(LOOP))


@bounded("outer", "x")
def outer():
    inner()


@bounded("inner", "x")
def inner():
    while True:
        pass


@bounded("a process", "mend it")
def in_a_process(ends: bool) -> int:
    if ends:
        os._exit(3)
    return os.getpid()


def test_only_the_outer_bound_counts(soon):
    with pytest.raises(UserError, match="^outer takes"):
        outer()


def in_a_thread(function, *arguments):
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function, *arguments).result()


def test_what_a_thread_asks_for_is_bounded_too(soon, monkeypatch):
    forked = ProcessPoolExecutor(1, multiprocessing.get_context("fork"), limits.serve_parent)  # has `soon`
    monkeypatch.setattr(limits, "_beside", lambda: forked)
    with forked:
        for source, message in (
            (LOOP, "0.3 seconds"),
            ("{{ 'x' * 10**10 }}", "GiB"),
            ("{{ 1 / 0 }}", "zero"),
        ):
            with pytest.raises(UserError, match=message):
                in_a_thread(JinjaTemplate(source).render, DIALOGUE, "<s>", "</s>")


def test_a_thread_asks_one_process_beside_this_one():
    """A pattern holds every thread up, and a limit of memory is every thread's."""
    limits._beside.cache_clear()
    before = resource.getrlimit(resource.RLIMIT_AS), signal.getsignal(signal.SIGVTALRM)
    template = JinjaTemplate("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}")
    ask = template.render, DIALOGUE, "", ""
    assert in_a_thread(*ask) == template.render(DIALOGUE, "", "")
    one, other = (in_a_thread(in_a_process, False) for _ in range(2))
    assert one == other != os.getpid()
    assert (resource.getrlimit(resource.RLIMIT_AS), signal.getsignal(signal.SIGVTALRM)) == before
    with pytest.raises(UserError, match="^a process has ended the process that runs it; mend it"):
        in_a_thread(in_a_process, True)
    limits._beside.cache_clear()


def test_a_pattern_of_an_adapter_ends_in_time(soon):
    config = {"lora_alpha": 8, "alpha_pattern": {"(a+)+x": 3}}
    with pytest.raises(UserError, match="a pattern of .* takes more than 0.3 seconds"):
        _by_pattern(config, "alpha_pattern", "lora_alpha", "layers.0." + "a" * 60)


def test_records_of_exports_that_name_each_other_end(tmp_path):
    for name, other in (("a", "b"), ("b", "a"), ("c", "c")):
        (tmp_path / name).mkdir()
        record = f'{{"base": "{tmp_path / other}", "adapters": ["of {name}"]}}'
        (tmp_path / name / "export_info.json").write_text(record)
    assert merged_into(tmp_path / "a") == ["of a", "of b"] and merged_into(tmp_path / "c") == ["of c"]
    (tmp_path / "a" / "export_info.json").write_text('{"adapters": [3]}')
    with pytest.raises(UserError, match="adapters is .3., expected a list of names"):
        merged_into(tmp_path / "a")


def read_template(path):
    (path.parent / "tokenizer.json").write_text(tokenizers.Tokenizer(tokenizers.models.BPE()).to_str())
    return Tokenizer.from_folder(path.parent)


@pytest.mark.parametrize(
    ("name", "read"),
    [
        ("a.json", json_reader.read),
        ("config.json", lambda path: Tokenizer.from_folder(path.parent)),
        ("run.yaml", read_values),
        ("tokenizer.json", lambda path: Tokenizer.from_folder(path.parent)),
        ("chat_template.jinja", read_template),
        ("sample.txt", lambda path: windows(None, path)),
        ("dataset_info.json", lambda path: read_dataset_info(path.parent)),
    ],
)
def test_a_file_that_is_read_as_a_whole_is_small_and_ends(tmp_path, name, read):
    with open(tmp_path / name, "wb") as file:
        file.truncate(2**40)  # without a byte on the disk
    if name == "config.json":
        (tmp_path / "tokenizer.json").write_text(tokenizers.Tokenizer(tokenizers.models.BPE()).to_str())
    with pytest.raises(UserError, match=f"{name}: more than .* MiB"):
        read(tmp_path / name)
    if name in ("a.json", "sample.txt"):  # whoever reads the others takes it for a file that is not there
        (tmp_path / name).unlink()
        os.mkfifo(tmp_path / name)
        with pytest.raises(UserError, match=f"{name}: a pipe or a device, expected a file"):
            read(tmp_path / name)


def test_a_number_of_thousands_of_digits_in_a_run(tmp_path):
    (tmp_path / "run_config.yaml").write_text(f"cutoff_len: {'9' * 5000}")
    with pytest.raises(UserError, match="run_config.yaml: cutoff_len is '9999.*remove it"):
        read_run(tmp_path)


def test_a_record_of_gigabytes_is_not_read(tmp_path):
    with open(tmp_path / "export_info.json", "wb") as file:
        file.truncate(2**40)  # without a byte on the disk
    with pytest.raises(UserError, match="export_info.json: more than 256 MiB"):
        merged_into(tmp_path)


@pytest.mark.parametrize(
    "text",
    [
        "a: &a [x, x]\n"
        + "".join(f"b{i}: &b{i} [{', '.join(['*a'] * 200)}]\n" for i in range(1))
        + f"c: &c [{', '.join(['*b0'] * 200)}]\n",
        "a: &a {k: v}\nb: &b {<<: [*a, *a]}\nc: {<<: [*b, *b]}\nd: &d [*d]\n",
        "a: " + "[" * 3000 + "]" * 3000,
    ],
    ids=["aliases", "merged", "deep"],
)
def test_a_configuration_does_not_grow_in_memory(tmp_path, text):
    (tmp_path / "run_config.yaml").write_text(text)
    with pytest.raises(UserError, match="run_config.yaml.*; remove it"):
        read_run(tmp_path)


def test_paths_that_leave_a_folder():
    inside, outside = ("a", "a/b", "a/../b", "..a"), ("..", "../a", "/a", "a/../../b", "file:///a", "s3://a")
    assert not any(map(leaves, inside)) and all(map(leaves, outside))


def test_free_memory_is_the_least_that_machine_group_and_process_leave(tmp_path, monkeypatch):
    def write(name: str, text: str) -> None:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)

    write("proc/meminfo", "MemTotal: 90000000 kB\nMemAvailable: 8000000 kB\n")
    write("proc/self/status", "Name:\tpython\nVmSize:\t 1000000 kB\nVmData:\t 500000 kB\n")
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (resource.RLIM_INFINITY,) * 2)
    assert free_host_bytes(tmp_path) == 8_000_000 * 1024
    write("proc/self/cgroup", "0::/user/job\n")
    write("sys/fs/cgroup/user/job/memory.max", "max\n")
    write("sys/fs/cgroup/user/memory.max", "6000000000\n")
    write("sys/fs/cgroup/user/memory.current", "5000000000\n")
    write("sys/fs/cgroup/user/memory.stat", "anon 1\ninactive_file 300000000\nactive_file 200000000\n")
    assert free_host_bytes(tmp_path) == 1_500_000_000
    write("proc/self/cgroup", "5:cpu:/x\n4:memory:/job\n")  # version 1
    write("sys/fs/cgroup/memory/job/memory.limit_in_bytes", "700000000\n")
    write("sys/fs/cgroup/memory/job/memory.usage_in_bytes", "500000000\n")
    write("sys/fs/cgroup/memory/job/memory.stat", "cache 1\n")
    assert free_host_bytes(tmp_path) == 200_000_000
    limits_of = {resource.RLIMIT_AS: 1_100_000 * 1024, resource.RLIMIT_DATA: 510_000 * 1024}
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (limits_of[kind], limits_of[kind]))
    assert free_host_bytes(tmp_path) == 10_000 * 1024
    assert os.path.exists("/proc/self/cgroup") and free_host_bytes() >= 0
