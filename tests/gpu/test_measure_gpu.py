"""The benchmarks' timer and ceilings on a real GPU."""

import torch

from bench.measure import Timer, describe_machine, take_ceilings


def test_graphs_are_captured_forward_and_backward():
    """Otherwise the host's launches would be measured."""
    timer = Timer(torch.device("cuda", 0), seconds=0.02)
    with timer.stream():
        x = torch.randn(512, 512, device="cuda", requires_grad=True)
        y = torch.nn.functional.silu(x @ x)
        gradient = torch.randn_like(y)
        assert timer.time([lambda: x @ x]).how == "graph"
        assert timer.time([lambda: torch.autograd.grad(y, x, gradient, retain_graph=True)]).how == "graph"


def test_a_graph_of_small_calls_is_faster_than_the_host_starts_them():
    timer = Timer(torch.device("cuda", 0), seconds=0.05)
    with timer.stream():
        x = torch.randn(1024, device="cuda")

        def many():
            for _ in range(20):
                x.mul_(1.0)

        assert timer.time([many]).seconds < timer.time([many], graph=False).seconds


def test_twice_the_work_takes_about_twice_the_time():
    timer = Timer(torch.device("cuda", 0), seconds=0.1)
    with timer.stream():
        small, large = (torch.randn(count, device="cuda") for count in (2**26, 2**27))
        ratio = timer.time([lambda: large.clone()]).seconds / timer.time([lambda: small.clone()]).seconds
    assert 1.7 < ratio < 2.3


def test_ceilings_are_those_of_a_gpu_and_reading_is_not_slower_than_half_of_copying():
    timer = Timer(torch.device("cuda", 0), seconds=0.05)
    with timer.stream():
        found = take_ceilings(timer, 0.2)
    assert found.copy_gb_per_second > 100 and found.read_gb_per_second > 0.5 * found.copy_gb_per_second
    assert found.sustained_tflops <= 1.1 * found.burst_tflops


def test_the_machine_is_named():
    found = describe_machine(torch.device("cuda", 0), "command")
    assert found["gpu"] and found["driver"] != "unknown" and found["torch"]
