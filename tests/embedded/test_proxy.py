"""The fault proxy: each mode and each fault does exactly what it says, in front of real servers."""

import asyncio
import time

import psycopg
import pymongo
import pymongo.errors
import pytest
import redis
import redis.exceptions

from crossfade.testing import FaultProxy


@pytest.fixture
def table(database_url):
    """A connection past the proxy, with a table `t (n int)`."""
    with psycopg.connect(database_url, autocommit=True) as connection:
        connection.execute("CREATE TABLE t (n int)")
        yield connection


@pytest.fixture
def mongo_client(mongo_proxy):
    """A client through the proxy that does not try anything twice."""
    with pymongo.MongoClient(
        mongo_proxy.uri,
        retryWrites=False,
        retryReads=False,
        serverSelectionTimeoutMS=2000,
        socketTimeoutMS=2000,
    ) as client:
        client.admin.command("ping")
        yield client


@pytest.fixture
def direct(mongo_uri):
    """The same MongoDB database, past the proxy."""
    with pymongo.MongoClient(mongo_uri) as client:
        yield client.get_default_database()


def rows(connection):
    return connection.execute("SELECT count(*) FROM t").fetchone()[0]


def insert(proxy, value=1, **options):
    with psycopg.connect(proxy.uri, autocommit=True, **options) as connection:
        connection.execute("INSERT INTO t VALUES (%s)", (value,))


def test_it_passes_through_and_keeps_user_database_and_options(postgres_proxy, table):
    insert(postgres_proxy)
    assert rows(table) == 1
    assert postgres_proxy.counts.connections == 1
    assert postgres_proxy.counts.faults == 0


def test_a_large_copy_both_ways_arrives_whole(postgres_proxy, table):
    with psycopg.connect(postgres_proxy.uri, autocommit=True) as connection, connection.cursor() as cursor:
        with cursor.copy("COPY t FROM STDIN") as copy:
            for start in range(0, 200_000, 1000):
                copy.write("".join(f"{n}\n" for n in range(start, start + 1000)))
        with cursor.copy("COPY t TO STDOUT") as copy:
            assert sum(bytes(piece).count(b"\n") for piece in copy) == 200_000
    assert rows(table) == 200_000


def test_refuse_turns_away_new_connections_and_resets_the_open_ones(postgres_proxy, table):
    with psycopg.connect(postgres_proxy.uri, autocommit=True) as connection:
        postgres_proxy.refuse()
        with pytest.raises(psycopg.OperationalError):
            connection.execute("SELECT 1")
    with pytest.raises(psycopg.OperationalError, match="refused"):
        psycopg.connect(postgres_proxy.uri)
    postgres_proxy.pass_through()
    insert(postgres_proxy)
    assert rows(table) == 1


def test_delay_holds_back_each_direction(postgres_proxy, table):
    with psycopg.connect(postgres_proxy.uri, autocommit=True) as connection:
        postgres_proxy.delay(0.2)
        started = time.monotonic()
        connection.execute("SELECT 1")
        assert 0.4 <= time.monotonic() - started < 2
        postgres_proxy.delay(0)
        started = time.monotonic()
        connection.execute("SELECT 1")
        assert time.monotonic() - started < 0.15


def test_cut_resets_the_open_connections_and_serves_new_ones(postgres_proxy, table):
    with psycopg.connect(postgres_proxy.uri) as connection:
        assert postgres_proxy.cut() == 1
        with pytest.raises(psycopg.OperationalError):
            connection.execute("SELECT 1")
    insert(postgres_proxy)
    assert postgres_proxy.counts.cut == 1


def test_swallow_answers_delivers_and_stays_silent(mongo_proxy, mongo_client, direct):
    mongo_proxy.swallow_answers()
    with pytest.raises(pymongo.errors.NetworkTimeout):
        mongo_client.get_default_database().things.insert_one({"_id": 1})
    assert direct.things.count_documents({"_id": 1}) == 1
    assert mongo_proxy.counts.swallowed > 0
    assert mongo_proxy.connections > 0
    mongo_proxy.pass_through()
    mongo_client.get_default_database().things.insert_one({"_id": 2})


def test_cut_before_request_does_not_deliver_a_commit(postgres_proxy, table):
    connection = psycopg.connect(postgres_proxy.uri)
    connection.execute("INSERT INTO t VALUES (1)")
    postgres_proxy.cut_before_request(when=lambda request: b"COMMIT" in request)
    with pytest.raises(psycopg.OperationalError):
        connection.commit()
    assert rows(table) == 0
    assert postgres_proxy.counts.faults == 1


def test_cut_after_request_cuts_a_commit_that_was_made(postgres_proxy, table):
    connection = psycopg.connect(postgres_proxy.uri)
    connection.execute("INSERT INTO t VALUES (1)")
    postgres_proxy.cut_after_request(when=lambda request: b"COMMIT" in request)
    with pytest.raises(psycopg.OperationalError):
        connection.commit()
    # At once, without waiting: the server had answered before the connection was cut.
    assert rows(table) == 1
    assert postgres_proxy.counts.faults == 1
    assert postgres_proxy.counts.unanswered == 0


def test_a_prepared_statement_with_parameters_is_one_request(postgres_proxy, table):
    with psycopg.connect(postgres_proxy.uri, autocommit=True, prepare_threshold=0) as connection:
        connection.execute("INSERT INTO t VALUES (%s)", (1,))
        before = postgres_proxy.counts.requests
        connection.execute("INSERT INTO t VALUES (%s)", (2,))
        assert postgres_proxy.counts.requests == before + 1
        postgres_proxy.cut_after_request()
        with pytest.raises(psycopg.OperationalError):
            connection.execute("INSERT INTO t VALUES (%s)", (3,))
    assert rows(table) == 3


def test_cut_after_a_copy_leaves_its_rows(postgres_proxy, table):
    def copy_three():
        with (
            psycopg.connect(postgres_proxy.uri, autocommit=True) as connection,
            connection.cursor() as cursor,
            cursor.copy("COPY t FROM STDIN") as copy,
        ):
            # The COPY statement itself has been answered; the next request ends the data.
            postgres_proxy.cut_after_request()
            copy.write("1\n2\n3\n")

    with pytest.raises(psycopg.OperationalError):
        copy_three()
    assert rows(table) == 3
    assert postgres_proxy.counts.unanswered == 0


def test_a_pipeline_is_cut_after_its_sync(postgres_proxy, table):
    connection = psycopg.connect(postgres_proxy.uri, autocommit=True)
    postgres_proxy.cut_after_request(when=lambda request: b"INSERT" in request)
    with pytest.raises(psycopg.OperationalError), connection.pipeline():  # noqa: PT012 - one round trip
        connection.execute("INSERT INTO t VALUES (1)")
        connection.execute("INSERT INTO t VALUES (2)")
    assert rows(table) == 2


def test_a_login_is_no_request_unless_it_is_meant(postgres_proxy, table):
    postgres_proxy.cut_before_request()
    with psycopg.connect(postgres_proxy.uri) as connection, pytest.raises(psycopg.OperationalError):
        connection.execute("SELECT 1")
    postgres_proxy.cut_before_request(
        when=lambda request: b"application_name" in request or b"user" in request
    )
    with pytest.raises(psycopg.OperationalError):
        psycopg.connect(postgres_proxy.uri)


@pytest.mark.parametrize(("fault", "arrived"), [("cut_before_request", 0), ("cut_after_request", 1)])
def test_the_next_mongo_request_is_cut(mongo_proxy, mongo_client, direct, fault, arrived):
    getattr(mongo_proxy, fault)()
    with pytest.raises(pymongo.errors.AutoReconnect):
        mongo_client.get_default_database().things.insert_one({"_id": 1})
    assert direct.things.count_documents({}) == arrived
    assert mongo_proxy.counts.faults == 1
    # Only the next one.
    mongo_client.get_default_database().things.insert_one({"_id": 2})
    assert direct.things.count_documents({}) == arrived + 1


def test_a_predicate_chooses_the_mongo_request(mongo_proxy, mongo_client, direct):
    mongo_proxy.cut_after_request(when=lambda request: b"findAndModify" in request)
    things = mongo_client.get_default_database().things
    things.insert_one({"_id": 1, "n": 0})
    with pytest.raises(pymongo.errors.AutoReconnect):
        things.find_one_and_update({"_id": 1}, {"$inc": {"n": 1}})
    assert direct.things.find_one({"_id": 1})["n"] == 1


def test_several_requests_in_a_row(mongo_proxy, mongo_client, direct):
    mongo_proxy.cut_after_request(3)
    for number in range(3):
        with pytest.raises(pymongo.errors.AutoReconnect):
            mongo_client.get_default_database().things.insert_one({"_id": number})
    mongo_client.get_default_database().things.insert_one({"_id": 3})
    assert direct.things.count_documents({}) == 4
    assert mongo_proxy.counts.faults == 3


def test_a_large_document_is_one_request(mongo_proxy, mongo_client, direct):
    before = mongo_proxy.counts.requests
    mongo_client.get_default_database().things.insert_one({"_id": 1, "text": "x" * 5_000_000})
    assert mongo_proxy.counts.requests == before + 1
    assert len(direct.things.find_one()["text"]) == 5_000_000


def test_redis_is_cut_after_it_acted(redis_proxy, redis_url):
    through = redis.Redis.from_url(redis_proxy.uri, retry=None)
    through.ping()
    redis_proxy.cut_after_request()
    with pytest.raises(redis.exceptions.ConnectionError):
        through.set("key", "value")
    direct = redis.Redis.from_url(redis_url)
    assert direct.get("key") == b"value"
    through.close()
    direct.close()


async def test_it_works_from_an_async_test(postgres_proxy, table):
    connection = await psycopg.AsyncConnection.connect(postgres_proxy.uri, autocommit=True)
    postgres_proxy.cut_after_request()
    with pytest.raises(psycopg.OperationalError):
        await asyncio.wait_for(connection.execute("INSERT INTO t VALUES (1)"), 5)
    assert rows(table) == 1


def test_a_server_that_is_down_looks_like_a_reset():
    with FaultProxy("redis://127.0.0.1:1/0") as proxy:
        client = redis.Redis.from_url(proxy.uri, retry=None)
        with pytest.raises(redis.exceptions.ConnectionError):
            client.ping()
        client.close()


def test_closing_twice_is_harmless():
    proxy = FaultProxy("redis://127.0.0.1:1/0")
    proxy.close()
    proxy.close()
