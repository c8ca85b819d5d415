"""The generated documents, without a server."""

from __future__ import annotations

import base64
import io
import math
from collections import Counter
from collections.abc import Mapping
from datetime import datetime
from itertools import islice
from typing import Any

import bcrypt
import pytest
from bson import Decimal128, Int64, ObjectId, decode, encode
from bson.codec_options import CodecOptions, DatetimeConversion
from bson.datetime_ms import DatetimeMS
from bson.raw_bson import RawBSONDocument
from PIL import Image

from scorekeeper.legacy import (
    FOREIGN_PASSWORDS,
    PASSWORDS,
    DirtRates,
    friend_requests,
    games,
    player_identities,
    table_games,
    users,
    wizard_games,
)
from scorekeeper.legacy.deployment import documents_of, sizes_for
from scorekeeper.legacy.dirt import Labelled
from scorekeeper.legacy.names import POOL, STRIDE, case_variant, name_of
from scorekeeper.legacy.population import AS_OF, BEGIN, Population
from scorekeeper.legacy.rates import KINDS, NAME_KINDS, RATED_KINDS

SEED = 11
WRITERS = {
    "users": users,
    "playeridentities": player_identities,
    "friendrequests": friend_requests,
    "games": games,
    "wizard": wizard_games,
    "tablegames": table_games,
}
USERS_IN_ORDER = [
    "_id",
    "username",
    "passwordHash",
    "role",
    "guestMetadata",
    "lastLogin",
    "profilePicture",
    "friends",
    "createdAt",
    "updatedAt",
    "__v",
]
READ = CodecOptions[dict[str, Any]](
    tz_aware=True,
    unicode_decode_error_handler="surrogatepass",
    datetime_conversion=DatetimeConversion.DATETIME_AUTO,
)


def bson_of(document: Mapping[str, Any]) -> bytes:
    return document.raw if isinstance(document, RawBSONDocument) else encode(document)


def plain(document: Mapping[str, Any]) -> dict[str, Any]:
    return decode(bson_of(document), READ)


def dirty(rate: float, users: int = 2000, **changes: Any) -> Population:
    rates = DirtRates.all(rate, near_limit_documents=0)
    return Population(SEED, users, rates)


def only(kind: str, users: int = 600) -> Population:
    """A population in which nothing but one kind is wrong, with about every third document."""
    nothing = dict.fromkeys(RATED_KINDS, 0.0)
    return Population(SEED, users, DirtRates(**(nothing | {kind: 0.35}), near_limit_documents=0))


def struck(collection: str, kind: str, n: int = 200) -> list[dict[str, Any]]:
    found = [
        plain(one.document)
        for one in documents_of(collection, only(kind, users=n), n)
        if one.kinds == (kind,)
    ]
    assert found
    return found


def values(value: Any) -> list[Any]:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [value, *(deep for each in inner for deep in values(each))]


def keys(value: Any) -> set[str]:
    return {key for each in values(value) if isinstance(each, dict) for key in each}


@pytest.mark.parametrize("collection", WRITERS)
def test_the_same_seed_gives_the_same_bytes(collection: str) -> None:
    write = WRITERS[collection]
    rates = DirtRates.all(0.05, near_limit_documents=0)
    first = [bson_of(document) for document in write(3, 300, rates)]
    assert first == [bson_of(document) for document in write(3, 300, rates)]
    assert first != [bson_of(document) for document in write(4, 300, rates)]


@pytest.mark.parametrize("collection", ["users", "games", "wizard", "tablegames"])
def test_a_document_that_no_dirt_befell_is_the_same_at_any_rate(collection: str) -> None:
    def told_apart(document: Mapping[str, Any]) -> bytes:
        # A friend who stopped naming one back changes the other one's list, which is no dirt of that document.
        return encode({name: value for name, value in document.items() if name not in {"friends", "__v"}})

    pairs = zip(
        documents_of(collection, dirty(0), 400), documents_of(collection, dirty(0.01), 400), strict=True
    )
    same = [(clean.document, other.document) for clean, other in pairs if not other.kinds]
    assert len(same) > 200
    assert all(told_apart(clean) == told_apart(other) for clean, other in same)


@pytest.mark.parametrize("collection", WRITERS)
def test_without_dirt_no_document_has_any(collection: str) -> None:
    assert not any(
        one.kinds for one in documents_of(collection, Population(SEED, 500, DirtRates.none()), 500)
    )


@pytest.mark.parametrize("collection", KINDS)
def test_every_kind_comes_at_about_its_rate(collection: str) -> None:
    rate, n = 0.05, 2500
    count: Counter[str] = Counter()
    total = 0
    for total, one in enumerate(documents_of(collection, dirty(rate, users=n), n), 1):  # noqa: B007
        assert len(set(one.kinds)) == len(one.kinds)
        count.update(one.kinds)
    assert set(count) == set(KINDS[collection]), set(KINDS[collection]) ^ set(count)
    # These are shares of something else: of those with that role, with a password, or of friendships.
    share = {"missing_role": 0.78, "foreign_hash": 0.78}
    for kind in set(KINDS[collection]) - {"one_sided_friend"}:
        expected = rate * share.get(kind, 1) * total
        # Names that find no rival keep their own, and lists that are gone hold no friend twice.
        assert abs(count[kind] - expected) < 4.5 * math.sqrt(expected) + 0.12 * expected, (
            kind,
            count[kind],
            expected,
        )


def test_one_sided_friendships_come_at_their_rate() -> None:
    population = Population(SEED, 4000, DirtRates.none())
    one_sided = only("one_sided_friend", users=4000)
    ties = sum(len(population.friends(i)[0]) for i in range(4000)) / 2
    unanswered = sum(one_sided.friends(i)[1] for i in range(4000))
    assert abs(unanswered / ties - 0.35) < 0.04


@pytest.mark.parametrize(
    ("field", "value"), [("self_friend", 1.5), ("string_id", -0.1), ("near_limit_documents", -1)]
)
def test_a_rate_that_cannot_be_is_refused(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=field):
        DirtRates(**{field: value})  # type: ignore[arg-type]


def test_sizes_follow_the_users_unless_told() -> None:
    assert sizes_for(20_000)["playeridentities"] == 22_000
    assert sizes_for(20_000, {"wizard": 7})["wizard"] == 7
    for wrong in ({"gremlins": 1}, {"users": 1}, {"wizard": -1}):
        with pytest.raises(ValueError, match=r"gremlins|users|wizard"):
            sizes_for(10, wrong)


# --- names ----------------------------------------------------------------------------------------------


def test_names_are_unique_whatever_the_letter_case_and_of_allowed_length() -> None:
    assert math.gcd(STRIDE, len(POOL)) == 1
    names = [name_of(i, 5) for i in range(60_000)]
    assert len({name.casefold() for name in names}) == len({name.lower() for name in names}) == len(names)
    assert all(3 <= len(name) <= 20 and name == name.strip() for name in names)


def test_variants_of_a_name_differ_but_for_nothing_else_than_case() -> None:
    variants = [case_variant("İpek Bär", which) for which in range(1, 8)]
    assert len(set(variants)) == 7
    assert {variant.casefold() for variant in variants if variant} == {"İpek Bär".casefold()}
    assert case_variant("李小雷", 1) is None


@pytest.mark.parametrize("rate", [0.002, 0.3, 1.0])
def test_usernames_are_unique_as_the_index_demands(rate: float) -> None:
    names = [
        document["username"]
        for document in map(plain, users(SEED, 3000, DirtRates.all(rate, near_limit_documents=0)))
    ]
    assert len(set(names)) == len(names)


def test_a_colliding_name_is_another_ones_but_for_case() -> None:
    everyone = [(one, plain(one.document)) for one in documents_of("users", only("colliding_case"), 600)]
    spread = Counter(document["username"].casefold() for _, document in everyone)
    colliding = [document["username"] for one, document in everyone if one.kinds]
    assert len(colliding) > 100
    assert all(spread[name.casefold()] >= 2 for name in colliding)


def test_trailing_blanks_are_an_own_name_or_collide_after_trimming() -> None:
    everyone = [(one, plain(one.document)) for one in documents_of("users", only("trailing_space"), 600)]
    trimmed = Counter(document["username"].strip() for _, document in everyone)
    dirty_names = [document["username"] for one, document in everyone if one.kinds]
    assert all(name.endswith(" ") for name in dirty_names)
    assert 0.3 < sum(trimmed[name.strip()] > 1 for name in dirty_names) / len(dirty_names) < 0.8


def test_long_names_have_up_to_50_characters() -> None:
    lengths = [len(document["username"]) for document in struck("users", "long_name")]
    assert min(lengths) > 20
    assert 40 < max(lengths) <= 50


def test_a_lone_surrogate_is_raw_bson() -> None:
    for collection in ("users", "playeridentities", "wizard"):
        found = [one for one in documents_of(collection, only("lone_surrogate"), 50) if one.kinds]
        assert found
        for one in found:
            assert isinstance(one.document, RawBSONDocument)
            assert b"\xed\xa0\x80" in one.document.raw
            assert any("\ud800" in text for text in values(plain(one.document)) if isinstance(text, str))
            assert one.document["_id"] is not None


# --- kinds ----------------------------------------------------------------------------------------------


def test_a_name_holds_a_nul() -> None:
    assert all("\0" in document["username"] for document in struck("users", "nul_in_name"))
    assert all("\0" in document["displayName"] for document in struck("playeridentities", "nul_in_name"))
    for collection in ("games", "wizard", "tablegames"):
        assert all(
            any(isinstance(v, str) and "\0" in v for v in values(d))
            for d in struck(collection, "nul_in_name")
        )


@pytest.mark.parametrize("collection", KINDS)
@pytest.mark.parametrize(
    ("kind", "holds"),
    [
        ("missing_created_at", lambda d: "createdAt" not in d),
        ("missing_updated_at", lambda d: "updatedAt" not in d),
        ("unknown_field", lambda d: "appVersion" in d),
        ("mixed_number", lambda d: any(isinstance(v, Int64 | float) for v in values(d))),
        ("big_integer", lambda d: any(isinstance(v, int) and abs(v) > 2**53 for v in values(d))),
        ("not_a_number", lambda d: any(isinstance(v, float) and not math.isfinite(v) for v in values(d))),
        ("decimal128", lambda d: any(isinstance(v, Decimal128) for v in values(d))),
        (
            "date_before_1970",
            lambda d: any(
                (isinstance(v, datetime) and v.year < 1970) or (isinstance(v, DatetimeMS) and int(v) < 0)
                for v in values(d)
            ),
        ),
        (
            "date_after_9999",
            lambda d: any(isinstance(v, DatetimeMS) and int(v) >= 253402300800000 for v in values(d)),
        ),
        ("empty_key", lambda d: any("" in v for v in values(d)[1:] if isinstance(v, dict))),
        ("dotted_key", lambda d: any("." in key for v in values(d)[1:] if isinstance(v, dict) for key in v)),
        (
            "dollar_key",
            lambda d: any(key.startswith("$") for v in values(d)[1:] if isinstance(v, dict) for key in v),
        ),
        ("top_level_key", lambda d: any(key == "" or "." in key or key.startswith("$") for key in d)),
        ("string_id", lambda d: isinstance(d["_id"], str)),
    ],
)
def test_a_kind_is_what_it_says(collection: str, kind: str, holds: Any) -> None:
    assert all(holds(document) for document in struck(collection, kind))


def test_both_shapes_and_all_date_texts_occur() -> None:
    shapes = struck("users", "string_or_object")
    for name in ("settings", "guestMetadata", "profilePicture"):
        assert {type(d.get(name)) for d in shapes} >= {str, dict}, name
    texts = [
        d[name] for d in struck("users", "date_as_string") for name in ("createdAt", "updatedAt", "lastLogin")
    ]
    written = {type(text) for text in texts}
    assert str in written
    assert any(isinstance(text, str) and text.endswith("(Coordinated Universal Time)") for text in texts)


def test_friend_lists_go_wrong() -> None:
    ids = {str(d["_id"]) for d in map(plain, users(SEED, 200, DirtRates.none()))}
    assert all(len(set(d["friends"])) < len(d["friends"]) for d in struck("users", "duplicate_friend"))
    assert all(d["_id"] in d["friends"] for d in struck("users", "self_friend"))
    assert all(any(str(f) not in ids for f in d["friends"]) for d in struck("users", "dangling_reference"))


def test_the_oldest_documents_lack_what_came_later() -> None:
    later = {"lastLogin", "profilePicture", "friends", "guestMetadata"}
    assert all(not later & d.keys() for d in struck("users", "missing_later_fields"))
    assert all("role" not in d for d in struck("users", "missing_role"))


def test_near_limit_documents_are_counted_and_fit() -> None:
    rates = DirtRates(near_limit_documents=2)
    large = [
        one
        for one in documents_of("users", Population(SEED, 5, rates), 5)
        if "near_limit_documents" in one.kinds
    ]
    sizes = [len(bson_of(one.document)) for one in large]
    assert len(sizes) == 2
    assert all(16 * 1024 * 1024 - 64 * 1024 < size < 16 * 1024 * 1024 for size in sizes)
    picture = large[0].document["profilePicture"]
    assert 9 * 1024 * 1024 < len(picture) <= 10 * 1024 * 1024


# --- users ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def clean_users() -> list[dict[str, Any]]:
    return [plain(document) for document in users(SEED, 4000, DirtRates.none())]


def test_users_are_as_mongoose_wrote_them(clean_users: list[dict[str, Any]]) -> None:
    orders = Counter(tuple(document) for document in clean_users)
    assert orders.most_common(1)[0][0] == tuple(USERS_IN_ORDER)
    # Older than the later fields: a login appended them behind __v.
    assert all(order[:4] == tuple(USERS_IN_ORDER[:4]) for order in orders)
    assert all(isinstance(document["__v"], int) for document in clean_users)
    ids = [document["_id"] for document in clean_users]
    assert len(set(ids)) == len(ids)
    assert all(
        abs((i.generation_time - d["createdAt"]).total_seconds()) < 1
        for i, d in zip(ids, clean_users, strict=True)
    )


def test_users_are_distributed_as_found(clean_users: list[dict[str, Any]]) -> None:
    roles = Counter(document["role"] for document in clean_users)
    assert 0.18 < roles["guest"] / len(clean_users) < 0.26
    assert 1 <= roles["admin"] < 0.01 * len(clean_users)
    for document in clean_users:
        assert (document["passwordHash"] is None) == (document["role"] == "guest")
        assert BEGIN <= document["createdAt"] <= document["updatedAt"] <= AS_OF
    pictures = [d["profilePicture"] for d in clean_users if d.get("profilePicture")]
    assert 0.05 < len(pictures) / len(clean_users) < 0.15
    recent = [d for d in clean_users if d["lastLogin"] and (AS_OF - d["lastLogin"]).days < 40]
    assert 0.2 < len(recent) / len(clean_users) < 0.6


def test_clean_friends_are_mutual_with_a_long_tail(clean_users: list[dict[str, Any]]) -> None:
    friends = {document["_id"]: document["friends"] for document in clean_users}
    lengths = Counter(len(each) for each in friends.values())
    assert lengths[0] > len(friends) * 0.2
    assert max(lengths) <= 20
    assert sum(n for length, n in lengths.items() if length > 10) > 20
    assert all(owner in friends[friend] for owner, each in friends.items() for friend in each)
    assert all(len(set(each)) == len(each) and owner not in each for owner, each in friends.items())


def test_pictures_are_the_images_they_say(clean_users: list[dict[str, Any]]) -> None:
    formats = {
        "image/png": "PNG",
        "image/jpeg": "JPEG",
        "image/jpg": "JPEG",
        "image/webp": "WEBP",
        "image/gif": "GIF",
    }
    seen = set()
    for picture in {d["profilePicture"] for d in clean_users if d.get("profilePicture")}:
        head, _, data = picture.partition(";base64,")
        seen.add(head.removeprefix("data:"))
        assert Image.open(io.BytesIO(base64.b64decode(data))).format == formats[head.removeprefix("data:")]
        assert len(picture) >= 100
    assert seen == formats.keys()


@pytest.mark.parametrize(("password", "hashed"), [*list(PASSWORDS.items())[:2], *FOREIGN_PASSWORDS.items()])
def test_password_hashes_are_real(password: str, hashed: str) -> None:
    assert bcrypt.checkpw(password.encode(), hashed.encode())
    assert hashed.startswith("$2a$12$" if password in PASSWORDS else "$2b$10$")


def test_users_are_made_as_they_are_asked_for() -> None:
    first = next(iter(users(SEED, 50_000_000)))
    assert first["role"] == "admin"


# --- the rest -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def identities() -> list[dict[str, Any]]:
    population = Population(SEED, 2500, DirtRates.none())
    return [plain(one.document) for one in documents_of("playeridentities", population, 2750)]


def test_merged_identities_come_in_chains_and_know_each_other(identities: list[dict[str, Any]]) -> None:
    by_id = {document["_id"]: document for document in identities}
    merged = [document for document in identities if document["mergedInto"]]
    chains = [document for document in merged if by_id[document["mergedInto"]]["mergedInto"]]
    assert len(merged) > 40
    assert chains
    for document in merged:
        linked = [entry["identityId"] for entry in by_id[document["mergedInto"]]["linkedIdentities"]]
        assert linked.count(document["_id"]) == 1
        assert document["type"] == "imported"
        seen = set()
        at: Any = document
        while at["mergedInto"]:
            assert at["_id"] not in seen
            seen.add(at["_id"])
            at = by_id[at["mergedInto"]]
    deleted = [document for document in merged if document["isDeleted"]]
    assert 0 < len(deleted) < len(merged) / 2


def test_a_cycle_leads_back() -> None:
    documents = [plain(one.document) for one in documents_of("playeridentities", only("merge_cycle"), 600)]
    by_id = {document["_id"]: document for document in documents}
    struck = [one for one in documents_of("playeridentities", only("merge_cycle"), 600) if one.kinds]
    assert struck
    for one in struck:
        there = by_id[one.document["mergedInto"]]
        assert there["mergedInto"] == one.document["_id"]


def test_identities_are_distributed_as_found(identities: list[dict[str, Any]]) -> None:
    assert {document["type"] for document in identities} == {"user", "guest", "imported"}
    assert all(d["normalizedName"] == d["displayName"].lower().strip() for d in identities)
    assert any(document["nameHistory"] for document in identities)
    assert any(document["aliases"] for document in identities)
    assert any("eloByGameType" not in document for document in identities)
    longest = 0
    for document in identities:
        for game_type, elo in document.get("eloByGameType", {}).items():
            dates = [entry["date"] for entry in elo["history"]]
            assert dates == sorted(dates, reverse=True)
            assert elo["floor"] <= elo["rating"] <= elo["peak"]
            assert elo["history"][0]["rating"] == elo["rating"]
            assert isinstance(elo["_id"], ObjectId)
            assert game_type == game_type.lower()
            assert "." not in game_type
            longest = max(longest, len(dates))
    assert longest == 50
    live = Counter(
        d["userId"] for d in identities if d["userId"] and not d["isDeleted"] and not d["mergedInto"]
    )
    assert max(live.values()) == 1


def test_a_user_has_two_live_identities() -> None:
    owners: Counter[Any] = Counter()
    for one in documents_of("playeridentities", only("second_identity"), 660):
        owners[one.document["userId"]] += (
            one.document["userId"] is not None and one.document["mergedInto"] is None
        )
    assert max(owners.values()) >= 2


def test_an_identity_is_linked_twice() -> None:
    for document in struck("playeridentities", "linked_twice"):
        linked = [entry["identityId"] for entry in document["linkedIdentities"]]
        assert len(set(linked)) < len(linked)


def test_requests_name_each_pair_once() -> None:
    requests = [plain(document) for document in friend_requests(SEED, 1200, DirtRates.none(), users=2000)]
    pairs = Counter((document["sender"], document["receiver"]) for document in requests)
    assert len(pairs) == len(requests) == 1200
    assert {document["status"] for document in requests} == {"pending", "accepted", "rejected"}
    assert all(sender != receiver for sender, receiver in pairs)


@pytest.mark.parametrize("n", [0, 1, 2, 7])
def test_tiny_databases_are_possible(n: int) -> None:
    for collection, size in sizes_for(n, {"games": 3, "playeridentities": 3, "friendrequests": 5}).items():
        assert len(list(documents_of(collection, Population(SEED, n, DirtRates.all(0.5)), size))) <= size


def test_games_have_their_formats() -> None:
    found: list[Labelled] = [*documents_of("wizard", Population(SEED, 500, DirtRates.none()), 800)]
    documents = [plain(one.document) for one in found]
    for document in documents:
        data = document["gameData"]
        assert data["version"] == "3.0"
        assert len(data["players"]) >= 3
        totals = Counter()  # type: ignore[var-annotated]
        for entry in (entry for each in data["round_data"] for entry in each["players"]):
            totals[entry["id"]] += entry["score"]
        assert all(data["final_scores"][player] == totals[player] for player in data["final_scores"])
    sizes = sorted(len(bson_of(one.document)) for one in found)
    assert sizes[len(sizes) // 2] < 16 * 1024
    assert 30 * 1024 < sizes[-1] < 700 * 1024
    assert {type(document["userId"]) for document in documents} == {ObjectId, str}
    named = {type(p.get("identityId")) for document in documents for p in document["gameData"]["players"]}
    assert named == {ObjectId, str, type(None)}
    versions = {plain(document)["gameData"]["version"] for document in islice(games(SEED, 60), 60)}
    assert versions == {"1.0", "2.0"}


def test_table_games_are_sometimes_nested_and_sometimes_empty() -> None:
    documents = [plain(document) for document in table_games(SEED, 600, DirtRates.none())]
    assert all(isinstance(document["userId"], ObjectId) for document in documents)
    assert any("gameData" in document.get("gameData", {}) for document in documents)
    assert any("gameData" not in document for document in documents)
    assert len({document["localId"] for document in documents}) == len(documents)


def test_name_kinds_are_kinds() -> None:
    assert set(NAME_KINDS) <= set(RATED_KINDS)
    assert {kind for kinds in KINDS.values() for kind in kinds} == set(RATED_KINDS)
