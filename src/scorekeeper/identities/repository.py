"""Identities as the stories ask for them; which store answers is Crossfade's."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from crossfade import EntityHandle, Migration, Operation, Record, any_of, contains, is_set
from scorekeeper.names import normal_form

#: Identities that one look gives at most where no page is asked for; far more than any real account or name has.
MOST: Final = 200

#: What an identity that plays for itself looks like: neither deleted nor merged into another.
LIVE: Final[Mapping[str, Any]] = {"isDeleted": any_of([False, None]), "mergedInto": None}

#: Identities of players without an account of their own: those that nobody has linked, and those that somebody has.
_GUESTS: Final[Mapping[str, Any]] = {
    "type": any_of(["guest", "imported"]),
    "isDeleted": any_of([False, None]),
}


@dataclass(frozen=True, slots=True)
class Page:
    """Which portion of a list is wanted: ``number`` from 1, of ``size`` each."""

    number: int
    size: int

    @property
    def skip(self) -> int:
        """How many come before it."""
        return (self.number - 1) * self.size


@dataclass(frozen=True, slots=True)
class Found:
    """One page of a list, and how long the whole list is."""

    records: list[Record]
    page: Page
    total: int


class IdentityRepository:
    """The records of player identities."""

    def __init__(self, accounts: Migration) -> None:
        self._accounts = accounts
        self._identities: EntityHandle = accounts["identities"]

    async def get(self, id_: Any) -> Record | None:
        """The identity of this ``_id``, or None."""
        return await self._identities.get(id_)

    async def get_many(self, ids: Iterable[Any]) -> list[Record]:
        """Those of these identities that are there, in this order."""
        return await self._identities.get_many(ids)

    async def live_of(self, user_id: Any) -> list[Record]:
        """The live identities of a user, oldest first."""
        return await self._identities.find({"userId": user_id, **LIVE}, limit=MOST)

    async def merged_into(self, ids: Iterable[Any]) -> list[Record]:
        """The identities that were merged into these, directly."""
        return await self._identities.find({"mergedInto": any_of(ids)}, limit=MOST)

    async def named(self, name: str) -> list[Record]:
        """The identities of this name in any letter case, those deleted and merged too, oldest first."""
        return await self._identities.find({"normalizedName": normal_form(name)}, limit=MOST)

    async def live_with_alias(self, name: str) -> list[Record]:
        """The live identities that have this as an alias, in any letter case."""
        return await self._identities.find({"aliases.normalizedName": normal_form(name), **LIVE}, limit=MOST)

    async def live_under(self, name: str) -> list[Record]:
        """The live identities that have this name, or it as an alias, in any letter case."""
        sought = normal_form(name)
        return await self._identities.find(
            [{"normalizedName": sought, **LIVE}, {"aliases.normalizedName": sought, **LIVE}], limit=MOST
        )

    async def called(self, names: Iterable[str]) -> list[Record]:
        """Identities with one of these names or aliases, in normal form; those deleted and merged too."""
        sought = any_of(names)
        keys = ("normalizedName", "aliases.normalizedName")
        return await self._identities.find([{key: sought} for key in keys], limit=MOST)

    async def all_of(self, user_id: Any) -> list[Record]:
        """The identities of a user, those deleted and merged too, oldest first."""
        return await self._identities.find({"userId": user_id}, limit=MOST)

    async def create(self, document: Mapping[str, Any], *, context: str) -> Record:
        """A new identity.

        Raises:
            crossfade.DuplicateKey: its ``_id`` is taken.
        """
        return await self._identities.insert(document, context=context)

    async def unlinked_guests_like(self, names: Iterable[str], parts: Iterable[str]) -> list[Record]:
        """Live guests that have one of these names, or a name or alias with one of these parts in it; normal forms."""
        guests: dict[str, Any] = {"type": "guest", **LIVE}
        ways = [{key: any_of(names), **guests} for key in ("normalizedName", "aliases.normalizedName")]
        ways += [
            {key: contains(part), **guests}
            for part in parts
            for key in ("normalizedName", "aliases.normalizedName")
        ]
        return await self._identities.find(ways, limit=MOST)

    async def search(self, text: str, page: Page) -> Found:
        """Live identities with ``text`` in their name or an alias, in any letter case, by name."""
        return await self._named(LIVE, text, page)

    async def guests(self, text: str, page: Page) -> Found:
        """Guests, linked ones among them, with ``text`` in their name or an alias, by name."""
        return await self._named(_GUESTS, text, page)

    async def everybody(self, text: str, kind: str | None, has_user: bool | None, page: Page) -> Found:
        """All identities, deleted and merged ones too, of this type, with or without a user; by name."""
        where: dict[str, Any] = {} if kind is None else {"type": kind}
        if has_user is not None:
            where["userId"] = is_set() if has_user else None
        return await self._named(where, text, page)

    async def _named(self, where: Mapping[str, Any], text: str, page: Page) -> Found:
        sought = normal_form(text)
        ways = [dict(where)]
        if sought:
            ways = [{key: contains(sought), **where} for key in ("normalizedName", "aliases.normalizedName")]
        total = await self._identities.count(ways)
        if total <= page.skip:
            return Found([], page, total)
        records = await self._identities.find(
            ways, order_by="normalizedName", skip=page.skip, limit=page.size
        )
        return Found(records, page, total)

    async def update(self, id_: Any, fields: Mapping[str, Any], *, if_revision: int, context: str) -> Record:
        """Set fields of the identity that is at this revision.

        Raises:
            crossfade.NotFound, StaleRevision: nothing was written.
        """
        return await self._identities.update(id_, fields, if_revision=if_revision, context=context)

    def operation(self, context: str) -> Operation:
        """Several records, all or nothing (`crossfade.Operation`)."""
        return self._accounts.operation(context)
