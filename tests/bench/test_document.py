"""docs/benchmarks.md says what the result files say, all of them, and what stands in them."""

import json

import pytest

from bench import document


def cells(page: str, title: str) -> list[dict[str, str]]:
    """The rows of the table below this heading, by column."""
    section = page.split(f"\n## {title}\n")[1].split("\n## ")[0]
    lines = [line.strip("| ").split(" | ") for line in section.splitlines() if line.startswith("|")]
    names, _, *rows = [[cell.strip() for cell in line] for line in lines]
    return [dict(zip(names, row, strict=False)) for row in rows]


def test_the_page_is_what_the_result_files_say():
    """If this fails: python bench/document.py writes it anew."""
    assert document.PAGE.read_text(encoding="utf-8") == document.render()
    assert document.main(["check"]) == 0


def test_a_stale_page_is_noticed(tmp_path, monkeypatch):
    monkeypatch.setattr(document, "PAGE", tmp_path / "benchmarks.md")
    document.PAGE.write_text(document.render().replace("1", "2", 1), encoding="utf-8")
    assert document.main(["check"]) == 1


def test_every_result_file_has_a_section():
    names = [path.name for path in document.RESULTS.glob("*.json")]
    page = document.render()
    assert len(names) > 9 and all(f"[{name}](../bench/results/{name})" in page for name in names)


def test_a_result_that_nobody_renders_ends_it(tmp_path):
    path = tmp_path / "sorting_cpu.json"
    path.write_text('{"command": "x", "commit": "y"}', encoding="utf-8")
    with pytest.raises(SystemExit, match="sorting_cpu.json: no renderer"):
        document.section(path)


def test_numbers_of_a_table_are_those_of_its_file():
    file = json.loads((document.RESULTS / "train_cpu_float32.json").read_text(encoding="utf-8"))
    ours, theirs = (file["shapes"]["equal"][system] for system in ("anvil", "peft"))
    first, second, *_ = cells(document.render(), "train cpu float32")
    assert first["work"] == second["work"] == "equal" and (first["system"], second["system"]) == (
        "anvil",
        "peft",
    )
    for row, found in ((first, ours), (second, theirs)):
        assert float(row["tokens/s"].replace(",", "")) == pytest.approx(found["tokens_per_second"], rel=5e-3)
        assert float(row["peak GB"]) == pytest.approx(found["peak_gb"], rel=5e-3)
    ratio = float(second["Anvil's speed"].removesuffix("x"))
    assert ratio == pytest.approx(ours["tokens_per_second"] / theirs["tokens_per_second"], abs=0.006)


def test_refused_examples_of_llamafactory_are_listed_with_their_reason():
    result = {
        "revision": "v1",
        "accepted": 1,
        "total": 2,
        "files": {"a.yaml": None, "b.yaml": "fp8: unknown"},
    }
    text, _, *lines = document.examples(result)
    assert "1 of 2" in text and "v1" in text
    assert lines[2:] == ["| b.yaml | fp8: unknown |"]
