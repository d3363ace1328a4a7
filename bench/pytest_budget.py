"""pytest plugin: no test is started after a given time; what was left out is in the summary as skipped.

python -m pytest -p bench.pytest_budget --until 1767225600 -rs tests/gpu
"""

import time

import pytest


def pytest_addoption(parser):
    parser.addoption(
        "--until", type=float, default=None, help="seconds since 1970 after which no test is started"
    )


def pytest_runtest_setup(item):
    until = item.config.getoption("until")
    if until is not None and time.time() > until:
        pytest.skip("left out for time")
