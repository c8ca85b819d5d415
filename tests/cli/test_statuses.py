"""What a command ends with."""

from __future__ import annotations

import pytest

from crossfade import errors
from crossfade.cli.context import EndedElsewhere, Exit, status_of
from crossfade.stores.errors import Fenced


@pytest.mark.parametrize(
    ("cause", "status"),
    [
        (errors.ConfigurationError("no application named"), Exit.WRONG_USE),
        (errors.SchemaNotReady("not at head"), Exit.WRONG_USE),
        (errors.StoreUnavailable("mongo", "not there"), Exit.UNREACHABLE),
        (errors.OutcomeUnknown("not answered"), Exit.UNREACHABLE),
        (errors.NotAllowedInPhase("refused"), Exit.FOUND),
        (errors.Busy("others hold rows"), Exit.FOUND),
        (Fenced("another phase began"), Exit.FOUND),
        (EndedElsewhere("others hold rows", Exit.FOUND), Exit.FOUND),
        (EndedElsewhere("not there", Exit.UNREACHABLE), Exit.UNREACHABLE),
    ],
    ids=lambda value: type(value).__name__,
)
def test_wrong_use_is_only_what_was_used_wrongly(cause: errors.CrossfadeError, status: Exit) -> None:
    assert status_of(cause) is status
