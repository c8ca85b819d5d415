-- Every fixed statement that Crossfade sends to PostgreSQL, by name. Statements on an entity's own tables are
-- composed in `stores/postgres.py` from the entity's declaration.

-- name: lock
-- Shared with every writing transaction, so that a change of epoch (exclusive) waits for those under way. Then the
-- records: an id without a row has nothing else to lock, and the numbering must not skip a tombstone, nor a delete miss
-- a row that is not committed yet.
SELECT pg_advisory_xact_lock_shared(hashtextextended('crossfade:' || %(migration)s, 0)),
       (SELECT count(pg_advisory_xact_lock(hashtextextended(record, 1))::text) FROM unnest(%(records)s::text[]) AS record)

-- name: lock_deletes
-- The last thing before a delete commits; a chunk of a backfill takes it exclusively and then looks for tombstones, so none
-- commits between that look and the chunk's commit, and is told of while the chunk shows what it deleted.
SELECT pg_advisory_xact_lock_shared(hashtextextended('crossfade:' || %(entity)s, 4))

-- name: claim
SELECT pg_try_advisory_xact_lock(hashtextextended('crossfade:' || %(work)s, 2))

-- name: by_index
-- For this transaction: whatever a plan guesses, a few hundred records are found by their ids.
SELECT set_config(name, 'off', true) FROM unnest(ARRAY['enable_hashjoin', 'enable_mergejoin', 'enable_seqscan']) AS name

-- name: lock_exclusive
SELECT pg_advisory_xact_lock(hashtextextended('crossfade:' || %(migration)s, 0))

-- name: end_silent
-- Sessions that hold the shared lock and wait for their client, each with what another word of that client's changes.
-- Those of which just the same was seen before are ended. (A client that is stopped between two statements of a pipeline
-- is not idle in transaction to the server, so no time-out of the server's ends it. One that sends the rows of a COPY, or
-- that a long statement kept waiting, is heard of later than its state has changed.)
SELECT mark, CASE WHEN mark = ANY(%(seen)s::text[]) THEN pg_terminate_backend(pid) END
FROM (
    SELECT pid, concat_ws(' ', pid, a.backend_start, a.state_change, c.bytes_processed) AS mark
    FROM pg_locks AS l JOIN pg_stat_activity AS a USING (pid) LEFT JOIN pg_stat_progress_copy AS c USING (pid)
    WHERE l.locktype = 'advisory' AND l.granted AND l.mode = 'ShareLock' AND l.objsubid = 1
      AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database())
      AND (l.classid::bigint << 32 | l.objid::bigint) = hashtextextended('crossfade:' || %(migration)s, 0)
      AND a.wait_event = 'ClientRead'
) AS holding

-- name: epoch_is
SELECT EXISTS (SELECT FROM crossfade.control WHERE migration = %(migration)s AND epoch = %(epoch)s)

-- name: control
SELECT record FROM crossfade.control WHERE migration = %(migration)s

-- name: control_insert
INSERT INTO crossfade.control (migration, epoch, record) VALUES (%(migration)s, %(epoch)s, %(record)s::jsonb)
ON CONFLICT (migration) DO NOTHING

-- name: control_change
UPDATE crossfade.control SET epoch = %(epoch)s, record = %(record)s::jsonb
WHERE migration = %(migration)s AND (record->>'version')::bigint = %(expected)s

-- name: control_copy
-- The copy of a record that the other store decided; an older one never replaces a newer one.
INSERT INTO crossfade.control AS c (migration, epoch, record)
VALUES (%(migration)s, %(epoch)s, %(record)s::jsonb)
ON CONFLICT (migration) DO UPDATE SET epoch = EXCLUDED.epoch, record = EXCLUDED.record
WHERE (c.record->>'version')::bigint < (EXCLUDED.record->>'version')::bigint

-- name: history_insert
INSERT INTO crossfade.history (migration, version, epoch, phase, state, changed_at, changed_by, reason)
VALUES (%(migration)s, %(version)s, %(epoch)s, %(phase)s, %(state)s, coalesce(nullif(%(changed_at)s, '')::timestamptz,
        now()), %(changed_by)s, %(reason)s)
ON CONFLICT (migration, version) DO NOTHING

-- name: history
SELECT version, epoch, phase, state,
       to_char(changed_at AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.MS"+00:00"'), changed_by, reason
FROM crossfade.history WHERE migration = %(migration)s AND version > %(after)s ORDER BY version

-- name: worker_put
INSERT INTO crossfade.workers (migration, worker, beat, entry)
VALUES (%(migration)s, %(worker)s, %(beat)s, %(entry)s::jsonb)
ON CONFLICT (migration, worker) DO UPDATE SET beat = EXCLUDED.beat, entry = EXCLUDED.entry, seen_at = clock_timestamp()

-- name: workers
SELECT worker, entry, greatest(extract(epoch FROM clock_timestamp() - seen_at), 0)::float8
FROM crossfade.workers WHERE migration = %(migration)s

-- name: worker_drop
DELETE FROM crossfade.workers
WHERE migration = %(migration)s AND worker = %(worker)s AND beat = coalesce(%(beat)s::bigint, beat)

-- name: schema_version
SELECT value FROM crossfade.meta WHERE name = 'schema'

-- name: bury
INSERT INTO crossfade.tombstones AS t (entity, id, rev, op)
SELECT %(entity)s, d.* FROM unnest(%(ids)s::text[], %(revs)s::bigint[], %(ops)s::uuid[]) AS d
WHERE EXISTS (SELECT FROM crossfade.control WHERE migration = %(migration)s AND epoch = %(epoch)s)
ON CONFLICT (entity, id) DO UPDATE SET rev = EXCLUDED.rev, op = EXCLUDED.op, deleted_at = now()
WHERE t.rev < EXCLUDED.rev

-- name: tombstone
SELECT rev, op FROM crossfade.tombstones WHERE entity = %(entity)s AND id = %(id)s

-- name: outbox_put
-- One row per record: a later write replaces the note, but not what the last confirmed delivery left behind, and adds
-- the parts that it wrote.
INSERT INTO crossfade.outbox AS o (entity, id, rev, op, epoch, base_digest, tentative, parts)
VALUES (%(entity)s, %(id)s, %(rev)s, %(op)s::uuid, %(epoch)s, %(base_digest)s, %(tentative)s::jsonb, %(parts)s)
ON CONFLICT (entity, id) DO UPDATE
SET rev = EXCLUDED.rev, op = EXCLUDED.op, epoch = EXCLUDED.epoch, tentative = EXCLUDED.tentative, parked = NULL,
    parts = ARRAY(SELECT DISTINCT unnest(o.parts || EXCLUDED.parts))

-- name: outbox_follow
-- Once MongoDB is fed no longer: what it is owed still is owed as it is now, an older revision cannot be delivered.
UPDATE crossfade.outbox AS o
SET rev = %(rev)s, op = %(op)s::uuid, epoch = %(epoch)s, tentative = NULL, parked = NULL,
    parts = ARRAY(SELECT DISTINCT unnest(o.parts || %(parts)s))
WHERE entity = %(entity)s AND id = %(id)s

-- name: outbox
-- Those that are parked last: many of them must not hide the others.
SELECT entity, id, rev, op, base_digest, tentative, parked, parts FROM crossfade.outbox
WHERE entity = ANY(%(entities)s) ORDER BY parked IS NOT NULL, since LIMIT %(limit)s

-- name: outbox_row
SELECT rev, op, base_digest, tentative, parked, parts FROM crossfade.outbox WHERE entity = %(entity)s AND id = %(id)s

-- name: reserved
-- Whether an open write of another record would need one of these normalised keys back, were it undone.
SELECT EXISTS (
    SELECT FROM crossfade.outbox AS o, jsonb_each_text(o.tentative->'keys') AS k (rule, key)
    WHERE o.entity = %(entity)s AND o.id <> %(id)s AND o.op <> %(op)s::uuid AND o.tentative IS NOT NULL
      AND %(keys)s::jsonb @> jsonb_build_object(k.rule, k.key)
)

-- name: outbox_confirm
UPDATE crossfade.outbox SET tentative = NULL
WHERE entity = %(entity)s AND id = %(id)s AND rev = %(rev)s AND op = %(op)s::uuid AND tentative IS NOT NULL

-- name: outbox_undo
-- Takes an open write back: of this, a confirmation, and another undo only one finds it tentative.
UPDATE crossfade.outbox SET tentative = NULL, parked = NULL, rev = rev + 1, op = %(new_op)s::uuid, epoch = %(epoch)s
WHERE entity = %(entity)s AND id = %(id)s AND rev = %(rev)s AND op = %(op)s::uuid AND tentative IS NOT NULL
  AND EXISTS (SELECT FROM crossfade.control WHERE migration = %(migration)s AND epoch = %(epoch)s)

-- name: outbox_settle
DELETE FROM crossfade.outbox
WHERE entity = %(entity)s AND id = %(id)s AND rev = %(rev)s AND op = %(op)s::uuid AND tentative IS NULL

-- name: outbox_settle_many
-- One that is being written is left out: to wait for it here could be a deadlock with who writes several at once.
DELETE FROM crossfade.outbox AS gone
USING (
    SELECT o.id FROM crossfade.outbox AS o
    JOIN unnest(%(ids)s::text[], %(revs)s::bigint[], %(ops)s::uuid[]) AS s (id, rev, op)
        ON o.id = s.id AND o.rev = s.rev AND o.op = s.op
    WHERE o.entity = %(entity)s AND o.tentative IS NULL
    FOR UPDATE OF o SKIP LOCKED
) AS settled
WHERE gone.entity = %(entity)s AND gone.id = settled.id
RETURNING gone.id

-- name: outbox_park
UPDATE crossfade.outbox SET parked = %(cause)s
WHERE entity = %(entity)s AND id = %(id)s AND rev = %(rev)s AND op = %(op)s::uuid

-- name: outbox_depth
SELECT count(*), coalesce(extract(epoch FROM now() - min(since)), 0)::float8
FROM crossfade.outbox WHERE entity = ANY(%(entities)s)

-- name: conflict_insert
INSERT INTO crossfade.conflicts (entity, id, cause, store, rev, document)
SELECT %(entity)s, %(id)s, %(cause)s, %(store)s, %(rev)s, %(document)s
WHERE NOT EXISTS (
    SELECT FROM crossfade.conflicts
    WHERE entity = %(entity)s AND id = %(id)s AND store = %(store)s AND document = %(document)s
)

-- name: conflicts
SELECT number, entity, id, cause, store, rev, document, seen_at FROM crossfade.conflicts
WHERE entity = ANY(%(entities)s) ORDER BY number DESC LIMIT %(limit)s

-- name: quarantine_put
INSERT INTO crossfade.quarantine (entity, id, reason, field, rev, digest, document)
VALUES (%(entity)s, %(id)s, %(reason)s, %(field)s, %(rev)s, %(digest)s, %(document)s)
ON CONFLICT (entity, id) DO UPDATE
SET reason = EXCLUDED.reason, field = EXCLUDED.field, rev = EXCLUDED.rev, digest = EXCLUDED.digest,
    document = EXCLUDED.document, last_seen = now()

-- name: quarantine_drop
DELETE FROM crossfade.quarantine WHERE entity = %(entity)s AND id = ANY(%(ids)s)

-- name: quarantined_among
SELECT id, digest FROM crossfade.quarantine WHERE entity = %(entity)s AND id = ANY(%(ids)s)

-- name: waived_among
SELECT id FROM crossfade.quarantine
WHERE entity = %(entity)s AND id = ANY(%(ids)s) AND waived_digest = digest

-- name: quarantined_entities
SELECT e FROM unnest(%(entities)s::text[]) AS e WHERE EXISTS (SELECT FROM crossfade.quarantine WHERE entity = e)

-- name: counts
SELECT (SELECT count(*) FROM crossfade.quarantine
        WHERE entity = ANY(%(entities)s) AND waived_digest IS DISTINCT FROM digest),
       (SELECT count(*) FROM crossfade.conflicts WHERE entity = ANY(%(entities)s))

-- name: last_runs
SELECT DISTINCT ON (entity, kind) entity, kind, state, epoch, (settings ->> 'mapping')::int, counts, started_at,
    finished_at
FROM crossfade.runs WHERE migration = %(migration)s AND entity = ANY(%(entities)s)
ORDER BY entity, kind, started_at DESC

-- name: tombstones_count
SELECT count(*) FROM crossfade.tombstones WHERE entity = ANY(%(entities)s)

-- name: tombstones_drop
DELETE FROM crossfade.tombstones WHERE ctid = ANY(ARRAY(
    SELECT ctid FROM crossfade.tombstones WHERE entity = ANY(%(entities)s) LIMIT %(limit)s
))

-- name: unvalidated
-- Constraints of these tables under which old rows were never looked at.
SELECT conrelid::regclass::text, conname FROM pg_constraint
WHERE conrelid = ANY(%(tables)s::regclass[]) AND NOT convalidated ORDER BY 1, 2

-- name: shadow_count
INSERT INTO crossfade.shadow AS s (migration, mapping, entered, equal, mismatch, unsettled, dropped, failed)
VALUES (%(migration)s, %(mapping)s, %(entered)s, %(equal)s, %(mismatch)s, %(unsettled)s, %(dropped)s, %(failed)s)
ON CONFLICT (migration, mapping, entered) DO UPDATE
SET equal = s.equal + EXCLUDED.equal, mismatch = s.mismatch + EXCLUDED.mismatch,
    unsettled = s.unsettled + EXCLUDED.unsettled, dropped = s.dropped + EXCLUDED.dropped,
    failed = s.failed + EXCLUDED.failed

-- name: shadow_compared
SELECT coalesce(sum(equal), 0), coalesce(sum(mismatch), 0), coalesce(sum(unsettled), 0), coalesce(sum(dropped), 0),
       coalesce(sum(failed), 0),
       (SELECT count(*) FROM crossfade.mismatches WHERE entity = ANY(%(entities)s) AND resolved_at IS NULL)
FROM crossfade.shadow WHERE migration = %(migration)s AND mapping = %(mapping)s AND entered = %(entered)s

-- name: mismatch_note
INSERT INTO crossfade.mismatches AS m (entity, id, cause, fields, question, mongo, postgres, seen)
SELECT entity, id, cause, ARRAY(SELECT jsonb_array_elements_text(fields)), question, mongo, postgres, seen
FROM jsonb_to_recordset(%(found)s::jsonb)
    AS f (entity text, id text, cause text, fields jsonb, question text, mongo bigint, postgres bigint, seen bigint)
ON CONFLICT (entity, id) DO UPDATE
SET cause = EXCLUDED.cause, fields = EXCLUDED.fields, question = EXCLUDED.question, mongo = EXCLUDED.mongo,
    postgres = EXCLUDED.postgres, seen = m.seen + EXCLUDED.seen, last_seen = now(),
    resolved_at = NULL, resolved_by = NULL, resolved_why = NULL

-- name: mismatches
SELECT entity, id, cause, fields, question, mongo, postgres, seen, first_seen, last_seen, resolved_at, resolved_by,
       resolved_why
FROM crossfade.mismatches
WHERE entity = ANY(%(entities)s) AND (%(resolved)s OR resolved_at IS NULL) AND id = coalesce(%(id)s::text, id)
ORDER BY last_seen DESC, entity, id LIMIT %(limit)s

-- name: mismatch_resolve
UPDATE crossfade.mismatches SET resolved_at = now(), resolved_by = %(by)s, resolved_why = %(why)s
WHERE entity = %(entity)s AND id = %(id)s AND last_seen = %(last_seen)s
RETURNING id

-- name: now
SELECT clock_timestamp()
