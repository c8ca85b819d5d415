"""`/api/identities`: from HTTP to the services and back."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query

from crossfade import Record
from scorekeeper import names
from scorekeeper.auth.current import Administrator, SignedIn
from scorekeeper.errors import Problem
from scorekeeper.identities import ratings, schemas
from scorekeeper.identities.admin import IdentityAdministration
from scorekeeper.identities.aliases import AliasService
from scorekeeper.identities.games import GamesMoved
from scorekeeper.identities.linking import LinkingService, not_there
from scorekeeper.identities.lists import IdentityLists
from scorekeeper.identities.repository import Page
from scorekeeper.identities.shown import document_of
from scorekeeper.routing import errors_of, of_app
from scorekeeper.wire import document_id

router = APIRouter(prefix="/api/identities", tags=["identities"])

#: Pages past this one are refused: what lies before them would be read for nothing.
LAST_PAGE = 100_000


Lists = Annotated[IdentityLists, of_app("identity_lists")]
Aliases = Annotated[AliasService, of_app("aliases")]
Linking = Annotated[LinkingService, of_app("linking")]
Administration = Annotated[IdentityAdministration, of_app("identity_administration")]

PageNumber = Annotated[int, Query(ge=1, le=LAST_PAGE)]
#: Records of a page; more than a list allows are as many as it does.
Limit = Annotated[int | None, Query(ge=1)]
Sought = Annotated[str, Query(max_length=names.LONGEST_SOUGHT)]
GameType = Annotated[str, Query(max_length=100)]


def _page(number: int, limit: int | None, usual: int, most: int) -> Page:
    return Page(number, min(limit or usual, most))


def _id(text: str) -> Any:
    """The ``_id`` that a text on the wire means; 404 for one that cannot be anybody's."""
    if "\0" in text or not names.is_unicode(text) or len(text) > 256:
        raise not_there()
    return document_id(text)


def _text(text: str) -> str:
    """What is looked for; what no name can hold is found nowhere."""
    if "\0" in text or not names.is_unicode(text):
        raise Problem(400, "invalid", "The text that is searched for is not valid")
    return text


def _changed(message: str, identity: Record) -> dict[str, Any]:
    return {"message": message, "identity": document_of(identity)}


@router.get("/search", response_model=schemas.IdentitiesOut, responses=errors_of(400, 401))
async def search(
    _current: SignedIn, lists: Lists, q: Sought = "", page: PageNumber = 1, limit: Limit = None
) -> Any:
    """Live identities by name or alias."""
    return await lists.search(_text(q), _page(page, limit, 20, 50))


@router.get("/me", response_model=schemas.OwnIdentitiesOut, responses=errors_of(401))
async def mine(current: SignedIn, lists: Lists) -> Any:
    """One's own identities, with the games of all added up."""
    return await lists.mine(current)


# -- ratings -------------------------------------------------------------------------------------------


@router.get(
    "/elo/me",
    response_model=schemas.RatingOut,
    response_model_exclude_unset=True,
    responses=errors_of(400, 401),
)
async def my_rating(current: SignedIn, lists: Lists, gameType: GameType = ratings.DEFAULT_TYPE) -> Any:
    """One's own rating in a game."""
    return await lists.my_rating(current, gameType)


@router.get(
    "/elo/me/all",
    response_model=schemas.RatingsOut,
    response_model_exclude_unset=True,
    responses=errors_of(401),
)
async def my_ratings(current: SignedIn, lists: Lists) -> Any:
    """One's own ratings in all games."""
    return await lists.my_ratings(current)


@router.get(
    "/elo/all/{identityId}",
    response_model=schemas.RatingsOut,
    response_model_exclude_unset=True,
    responses=errors_of(401, 404),
)
async def all_ratings(identityId: str, _current: SignedIn, lists: Lists) -> Any:
    """An identity's ratings in all games."""
    return await lists.all_ratings(_id(identityId))


@router.get(
    "/elo/history/{identityId}",
    response_model=schemas.RatingOut,
    response_model_exclude_unset=True,
    responses=errors_of(400, 401, 404),
)
async def rating(
    identityId: str,
    _current: SignedIn,
    lists: Lists,
    gameType: GameType = ratings.DEFAULT_TYPE,
    limit: Limit = None,
) -> Any:
    """An identity's rating in a game, the newest of its history first."""
    entries = min(limit or ratings.SHOWN, ratings.KEPT)
    return await lists.rating(_id(identityId), gameType, entries)


# -- linking -------------------------------------------------------------------------------------------


@router.post("/link", response_model=schemas.LinkedOut, responses=errors_of(400, 401, 404))
async def link(body: schemas.Guest, current: SignedIn, linking: Linking) -> Any:
    """Merge a guest into one's own identity."""
    own = document_id(current.id)
    linked = await linking.link(own, _id(body.guestIdentityId), by=own)
    return linked.shown("Identity linked successfully")


@router.post("/link/multiple", response_model=schemas.ManyLinkedOut, responses=errors_of(400, 401))
async def link_many(body: schemas.Guests, current: SignedIn, linking: Linking) -> Any:
    """Merge several guests into one's own identity, each by itself."""
    own = document_id(current.id)
    linked, failed, games = [], [], GamesMoved()
    for guest_id in dict.fromkeys(body.guestIdentityIds):
        try:
            one = await linking.link(own, _id(guest_id), by=own)
        except Problem as problem:
            failed.append({"id": guest_id, "errors": [problem.error]})
        else:
            games += one.games
            linked.append({"id": guest_id, **one.shown("")})
    return {
        "success": not failed,
        "linked": linked,
        "failed": failed,
        "totalGamesUpdated": games.total,
    }


@router.post("/unlink", response_model=schemas.LinkedOut, responses=errors_of(400, 401, 403, 404))
async def unlink(body: schemas.Guest, current: SignedIn, linking: Linking) -> Any:
    """Make a guest that was merged into one's own identity a guest again."""
    unlinked = await linking.unlink(document_id(current.id), _id(body.guestIdentityId))
    return unlinked.shown("Identity unlinked successfully")


@router.get("/link/suggestions", response_model=schemas.SuggestionsOut, responses=errors_of(401))
async def suggestions(current: SignedIn, lists: Lists) -> Any:
    """Guests that may be oneself."""
    return await lists.suggestions(current)


@router.get("/link/my-identities", response_model=schemas.MyIdentitiesOut, responses=errors_of(401))
async def own_and_linked(current: SignedIn, lists: Lists) -> Any:
    """One's own identities, and those linked to them."""
    return await lists.own_and_linked(current)


@router.get("/link/guest-identities", response_model=schemas.GuestsOut, responses=errors_of(400, 401))
async def guests(
    _current: SignedIn, lists: Lists, search: Sought = "", page: PageNumber = 1, limit: Limit = None
) -> Any:
    """Guests, and to whom they are linked."""
    return await lists.guests(_text(search), _page(page, limit, 20, 50))


# -- administration ------------------------------------------------------------------------------------


@router.get("/admin/all", response_model=schemas.IdentitiesOut, responses=errors_of(400, 401, 403))
async def everybody(
    _current: Administrator,
    lists: Lists,
    type: Literal["user", "guest", "imported"] | None = None,
    linked: bool | None = None,
    search: Sought = "",
    page: PageNumber = 1,
    limit: Limit = None,
) -> Any:
    """All identities, those deleted and merged too; ``linked``: those with a user, or those without."""
    return await lists.everybody(_text(search), type, linked, _page(page, limit, 50, 100))


@router.post(
    "/admin/assign", response_model=schemas.IdentityChangedOut, responses=errors_of(400, 401, 403, 404)
)
async def assign(body: schemas.Assignment, _current: Administrator, administration: Administration) -> Any:
    """Make an identity a user's."""
    identity = await administration.assign(_id(body.identityId), _id(body.userId))
    return _changed("Identity assigned successfully", identity)


@router.post("/admin/merge", response_model=schemas.MergedOut, responses=errors_of(400, 401, 403, 404))
async def merge(body: schemas.Merging, current: Administrator, linking: Linking) -> Any:
    """Merge many identities into one, all or nothing."""
    target, games = await linking.merge(
        _id(body.targetId), [_id(each) for each in body.sourceIds], by=document_id(current.id)
    )
    return {
        **_changed("Identities merged successfully", target),
        "merged": list(dict.fromkeys(body.sourceIds)),
        "gamesUpdated": games.shown(),
    }


@router.post("/admin/split", response_model=schemas.SplitOut, responses=errors_of(400, 401, 403, 404))
async def split(body: schemas.Splitting, current: Administrator, aliases: Aliases) -> Any:
    """Make an alias a guest of its own."""
    identity, new = await aliases.split(
        _id(body.identityId), _text(body.aliasName), by=document_id(current.id)
    )
    return {**_changed("Identity split successfully", identity), "newIdentity": document_of(new)}


@router.post("/admin/link", response_model=schemas.LinkedOut, responses=errors_of(400, 401, 403, 404))
async def link_for(body: schemas.GuestOfUser, current: Administrator, linking: Linking) -> Any:
    """Merge a guest into a user's identity."""
    linked = await linking.link(
        _id(body.userId), _id(body.guestIdentityId), by=document_id(current.id), as_admin=True
    )
    return linked.shown("Identity linked successfully")


@router.post("/admin/unlink-guest", response_model=schemas.LinkedOut, responses=errors_of(400, 401, 403, 404))
async def unlink_for(body: schemas.GuestOfUser, _current: Administrator, linking: Linking) -> Any:
    """Make a guest that was merged into a user's identity a guest again."""
    unlinked = await linking.unlink(_id(body.userId), _id(body.guestIdentityId))
    return unlinked.shown("Identity unlinked successfully")


@router.post(
    "/admin/unlink/{identityId}",
    response_model=schemas.IdentityChangedOut,
    responses=errors_of(400, 401, 403, 404),
)
async def part(identityId: str, _current: Administrator, administration: Administration) -> Any:
    """Part an identity from the one that it was merged into, else from its user."""
    return _changed("Identity unlinked successfully", await administration.unlink(_id(identityId)))


@router.post(
    "/admin/{identityId}/restore",
    response_model=schemas.IdentityChangedOut,
    responses=errors_of(400, 401, 403, 404),
)
async def restore(identityId: str, _current: Administrator, administration: Administration) -> Any:
    """Have a deleted identity back."""
    return _changed("Identity restored successfully", await administration.restore(_id(identityId)))


@router.delete(
    "/admin/{identityId}", response_model=schemas.IdentityChangedOut, responses=errors_of(401, 403, 404)
)
async def delete(identityId: str, _current: Administrator, administration: Administration) -> Any:
    """Delete an identity, so that it can be had back."""
    return _changed("Identity deleted successfully", await administration.delete(_id(identityId)))


# -- one identity: behind everything that is not an id -----------------------------------------------------


@router.get(
    "/{identityId}",
    response_model=schemas.IdentityDetailOut,
    response_model_exclude_unset=True,
    responses=errors_of(401, 404),
)
async def one(identityId: str, _current: SignedIn, lists: Lists) -> Any:
    """One identity, with its newest games."""
    return await lists.one(_id(identityId))


@router.post(
    "/{identityId}/alias",
    response_model=schemas.IdentityChangedOut,
    responses=errors_of(400, 401, 403, 404),
)
async def add_alias(identityId: str, body: schemas.NewAlias, current: SignedIn, aliases: Aliases) -> Any:
    """Let an identity go by one more name."""
    return _changed("Alias added successfully", await aliases.add(current, _id(identityId), body.aliasName))


@router.delete(
    "/{identityId}/alias/{aliasName:path}",
    response_model=schemas.IdentityChangedOut,
    responses=errors_of(401, 403, 404),
)
async def remove_alias(identityId: str, aliasName: str, current: SignedIn, aliases: Aliases) -> Any:
    """Let an identity no longer go by a name."""
    return _changed("Alias removed successfully", await aliases.remove(current, _id(identityId), aliasName))
