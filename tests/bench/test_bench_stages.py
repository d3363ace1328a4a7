"""`make stages` at tiny sizes: before and after, the verdict, the file and the curves."""

import json

import pytest
from tiny_runs import tiny_runs

from bench import stages


@pytest.fixture
def tiny(tmp_path):
    with tiny_runs(tmp_path) as made:
        yield made


def test_a_case_is_measured_before_and_after_and_judged(tiny, tmp_path, monkeypatch, capsys):
    out = tmp_path / "results"
    out.mkdir()
    words = [f"model={tiny.model}", "only=dpo", f"out={out}"]
    words.append("more=max_samples=16 val_size=4 max_steps=2 cutoff_len=32")
    for least, status in ((0.0, 0), (1.1, 1)):
        monkeypatch.setitem(
            stages.CASES, "dpo", stages.Case("dpo_lora.yaml", "eval_rewards/accuracies", least=least)
        )
        assert stages.main(words) == status
        assert ("FAILED" in capsys.readouterr().out) == (status == 1)
    (path,) = out.glob("stages*.json")
    (row,) = json.loads(path.read_text())["rows"]
    assert (
        row["case"] == "dpo"
        and 0 <= row["before"] <= 1
        and row["passed"] is False
        and row["train_seconds"] > 0
    )
    assert (out / "dpo.png").read_bytes().startswith(b"\x89PNG")
    assert "configs/dpo_lora.yaml" in row["command"] and str(tmp_path) not in row["command"]


def test_an_unknown_case_is_refused():
    with pytest.raises(SystemExit, match="only=xyz: no such case; there are rm, dpo"):
        stages.main(["only=xyz"])
