"""The order of a run, and which of its tests are run on demand only."""

import os
import random

import pytest


def pytest_configure(config: pytest.Config) -> None:
    """One seed for a run, told at its end; xdist's workers inherit it.

    The sample of an ordinary run is always the same, so that what is green stays green; the complete run looks further.
    """
    complete = "faults" in config.option.markexpr
    os.environ.setdefault("FAULTS_SEED", str(random.randrange(10**6)) if complete else "1")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """``@pytest.mark.long`` first, otherwise as collected; ``@pytest.mark.faults`` only for ``-m faults``."""
    if "faults" not in config.option.markexpr:
        complete = [item for item in items if item.get_closest_marker("faults")]
        config.hook.pytest_deselected(items=complete)
        items[:] = [item for item in items if item not in complete]
    # What takes long begins first, so that no worker is left alone with it at the end.
    items.sort(key=lambda item: item.get_closest_marker("long") is None)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """How many failures were enumerated, and how to repeat a sample of them."""
    reports = [r for kind in ("passed", "failed") for r in terminalreporter.stats.get(kind, ())]
    cases = sum(n for r in reports for name, n in r.user_properties if name == "failure_points")
    if cases:
        terminalreporter.write_line(
            f"failure points: {cases} cases (FAULTS_SEED={os.environ['FAULTS_SEED']})"
        )
