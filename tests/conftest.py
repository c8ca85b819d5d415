"""The order of a run: what takes long begins first, so that no worker is left alone with it at the end."""

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """``@pytest.mark.long`` first, otherwise as collected."""
    items.sort(key=lambda item: item.get_closest_marker("long") is None)
