-- Crossfade's own tables in PostgreSQL, in a schema of their own. Idempotent: `crossfade init` runs it
-- under an advisory lock; a change of shape raises the number at the end and adds ALTERs above it.
CREATE SCHEMA IF NOT EXISTS crossfade;

CREATE TABLE IF NOT EXISTS crossfade.meta (
    name  text PRIMARY KEY,
    value text NOT NULL
);

-- Where each migration stands. `record` is the whole control record; `epoch` is apart because every writing
-- transaction reads it under a shared advisory lock.
CREATE TABLE IF NOT EXISTS crossfade.control (
    migration text PRIMARY KEY,
    epoch     bigint NOT NULL,
    record    jsonb  NOT NULL
);

-- Who changed the control record, and why: one row per version that a person or a coordinator made.
CREATE TABLE IF NOT EXISTS crossfade.history (
    migration  text NOT NULL,
    epoch      bigint NOT NULL,
    phase      text NOT NULL,
    changed_at timestamptz NOT NULL DEFAULT now(),
    changed_by text NOT NULL,
    reason     text NOT NULL
);
ALTER TABLE crossfade.history ADD COLUMN IF NOT EXISTS version bigint,
    ADD COLUMN IF NOT EXISTS state text NOT NULL DEFAULT 'steady';
-- One epoch has several versions; before there was a version, no epoch had two rows, and none is above its version.
UPDATE crossfade.history SET version = epoch WHERE version IS NULL;
ALTER TABLE crossfade.history DROP CONSTRAINT IF EXISTS history_pkey;
CREATE UNIQUE INDEX IF NOT EXISTS history_by_version ON crossfade.history (migration, version);

-- Every process that may acknowledge writes. `entry` says what it has acknowledged; `seen_at` is for people: nothing
-- is decided by a clock that others read.
CREATE TABLE IF NOT EXISTS crossfade.workers (
    migration text NOT NULL,
    worker    text NOT NULL,
    beat      bigint NOT NULL,     -- +1 with every sign of life
    entry     jsonb NOT NULL,
    seen_at   timestamptz NOT NULL DEFAULT clock_timestamp(),
    PRIMARY KEY (migration, worker)
);

-- A deleted record: no image at or under `rev` may come back. Kept until `retire`.
CREATE TABLE IF NOT EXISTS crossfade.tombstones (
    entity     text NOT NULL,
    id         text COLLATE "C" NOT NULL,
    rev        bigint NOT NULL,
    op         uuid,
    deleted_at timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (entity, id)
);

-- PostgreSQL primary: one row per record that MongoDB has not confirmed, written in the data's transaction.
CREATE TABLE IF NOT EXISTS crossfade.outbox (
    entity      text NOT NULL,
    id          text COLLATE "C" NOT NULL,
    rev         bigint NOT NULL,
    op          uuid NOT NULL,
    epoch       bigint NOT NULL,
    base_digest bytea,            -- what the last confirmed delivery left in MongoDB; NULL: nothing
    tentative   jsonb,            -- ROLLBACK_BOTH: the values before, until success may be told
    parked      text,             -- why MongoDB refuses it
    since       timestamptz NOT NULL DEFAULT now(),
    parts       text[] NOT NULL DEFAULT '{}', -- those written since the last confirmed delivery
    PRIMARY KEY (entity, id)
);

-- The open ROLLBACK_BOTH writes: a handful, whatever else is owed.
CREATE INDEX IF NOT EXISTS outbox_open ON crossfade.outbox (entity) WHERE tentative IS NOT NULL;

-- Content that lost against the primary and that no revision of the primary ever held: kept for a person.
CREATE TABLE IF NOT EXISTS crossfade.conflicts (
    number    bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    entity    text NOT NULL,
    id        text COLLATE "C" NOT NULL,
    cause     text NOT NULL,
    store     text NOT NULL,       -- whose content it was
    rev       bigint,
    document  bytea NOT NULL,      -- BSON, whole
    seen_at   timestamptz NOT NULL DEFAULT now()
);

-- Documents that cannot be carried to PostgreSQL unchanged, whole, with the reason.
CREATE TABLE IF NOT EXISTS crossfade.quarantine (
    entity     text NOT NULL,
    id         text COLLATE "C" NOT NULL,
    reason     text NOT NULL,
    field      text,
    rev        bigint NOT NULL,
    digest     bytea NOT NULL,
    document   bytea NOT NULL,     -- BSON, as found
    first_seen timestamptz NOT NULL DEFAULT now(),
    last_seen  timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (entity, id)
);

-- A person accepts that a document is not carried: by name, and as long as it is this one.
ALTER TABLE crossfade.quarantine ADD COLUMN IF NOT EXISTS waived_digest bytea,
    ADD COLUMN IF NOT EXISTS waived_by text,
    ADD COLUMN IF NOT EXISTS waived_reason text,
    ADD COLUMN IF NOT EXISTS waived_at timestamptz;

-- One row per bulk run of an entity; the work is in `ranges`.
CREATE TABLE IF NOT EXISTS crossfade.runs (
    run         uuid PRIMARY KEY,
    migration   text NOT NULL,
    entity      text NOT NULL,
    kind        text NOT NULL,     -- backfill, verify, sweep
    epoch       bigint NOT NULL,   -- evidence counts only for the epoch's life
    state       text NOT NULL,     -- running, complete, abandoned
    counts      jsonb NOT NULL DEFAULT '{}',
    settings    jsonb NOT NULL DEFAULT '{}',
    steering    jsonb NOT NULL DEFAULT '{}',  -- what a person, or the throttle, asks of its workers while it runs
    started_at  timestamptz NOT NULL DEFAULT now(),
    updated_at  timestamptz NOT NULL DEFAULT now(),
    finished_at timestamptz
);
CREATE INDEX IF NOT EXISTS runs_by_entity ON crossfade.runs (migration, entity, kind, started_at);
ALTER TABLE crossfade.runs ADD COLUMN IF NOT EXISTS steering jsonb NOT NULL DEFAULT '{}';
ALTER TABLE crossfade.runs DROP COLUMN IF EXISTS position, DROP COLUMN IF EXISTS pending;

-- A run is done in pieces of the collection, each by whoever has its lease. The checkpoint is written in the
-- transaction of the rows that it stands for.
CREATE TABLE IF NOT EXISTS crossfade.ranges (
    run          uuid NOT NULL REFERENCES crossfade.runs (run) ON DELETE CASCADE,
    number       integer NOT NULL,
    after        bytea,             -- BSON {_id: ...}: the ids above this one; NULL: from the first one on
    last         bytea,             -- up to and including this one; NULL: to the last one
    position     bytea,             -- BSON {_id: last id done}; NULL: at the beginning
    pending      bytea,             -- BSON: what the last chunk left to do after its commit; NULL: nothing
    counts       jsonb NOT NULL DEFAULT '{}',
    state        text NOT NULL DEFAULT 'open',  -- open, complete
    lease        uuid,              -- of whoever works on it; NULL: nobody does
    leased_by    text,              -- the same for a person: host and process
    backend      integer,           -- its session: when that is gone, so is the lease
    leased_until timestamptz,
    PRIMARY KEY (run, number)
);

-- Whether somebody works on it. Whose session is gone has lost the lease; one that this user cannot see counts as gone,
-- which costs a worker its chunk and nothing else.
CREATE OR REPLACE FUNCTION crossfade.is_leased(r crossfade.ranges) RETURNS boolean LANGUAGE sql VOLATILE AS $$
    SELECT r.lease IS NOT NULL AND r.leased_until > clock_timestamp()
       AND EXISTS (SELECT FROM pg_stat_activity AS a WHERE a.pid = r.backend)
$$;

-- Indexes and foreign keys that a backfill has put aside to load an empty table, until it makes them anew.
CREATE TABLE IF NOT EXISTS crossfade.aside (
    entity     text NOT NULL,
    table_name text NOT NULL,
    name       text NOT NULL,
    kind       text NOT NULL,      -- index, reference
    definition text NOT NULL,
    since      timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (table_name, name)
);

-- What a verify found to differ, for `crossfade repair` and for a person.
CREATE TABLE IF NOT EXISTS crossfade.findings (
    run     uuid NOT NULL REFERENCES crossfade.runs (run) ON DELETE CASCADE,
    id      text COLLATE "C" NOT NULL,
    finding text NOT NULL,
    fields  text[] NOT NULL,
    seen_at timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (run, id)
);

-- What a verify saw chunk by chunk, to be checked with SQL: how many rows have ids above `first` and up to `last`, and
-- the md5 of their lines `id rev digest` (`id rev` in fast mode), as docs/protocol.md says.
CREATE TABLE IF NOT EXISTS crossfade.chunks (
    run       uuid NOT NULL REFERENCES crossfade.runs (run) ON DELETE CASCADE,
    first     text COLLATE "C" NOT NULL,
    last      text COLLATE "C" NOT NULL,
    documents bigint NOT NULL,
    checksum  text NOT NULL,
    PRIMARY KEY (run, first, last)
);

-- Who repaired which record, when, and what it was before and after.
CREATE TABLE IF NOT EXISTS crossfade.repairs (
    number     bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    run        uuid,               -- of the verify that found it
    entity     text NOT NULL,
    id         text COLLATE "C" NOT NULL,
    finding    text NOT NULL,
    action     text NOT NULL,
    done_by    text NOT NULL,
    rev_before bigint,             -- the row's; NULL: there was none
    before     bytea,              -- BSON of the document that the row gave back
    rev_after  bigint,
    after      bytea,
    done_at    timestamptz NOT NULL DEFAULT now()
);

-- How many shadow reads were compared, added up by all workers: since the phase was entered (at epoch `entered`), under
-- these versions of the mappings.
CREATE TABLE IF NOT EXISTS crossfade.shadow (
    migration text NOT NULL,
    mapping   text NOT NULL,
    entered   bigint NOT NULL,
    equal     bigint NOT NULL DEFAULT 0,
    mismatch  bigint NOT NULL DEFAULT 0,
    unsettled bigint NOT NULL DEFAULT 0,
    dropped   bigint NOT NULL DEFAULT 0,
    failed    bigint NOT NULL DEFAULT 0,
    since     timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (migration, mapping, entered)
);

-- Records of which the two stores gave different answers: revisions and names of fields, never values.
CREATE TABLE IF NOT EXISTS crossfade.mismatches (
    entity       text NOT NULL,
    id           text COLLATE "C" NOT NULL,
    cause        text NOT NULL,
    fields       text[] NOT NULL,
    question     text NOT NULL,     -- how it was asked for
    mongo        bigint,            -- revisions when it was seen last; NULL: none
    postgres     bigint,
    seen         bigint NOT NULL,
    first_seen   timestamptz NOT NULL DEFAULT now(),
    last_seen    timestamptz NOT NULL DEFAULT now(),
    resolved_at  timestamptz,       -- NULL: open
    resolved_by  text,
    resolved_why text,
    PRIMARY KEY (entity, id)
);

ALTER TABLE crossfade.outbox ADD COLUMN IF NOT EXISTS parts text[] NOT NULL DEFAULT '{}';

INSERT INTO crossfade.meta (name, value) VALUES ('schema', '4')
ON CONFLICT (name) DO UPDATE SET value = EXCLUDED.value;
