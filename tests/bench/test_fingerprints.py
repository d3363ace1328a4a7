"""What bench/fingerprints.py compares: every bit, without clocks, paths and repeated options."""

import json

import pytest

from bench import fingerprints


def test_entries_are_series_hashes_and_texts_without_clocks_and_paths(tmp_path):
    taken = []
    for name, speed in (("a", 1.0), ("b", 2.0)):
        folder = tmp_path / name / "run"
        folder.mkdir(parents=True)
        lines = [{"loss": 0.1 + 0.2, "train_tokens_per_second": speed}, {"loss": 1.5}]
        (folder / "trainer_log.jsonl").write_text("\n".join(map(json.dumps, lines)))
        (folder / "run_config.yaml").write_text(name)
        (folder / "adapter_config.json").write_text(f'{{"base": "{tmp_path / name}/model"}}')
        taken.append(fingerprints.entries(folder, "", {str(tmp_path / name): "HOME"}))
    assert taken[0] == taken[1] and taken[0].keys() == {"loss", "adapter_config.json"}
    assert taken[0]["loss"] == [0.1 + 0.2, 1.5]
    assert fingerprints.entries(tmp_path / "none", "Hello", {}) == {"text": "Hello"}


@pytest.mark.parametrize("before, after, says", [
    ([1.0, 2.0], [1.0, 2.0], ""), ([float("nan")], [float("nan")], ""),
    ([1.0, 0.3], [1.0, 0.1 + 0.2], "DIFFERS in 1 of 2 values, first in number 2: 0.3 -> 0.30000000000000004"),
    ("a", "b", "DIFFERS: 'a' -> 'b'"), (None, "b", "MISSING in before"), ("a", None, "MISSING in after"),
])  # fmt: skip
def test_a_difference_is_said_in_words(before, after, says):
    assert fingerprints.difference(before, after) == says


def test_the_status_is_that_of_the_comparison(tmp_path, capsys):
    sides = []
    for name, loss in (("before", 1.0), ("after", 2.0)):
        sides.append(tmp_path / name)
        entries = {"pt": {"loss": [loss]}, "dpo": {"loss": [3.0]}}
        sides[-1].write_text(json.dumps({"tree": name, "machine": {"torch": "2"}, "entries": entries}))
    words = f"compare={sides[0]},{sides[1]}"
    assert fingerprints.main([words, "only=dpo"]) == 0 and fingerprints.main([words, "only=pt,dpo"]) == 1
    assert "pt loss: DIFFERS in 1 of 1 values" in capsys.readouterr().out


def test_a_case_needs_the_cases_that_it_reads():
    assert fingerprints.needs("export_merged") == {"sft_lora"} and not fingerprints.needs("sft_lora")
    words = fingerprints.words_of("export_merged")
    assert words[0] == "export.py" and "export_dir={export_merged}" in words
