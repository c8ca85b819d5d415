"""Merges: which identity stands for one that was merged, and what undoing a merge gives back.

Merging writes to two records. The merged one says into which (``mergedInto``), and that is the truth; the other keeps
an entry in ``linkedIdentities``, with which it can be undone. Old data holds chains of merges, entries twice, entries
of identities that are gone, and cycles: those lead nowhere, are reported, and are never followed round.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import datetime
from typing import Any, Final

import structlog
from bson import ObjectId

from crossfade import Record
from scorekeeper.identities.repository import IdentityRepository
from scorekeeper.metrics import DEGRADED

log = structlog.get_logger("scorekeeper")

#: Merges that are followed one after the other; each costs a look for all chains at once.
LONGEST_CHAIN: Final = 64

#: What an entry keeps of both records as they were before, under names that no client is shown.
RESTORES: Final = "restores"

#: What merging changes of the one that is merged, besides ``updatedAt``.
_CHANGED: Final = ("mergedInto", "type", "isDeleted", "deletedAt")


def is_live(identity: Record) -> bool:
    """Whether an identity plays for itself: neither deleted nor merged into another."""
    return not identity.get("isDeleted") and identity.get("mergedInto") is None


async def standing_for(identities: IdentityRepository, merged: Iterable[Record]) -> dict[Any, Record | None]:
    """For each of these, by id: the identity at the end of its chain of merges, itself if it was not merged.

    None where the chain ends in one that is gone, or in none at all. Asks once for each length of chain there is.
    """
    starts = list(merged)
    known: dict[Any, Record | None] = {identity.id: identity for identity in starts}
    for _ in range(LONGEST_CHAIN):
        targets = {target_of(identity) for identity in known.values() if identity is not None}
        unknown = targets - known.keys() - {None}
        if not unknown:
            break
        known |= dict.fromkeys(unknown)
        known |= {found.id: found for found in await identities.get_many(unknown)}
    return {identity.id: _end(identity, known) for identity in starts}


def target_of(identity: Record) -> Any:
    """The id of the identity that it was merged into; None where it was not."""
    target = identity.get("mergedInto")
    return target if isinstance(target, ObjectId | str) else None


def _end(start: Record, known: Mapping[Any, Record | None]) -> Record | None:
    current: Record | None = start
    seen: set[Any] = set()
    while current is not None and (target := target_of(current)) is not None:
        if target in seen or target == current.id:
            DEGRADED.labels("merge_cycle").inc()
            log.warning("merged identities lead back to themselves", identity=str(start.id))
            return None
        seen.add(current.id)
        current = known.get(target)
    return current


def entry_of(merged: Record, target: Record, *, by: Any, at: datetime) -> dict[str, Any]:
    """What the target of a merge keeps of it."""
    return {
        "identityId": merged.id,
        "linkedAt": at,
        "linkedBy": by,
        "originalDisplayName": merged.get("displayName"),
        "_id": ObjectId(),
        RESTORES: {
            "merged": _kept(merged, (*_CHANGED, "updatedAt")),
            "target": {
                **_kept(target, ("updatedAt", "__v")),
                "links": _length(target.get("linkedIdentities")),
            },
        },
    }


def _length(links: Any) -> int | None:
    return len(links) if isinstance(links, list) else None


def _kept(identity: Record, fields: Iterable[str]) -> dict[str, Any]:
    return {field: identity.document[field] for field in fields if field in identity.document}


def entries_for(target: Record, merged_id: Any) -> list[dict[str, Any]]:
    """The entries of a merge, oldest first: old data can hold one twice."""
    entries = target.get("linkedIdentities")
    entries = entries if isinstance(entries, list) else []
    return [each for each in entries if isinstance(each, dict) and each.get("identityId") == merged_id]


def unmerged(merged: Record, target: Record | None, *, at: datetime) -> tuple[dict[str, Any], list[str]]:
    """What to set and to remove so that a merged identity is as before; made by the old back end: as a guest."""
    entries = [] if target is None else entries_for(target, merged.id)
    entry = entries[-1] if entries else {}
    restores = entry.get(RESTORES)
    if not isinstance(restores, Mapping):
        return (
            {"mergedInto": None, "type": "guest", "isDeleted": False, "deletedAt": None, "updatedAt": at},
            [],
        )
    before = dict(restores["merged"])
    untouched = merged.get("updatedAt") == entry["linkedAt"]
    if not untouched or "updatedAt" not in before:
        before["updatedAt"] = at
    gone: list[str] = [field for field in _CHANGED if field not in before and field in merged.document]
    return before, gone


def without_entries(
    target: Record, merged_id: Any, *, at: datetime
) -> tuple[dict[str, Any], list[str], list[dict[str, Any]]]:
    """What to set, what to remove, and which entries to take out, so that a merge leaves nothing in its target."""
    entries = entries_for(target, merged_id)
    restores = entries[-1].get(RESTORES) if entries else None
    if not isinstance(restores, Mapping) or target.get("updatedAt") != entries[-1]["linkedAt"]:
        return {"updatedAt": at}, [], entries
    before = dict(restores["target"])
    there_were = before.pop("links")
    if len(target["linkedIdentities"]) - len(entries) != (there_were or 0):
        return {"updatedAt": at}, [], entries
    # Nothing else has happened to it: it is as before to the last field, so that its version has not changed either.
    return before, ["linkedIdentities"] if there_were is None else [], [] if there_were is None else entries
