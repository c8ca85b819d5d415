"""The formal model (model/): the protocol as it is holds, and each mechanism that is taken out is missed.

Every test runs the checker as `make model` does, in a folder and a process of its own.
"""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.long


def said_of(case: str) -> str:
    """What the checker says of one case; its table shows how a broken variant fails."""
    done = subprocess.run(
        [sys.executable, "-m", "model.check", case],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode == 2 and "install spin" in done.stderr and not Path("/etc/apt").is_dir():
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize(
    "scope",
    [
        "updates",
        "deletes",
        "backfill",
        "foreign_writer",
        "foreign_writer_and_slow_secondary",
        "reads",
        "switch",
        "switch_by_two",
    ],
)
def test_every_promise_holds_in_every_state(scope: str) -> None:
    said = said_of(scope)

    assert "accepted" in said
    # A model in which nothing can happen would hold, too.
    states = int(said.split("states")[0].split()[-1].replace(",", ""))
    assert states > 100_000


@pytest.mark.parametrize(
    ("variant", "violated"),
    [
        ("behind_confirms", "debt is atomic with data"),
        ("settle_without_operation", "debt is atomic with data"),
        ("no_second_look", "debt is atomic with data"),
        ("delete_not_decided", "no lost write"),
        ("debt_after_data", "debt is atomic with data"),
        ("undo_by_key", "no lost write"),
        ("no_look_after_commit", "debt is atomic with data"),
        ("age_from_the_end_of_a_look", "no older read"),
        ("acknowledged_at_once", "no older read"),
        ("lifted_in_one_step", "no older read"),
        ("drain_before_fence", "no lost write"),
        ("acknowledged_without_lease", "no lost write"),
        ("lease_of_any_epoch", "no lost write"),
        ("signed_with_writes_under_way", "no lost write"),
        ("decided_without_attempt", "no lost write"),
        ("image_of_any_epoch", "no lost write"),
    ],
)
def test_a_broken_variant_is_rejected_with_the_way_there(variant: str, violated: str) -> None:
    said = said_of(variant)

    assert f"REJECTED, {violated}" in said
    assert "at first" in said
