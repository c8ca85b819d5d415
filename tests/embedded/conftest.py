import shutil
import signal
import tempfile
import time
from pathlib import Path

import pytest

from crossfade.embedded import supervisor


@pytest.fixture(scope="session", autouse=True)
def sigint_is_not_ignored():
    """A shell starts background jobs with SIGINT ignored, and what the tests start would inherit that."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def gone():
    """Waits until every given process has ended; returns those that have not within 15 seconds."""

    def wait(pids):
        deadline = time.monotonic() + 15
        while (left := [pid for pid in pids if supervisor.started(pid)]) and time.monotonic() < deadline:
            time.sleep(0.05)
        return left

    return wait


@pytest.fixture
def reachable():
    """A folder that PostgreSQL's account may enter, also when the tests run as root.

    Not pytest's own: every pytest that starts makes the parent of those private to its user again.
    """
    folder = Path(tempfile.mkdtemp(prefix="crossfade-test-"))
    folder.chmod(0o711)
    yield folder
    shutil.rmtree(folder, ignore_errors=True)
