"""Parts: large fields that an image leaves out while the secondary holds them (pure).

A picture of megabytes must not travel with every small write. Each part has a revision of its own, kept on both
sides together with the digest of its value: in the document under ``_cf.parts.<field>``, and beside the child row.

**A note is a confirmation.** ``_cf.parts.<field>`` stands there from the moment the other store has confirmed this
state of the part, in the update that erases the debt. Whoever writes the part erases the note in the same update, in
every phase. So what has no note is carried, whatever crashed and however often; and of two debts only the one that
is owed the part brings it.

**A note is checked where it is used.** An image without a part is taken only by a row that holds exactly that revision
and digest of it. Else it is *behind*, and the primary is read again, whole.

**A digest tells.** The digest of a record is that of its document with each part replaced by the part's own digest. So
an image without a part has the digest of the whole one. A foreign writer changes a part without touching the note:
whoever reads the record whole, as the full pass and a verify do, computes the part's digest anew and sees it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from bson.int64 import Int64

from crossfade.values import digest

#: Columns beside a part's values in its child row, filled by the store: its revision and digest.
PART_COLUMNS = ("cf_rev", "cf_digest")


@dataclass(frozen=True, slots=True)
class Part:
    """One state of a part. In the document of an image it stands where the value was left out.

    Attributes:
        rev: revision of the image that brought it to the other store.
        digest: of its value.
        at: how many fields stand in front of it, ``_id`` and ``_cf`` apart: without its value nothing else says where
            in the document it belongs.
    """

    rev: int
    digest: bytes
    at: int

    def to_document(self) -> dict[str, Any]:
        """As kept under ``_cf.parts``."""
        return {"rev": Int64(self.rev), "digest": self.digest, "at": self.at}


def noted_parts(notes: Mapping[str, Any], names: Iterable[str]) -> dict[str, Part]:
    """The parts that a document's ``_cf`` says the other store holds."""
    noted = notes.get("parts") or {}
    return {
        name: Part(int(noted[name]["rev"]), bytes(noted[name]["digest"]), int(noted[name]["at"]))
        for name in names
        if name in noted
    }


def with_left_out(document: dict[str, Any], left_out: Mapping[str, Part]) -> dict[str, Any]:
    """A document that was read without these parts, each of them put where it stands."""
    if not left_out:
        return document
    fields = list(document.items())
    for name, part in sorted(left_out.items(), key=lambda one: one[1].at):
        fields.insert(part.at + 1, (name, part))  # behind _id
    return dict(fields)


def parts_of(
    document: Mapping[str, Any], names: Sequence[str], noted: Mapping[str, Part], rev: int
) -> dict[str, Part]:
    """The parts of a document at ``rev``, those that were left out of it among them; null is none.

    Raises:
        crossfade.values.Unmappable: a value has no canonical bytes.
    """
    if all(document.get(name) is None for name in names):
        return {}
    parts: dict[str, Part] = {}
    for at, name in enumerate(field for field in document if field != "_id"):
        value = document[name]
        if name not in names or value is None:
            continue
        if isinstance(value, Part):
            parts[name] = replace(value, at=at)
            continue
        own, before = digest({"v": value}), noted.get(name)
        parts[name] = Part(before.rev if before is not None and before.digest == own else rev, own, at)
    return parts


def digest_with(document: Mapping[str, Any], parts: Mapping[str, Part]) -> bytes:
    """Digest of a document with each of its parts replaced by its own digest.

    Raises:
        crossfade.values.Unmappable: a value has no canonical bytes.
    """
    if not parts:
        return digest(document)
    return digest({name: parts[name].digest if name in parts else value for name, value in document.items()})


def left_out_of(document: Mapping[str, Any]) -> frozenset[str]:
    """The names of the parts that were left out of an image's document."""
    return frozenset(name for name, value in document.items() if isinstance(value, Part))


@dataclass(frozen=True, slots=True)
class Carried:
    """What a write does about the parts of its record.

    Attributes:
        left_out: those that its image leaves out.
        erased: those whose note goes.
        owed: those that it writes: its debt names them.
    """

    left_out: Mapping[str, Part]
    erased: tuple[str, ...]
    owed: tuple[str, ...]


def carried_by(
    names: Sequence[str], noted: Mapping[str, Part], *, wrote: Iterable[str], removed: Iterable[str]
) -> Carried:
    """What a write that sets ``wrote`` and removes ``removed`` does about parts, of which ``noted`` are confirmed.

    One that removes any field moves what stands behind it, so it carries all parts. A note is erased whether it is
    known of or not: it may have been made since.
    """
    gone = frozenset(removed)
    touched = gone | frozenset(wrote)
    erased = tuple(name for name in names if gone or name in touched)
    left_out = {name: part for name, part in noted.items() if name not in erased}
    return Carried(left_out, erased, tuple(name for name in names if name in touched))
