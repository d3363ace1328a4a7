"""The instruments of the loop."""

import pytest
import torch

from options.errors import StopRun
from parallel.world import World
from pipeline.batch import collate
from training.instruments import Health, MetricWindow

ONE = World(0, 1, 0, torch.device("cpu"))


def group(*sources):
    batch = collate([])
    batch.sources = list(sources)
    return [batch]


def test_a_window_saved_and_restored_goes_on():
    whole, before, after = MetricWindow(ONE), MetricWindow(ONE), MetricWindow(ONE)
    losses = torch.rand(6, generator=torch.Generator().manual_seed(0))
    for number, loss in enumerate(losses):
        whole.add(loss, group((0, 1), (0, 2)))
        if number < 2:
            before.add(loss, group((0, 1), (0, 2)))
    after.restore(before.state())
    for loss in losses[2:]:
        after.add(loss, group((0, 1), (0, 2)))
    mine, other = whole.totals(), after.totals()
    assert mine.loss == other.loss and (mine.steps, mine.examples) == (other.steps, other.examples)
    assert (mine.steps, mine.tokens, mine.examples) == (6, 6, 12)
    after.add(losses[0], group())  # an empty batch is one token that nobody asked for
    assert after.totals().tokens == 6
    after.reset()
    assert after.totals().loss == 0 and after.totals().steps == 0


def test_health_names_the_first_bad_update_and_its_rows():
    health = Health(ONE, ["first", "second"])
    fine, bad = torch.tensor(1.0), torch.tensor(float("inf"))
    health.watch(1, [fine, fine], group((0, 3)))
    assert health.problem() is None
    health.watch(2, [fine, fine], group((0, 4)))
    health.watch(3, [fine, bad], group((1, 5), (0, 6)))
    health.watch(4, [bad], group((0, 7)))
    problem = health.problem()
    assert "at step 3; rows of that update: second row 5, first row 6" in problem


def test_health_shortens_a_long_list_of_rows():
    health = Health(ONE, ["data"])
    health.watch(1, [torch.tensor(float("nan"))], group(*[(0, row) for row in range(40)]))
    assert health.problem().endswith("data row 15 and 24 more")


def pair(total: float, count: float) -> torch.Tensor:
    return torch.tensor([total, count])


def test_metrics_are_named_as_they_come_and_survive_a_checkpoint():
    window, loss = MetricWindow(ONE), torch.tensor(1.0)
    window.add(loss, group((0, 1)), [{"reward": pair(3.0, 2.0), "accuracy": pair(1.0, 2.0)}])
    again = MetricWindow(ONE)
    again.restore(window.state())
    for each in (window, again):
        each.add(loss, group((0, 2)), [{"reward": pair(0.0, 0.0), "kl": pair(4.0, 2.0)}])
        assert each.totals().metrics == {"reward": 1.5, "accuracy": 0.5, "kl": 2.0}
        assert list(each.totals().metrics) == ["reward", "accuracy", "kl"]
    window.reset()
    assert window.totals().metrics == {}


class SecondRank(World):
    """Where `sum` adds what another rank sends, whose names came in another order."""

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor + torch.tensor([0, 0, 0, 5.0, 1, 10.0, 1], dtype=tensor.dtype)  # first "a", then "b"


def test_ranks_add_metrics_of_one_name():
    window = MetricWindow(SecondRank(0, 2, 0, torch.device("cpu")))
    window.add(torch.tensor(0.0), group((0, 1)), [{"b": pair(2.0, 1.0), "a": pair(3.0, 1.0)}])
    assert window.totals().metrics == {"b": 6.0, "a": 4.0}


def test_a_loss_scale_below_one_stops_the_run():
    health = Health(ONE, ["data"])
    health.watch(7, [torch.tensor(1.0)], group((0, 3)))
    health.check(1.0)
    health.watch(8, [torch.tensor(1.0)], group((0, 4)))
    with pytest.raises(StopRun, match="fp16: at step 8 gradients overflow even with a loss scale of 0.5"):
        health.check(0.5)
