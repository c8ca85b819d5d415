"""The fixtures of the pytest plugin, on the run's shared servers."""

import psycopg
import pymongo
import redis


def test_each_store_answers(mongo_uri, database_url, redis_url):
    with pymongo.MongoClient(mongo_uri) as client:
        database = client.get_default_database()
        database.things.insert_one({"_id": 1})
        assert database.things.count_documents({}) == 1
    with psycopg.connect(database_url) as connection:
        assert connection.execute("SELECT 1").fetchone() == (1,)
        assert connection.execute("SHOW synchronous_commit").fetchone() == ("on",)
    client = redis.Redis.from_url(redis_url)
    assert client.dbsize() == 0
    client.set("key", "value")
    client.close()
