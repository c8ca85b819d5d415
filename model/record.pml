/* One record while MongoDB decides: write, settle, undo, delete, lift, reconcile, and what goes wrong meanwhile.
 *
 * A process stands at a step, its next request. Every rule (`:: step == ... -> ...`) is that request as the store
 * carries it out, with what the sender makes of the answer; between two rules anything may happen. README.md says
 * which function of the code each rule stands for, what is left out, and how to read a counterexample.
 *
 * A scope is a set of -D: UPDATES INSERTS DELETES ROLLBACK (the writes), THERE ABSENT (the record at first),
 * CRASH, SLOW=n, BACKFILL, FOREIGN, RESETS (what goes wrong). A broken variant is one -D more. */

/* Revisions are one higher than in the code: 0 is "none", which is then older than any. */
#define NONE 0
#define LEGACY 1 /* a document without _cf */
#define FIRST 2  /* the first revision that Crossfade gives */

/* Values. A worker writes its own number, so a value says who wrote it. */
#define OLD 4
#define OTHERS 5 /* written by an application that has never heard of Crossfade */

/* Debts. */
#define OWED 1
#define TENTATIVE 2

#define RECONCILER 3 /* workers are 1 and 2 */
/* A worker's write has its number as operation id; every lift and undo has a fresh one: a process gives a
 * revision once, or once more after a foreign writer has made revisions begin anew. */
#define FRESH(revision) (64 * reset + 16 * me + (revision))
#define LONG_AGO 255

mtype = { nothing, insert, update, delete };                      /* a write: what is asked for, or open */
mtype = { confirmed, superseded, unanswered };                    /* debt.Settled, and no answer */
mtype = { success, undone, refused };                             /* what the caller was told */
mtype = { /* steps */
    idle, look_for_tombstone, try_insert, read_base, compare_and_set, put_debt, remove_row, confirm,
    apply, read_again, lift, brought, backfill, backfill_commits, backfill_looks_again,
    bury, remove, read_tombstone, bury_row, bury_row_commits, bury_row_looks_again,
    look_again, lift_above_tombstone, bury_above_row, settle_tombstone,
    undo, settled, settle, erase, adopt_document, adopt_delete, ended
};

/* --- MongoDB: the document with its _cf, and the tombstone --------------------------------------------------- */

typedef Document {
    bit there, deleted;
    byte rev, op, value, debt;
    mtype open; /* of a tentative debt: the kind of write, */
    byte before /* and the value before it */
};
typedef Tombstone {
    byte rev, op;
    bit debt
};
Document doc;
Tombstone tomb;

/* --- PostgreSQL: the row, and the revision of its tombstone ---------------------------------------------------- */

typedef Row {
    bit there;
    byte rev, value
};
Row row;
byte buried;
bit locked; /* by a delete that has not committed: single images and deletes lock the record */

/* --- The network: what was not answered in time, and may arrive at any later moment, or never ------------------ */

typedef Request {
    mtype kind;
    byte rev, value
};
Request late;
byte lost; /* how many requests were not answered: at most SLOW */

/* --- What only the checker knows ------------------------------------------------------------------------------- */

mtype told[3];
bit took[3];      /* the write is part of the primary's history */
byte latest;      /* the value in which that history ends; 0: deleted */
byte newest;      /* the highest revision ever given */
byte uncommitted; /* transactions at PostgreSQL between their commit and their second look */
bit touched;      /* a foreign writer changed the document since a revision was last given */
bit reset;        /* a foreign writer replaced or removed it: its revisions began anew */
bit gone[3];      /* has ended, or died */
bit others_ended;
bit backfilled;
bit crashed;
byte rounds;      /* of the reconciler, since writes have stopped */
#define ROUNDS 8

#define alive (doc.there && !doc.deleted)
#define in_debt ((doc.there && doc.debt) || tomb.debt)
#define same_content (row.rev == doc.rev && row.value == doc.value && buried < row.rev)
#define equal (row.there == alive && (!alive || same_content))
#define quiet (gone[1] && gone[2] && others_ended && backfilled)
/* Differences that foreign writers make are noted nowhere, sweeps find them; nor is what has yet to be copied. A
 * transaction that has committed a row under a tombstone is about to look again. */
#define excused (touched || uncommitted || (!backfilled && doc.op == NONE) || (reset && (!alive || doc.op == NONE || doc.rev < newest)))

/* DEBT IS ATOMIC WITH DATA: there is no instant at which a crash would leave a difference that is not noted. */
inline check_debt() {
    assert(equal || excused || in_debt)
}

/* A line of a counterexample: who, the request, the next one, and both stores afterwards. check.py lays it out. */
inline say(who, what, next) {
    printf("|%d|%e|%e|%d by %d: value %d|debt %d, deleted %d|tombstone %d, debt %d|%d: value %d|tombstone %d\n", who, what,
        next, doc.rev, doc.op, doc.value, doc.debt, doc.deleted, tomb.rev, tomb.debt, row.rev, row.value, buried)
}

/* --- The broken variants ----------------------------------------------------------------------------------------- */

#ifdef BEHIND_CONFIRMS
#define is_confirmed (held_rev >= rev)
#else
#define is_confirmed (held_rev == rev && held_value == value && held_tomb < rev)
#endif

#ifdef SETTLE_WITHOUT_OPERATION
#define still_at(revision, operation) (doc.rev == revision)
#else
#define still_at(revision, operation) (doc.rev == revision && doc.op == operation)
#endif

#ifdef NO_SECOND_LOOK
#define AFTER_ITS_ROW settle_tombstone
#else
#define AFTER_ITS_ROW look_again
#endif

#ifdef DELETE_NOT_DECIDED
#define decides_deletes false
#else
#define decides_deletes true
#endif

#ifdef DEBT_AFTER_DATA
#define with_data 0
#define AFTER_DATA put_debt
#else
#define with_data 1
#define AFTER_DATA apply
#endif

#ifdef UNDO_BY_KEY
#define still_open true
#else
#define still_open (doc.rev == rev && doc.op == op && doc.debt == TENTATIVE)
#endif

#ifdef NO_LOOK_AFTER_COMMIT
#define looks_after_commit false
#else
#define looks_after_commit true
#endif

/* --- Parts of rules ------------------------------------------------------------------------------------------------ */

#define max(a, b) ((a) > (b) -> (a) : (b))
#define debt_of_a_write (rollback -> TENTATIVE : OWED)

/* The document has been given a revision. */
inline gave(operation) {
    doc.op = operation;
    assert(doc.rev < 16);
    newest = max(newest, doc.rev);
    touched = 0
}

inline remove_document() {
    doc.there = 0; doc.deleted = 0; doc.rev = 0; doc.op = 0; doc.value = 0; doc.debt = 0;
    doc.open = nothing; doc.before = 0
}

/* The image that the primary gave. */
inline take_image() {
    rev = doc.rev; op = doc.op; value = doc.value; open = doc.open; before = doc.before
}

inline put_row(revision, content, covered) {
    if
    :: !(covered) && row.rev < revision -> row.there = 1; row.rev = revision; row.value = content
    :: else
    fi
}

inline drop_row(revision) {
    if
    :: row.there && row.rev <= revision -> row.there = 0; row.rev = 0; row.value = 0
    :: else
    fi
}

/* Backfill locks no record, and may insert while a delete finds no row: both look again after their own commit. */
inline look_after_commit() {
    if
    :: looks_after_commit -> drop_row(buried)
    :: else
    fi;
    uncommitted--
}

/* What PostgreSQL holds, as the transaction saw it. */
inline note_held() {
    held_rev = row.rev; held_value = row.value; held_tomb = buried;
    highest = max(row.rev, buried)
}

/* PostgreSQL's answer to an image: applied or the same, else behind. */
inline judge() {
    outcome = (is_confirmed -> confirmed : nothing);
    step = (is_confirmed -> brought : read_again)
}

inline put_tombstone(revision, operation) {
    if
    :: tomb.rev < revision ->
        tomb.rev = revision; tomb.op = operation; tomb.debt = 1;
        newest = max(newest, tomb.rev)
    :: else /* a higher one stays */
    fi
}

inline erase_soon(revision, operation) {
    erase_rev = revision; erase_op = operation
}

/* A request to PostgreSQL that is not answered in time. */
#ifdef SLOW
#define may_be_late (late.kind == nothing && lost < SLOW)
#else
#define may_be_late false
#endif

inline leave_in_network(what, revision) {
    lost++;
    late.kind = what; late.rev = revision;
    late.value = (what == update -> value : 0)
}

inline forget_late() {
    late.kind = nothing; late.rev = 0; late.value = 0
}

/* What a process no longer needs it forgets, so that states that differ in nothing else are one. */
inline forget_image() {
    rev = 0; op = 0; value = 0; open = nothing; before = 0
}

inline forget_held() {
    held_rev = 0; held_value = 0; held_tomb = 0; highest = 0
}

inline forget_tombstone() {
    tomb_rev = 0; tomb_op = 0; by_tombstone = 0
}

inline forget_all() {
    forget_image();
    forget_held();
    forget_tombstone();
    outcome = nothing; erase_rev = 0; erase_op = 0; mine = 0; mine_op = 0; base = 0; snapshot = 0; undoing = 0
}

/* CONVERGENCE: once writes have stopped, a reconciler has a bounded number of rounds to make. */
inline count_round() {
    if
    :: quiet -> rounds++; assert(rounds < ROUNDS)
    :: else
    fi
}

/* What follows within a rule, without any request. */

/* Settler.bring has ended; Settler.bring_tombstone may have called it. */
inline end_bring() {
    if
    :: by_tombstone && outcome == unanswered -> step = settled
    :: by_tombstone && outcome == confirmed -> erase_soon(rev, op); step = settle_tombstone
    :: by_tombstone && outcome == superseded -> step = settle_tombstone
    :: !by_tombstone && undoing && outcome == confirmed -> erase_soon(rev, op); step = settled
    :: else -> step = settled
    fi;
    by_tombstone = 0
}

/* The attempt to settle has ended: for a worker, see MongoPrimary._then_postgres and _close_tentative. */
inline end_settling() {
    if
    :: me < RECONCILER && !rollback ->
        /* NO LOST WRITE: what is acknowledged is in the primary. */
        assert(took[me] || (kind == delete && !alive));
        told[me] = success;
        if
        :: outcome == confirmed && kind != delete && !erase_rev -> erase_soon(mine, me)
        :: else
        fi;
        step = erase
    :: me < RECONCILER && rollback && undoing -> told[me] = undone; step = erase
    :: me < RECONCILER && rollback && told[me] == success -> step = erase
    :: me < RECONCILER && rollback && told[me] == nothing && !undoing ->
        if
        :: outcome == confirmed -> step = confirm
        :: else -> rev = mine; op = me; value = me; undoing = 1; step = undo
        fi
    :: me == RECONCILER -> step = (outcome == confirmed && mine && mine_op -> settle : erase)
    fi;
    outcome = nothing;
    if
    :: step != undo -> forget_image(); forget_tombstone()
    :: else
    fi
}

inline end_process() {
    forget_all();
    if
    :: me < RECONCILER -> kind = nothing; rollback = 0; gone[me] = 1; step = ended
    :: else -> step = idle
    fi
}

/* ===================================================================================================================
 * A worker with one write, or a reconciler
 * ================================================================================================================= */

proctype Process(byte me) {
    mtype step = idle, was = idle, kind = nothing, open = nothing, outcome = nothing;
    byte rev, op, value, before;                  /* the image in hand */
    byte held_rev, held_value, held_tomb, highest; /* what PostgreSQL said */
    byte tomb_rev, tomb_op;                       /* the tombstone in hand */
    byte base, mine, mine_op;                     /* the revision written upon; what is to be settled */
    byte erase_rev, erase_op;                     /* a confirmed debt for the next batch */
    bit rollback, undoing, snapshot, by_tombstone, passed_over;
    do
    :: atomic {
        if
        /* --- a write begins (primary_mongo.py) ------------------------------------------------------------------- */
        :: step == idle && me < RECONCILER ->
            if
#ifdef INSERTS
            :: kind = insert; step = look_for_tombstone
#endif
#ifdef UPDATES
            :: kind = update; step = read_base
#endif
#ifdef DELETES
            :: kind = delete; step = read_base
#endif
            fi;
            if
            :: rollback = 0
#ifdef ROLLBACK
            :: rollback = 1
#endif
            fi
        :: step == look_for_tombstone -> base = tomb.rev; step = try_insert
        :: step == try_insert ->
            if
            :: !doc.there ->
                doc.there = 1; doc.value = me; doc.debt = debt_of_a_write;
                doc.open = (rollback -> insert : nothing);
                doc.rev = (base -> base + 1 : FIRST);
                gave(me);
                took[me] = 1; latest = me; base = 0;
                take_image();
                mine = rev; step = apply
            :: doc.there && doc.deleted && doc.debt != TENTATIVE -> /* roll that delete forward */
                rev = doc.rev; op = doc.op; base = 0; step = bury
            :: else -> told[me] = refused; step = erase
            fi
        :: step == read_base && !(doc.there && doc.debt == TENTATIVE) -> /* open writes are waited for */
            if
            :: alive ->
                base = doc.rev; before = (rollback && kind == update -> doc.value : 0);
                step = compare_and_set
            :: else -> told[me] = refused; step = erase
            fi
        :: step == compare_and_set && kind == update ->
            if
            :: alive && doc.debt != TENTATIVE && doc.rev == base && (!rollback || doc.value == before) ->
                doc.value = me; doc.debt = with_data * debt_of_a_write;
                doc.open = (rollback -> update : nothing); doc.before = before;
                doc.rev = base + 1;
                gave(me);
                took[me] = 1; latest = me; base = 0;
                take_image();
                mine = rev; step = AFTER_DATA
            :: else -> base = 0; before = 0; step = read_base
            fi
        :: step == put_debt -> /* only in a broken variant */
            if
            :: doc.there && doc.rev == rev && doc.op == op -> doc.debt = debt_of_a_write
            :: else
            fi;
            step = apply
        :: step == compare_and_set && kind == delete && decides_deletes ->
            if
            :: alive && doc.debt != TENTATIVE && doc.rev == base ->
                doc.deleted = 1; doc.debt = debt_of_a_write;
                doc.open = (rollback -> delete : nothing);
                doc.rev = base + 1;
                gave(me);
                took[me] = 1; latest = 0; base = 0;
                take_image();
                mine = rev; step = (rollback -> remove_row : bury)
            :: else -> base = 0; step = read_base
            fi
        :: step == compare_and_set && kind == delete && !decides_deletes ->
            rev = base + 1; op = me; mine = rev; base = 0; step = bury
        :: step == remove_row && !locked -> /* of a tentative delete the row goes, and the document stays */
            drop_row(rev);
            buried = max(buried, rev);
            outcome = (row.rev == NONE && buried <= rev -> confirmed : superseded);
            step = settled
        :: step == remove_row && may_be_late -> leave_in_network(delete, rev); outcome = unanswered; step = settled
        :: step == confirm ->
            if
            :: doc.there && doc.rev == mine && doc.op == me && doc.debt == TENTATIVE ->
                /* STRATEGY HONOURED: success is told only of what both stores have. */
                assert(row.rev >= mine || buried >= mine);
                doc.debt = OWED; doc.open = nothing; doc.before = 0;
                told[me] = success;
                if
                :: kind == delete -> rev = mine; op = me; step = bury
                :: else -> erase_soon(mine, me); step = erase
                fi
            :: else -> told[me] = undone; step = erase
            fi

        /* --- images to PostgreSQL: Settler.bring, PostgresStore.apply ------------------------------------------- */
        :: step == apply && may_be_late -> leave_in_network(update, rev); outcome = unanswered; step = brought
        :: step == apply && !locked ->
            put_row(rev, value, buried >= rev);
            note_held();
            judge()
        :: step == read_again -> /* behind is not a confirmation */
            if
            :: !alive -> outcome = superseded; step = brought
            :: alive && doc.rev > highest && doc.rev > rev -> outcome = superseded; step = brought
            :: alive && doc.rev > highest && doc.rev <= rev -> take_image(); step = apply
            :: alive && doc.rev <= highest && held_rev == doc.rev && held_value == doc.value && held_tomb < held_rev ->
                erase_soon(doc.rev, doc.op);
                outcome = confirmed; step = brought
            :: else -> step = lift
            fi
        :: step == lift ->
            if
            :: alive && doc.debt != TENTATIVE ->
                doc.rev = 1 + max(doc.rev, highest); doc.debt = OWED;
                gave(FRESH(doc.rev));
                take_image();
                step = apply
            :: else -> outcome = superseded; step = brought
            fi

        /* --- deletes: Settler.bury, Settler.bring_tombstone, PostgresStore.apply_delete ------------------------- */
        :: step == bury -> put_tombstone(rev, op); step = remove
        :: step == remove ->
            if
            :: decides_deletes && doc.there && doc.deleted && doc.rev == rev && doc.op == op -> remove_document()
            :: !decides_deletes && doc.there && doc.rev == rev - 1 -> remove_document(); took[me] = 1; latest = 0
            :: else
            fi;
            forget_image();
            step = (kind == insert && told[me] == nothing && !undoing -> look_for_tombstone : read_tombstone)
        :: step == read_tombstone ->
            tomb_rev = tomb.rev; tomb_op = tomb.op;
            if
            :: tomb_rev == NONE -> outcome = superseded; step = settled
            :: else -> step = bury_row
            fi
        :: step == bury_row && may_be_late -> leave_in_network(delete, tomb_rev); outcome = unanswered; step = settled
#ifndef BACKFILL
        :: step == bury_row ->
            drop_row(tomb_rev);
            buried = max(buried, tomb_rev);
            note_held();
            step = AFTER_ITS_ROW
#else
        :: step == bury_row && !locked -> /* it locks the record, and sees the rows that are committed */
            locked = 1; snapshot = row.there; step = bury_row_commits
        :: step == bury_row_commits ->
            if
            :: snapshot -> drop_row(tomb_rev)
            :: else
            fi;
            buried = max(buried, tomb_rev);
            note_held();
            locked = 0; snapshot = 0; uncommitted++; step = bury_row_looks_again
        :: step == bury_row_looks_again -> look_after_commit(); step = AFTER_ITS_ROW
#endif
        :: step == look_again -> /* the second look: is there a document? */
            if
            :: alive && doc.rev <= max(tomb_rev, held_tomb) ->
                highest = max(tomb_rev, highest); step = lift_above_tombstone
            :: alive && doc.rev > max(tomb_rev, held_tomb) -> take_image(); by_tombstone = 1; step = apply
            :: doc.there && doc.deleted -> outcome = superseded; step = settled
            :: !doc.there && held_rev != NONE -> step = bury_above_row
            :: !doc.there && held_rev == NONE -> step = settle_tombstone
            fi
        :: step == lift_above_tombstone ->
            if
            :: alive && doc.debt != TENTATIVE ->
                doc.rev = 1 + max(doc.rev, highest); doc.debt = OWED;
                gave(FRESH(doc.rev));
                take_image();
                by_tombstone = 1; step = apply
            :: else -> outcome = superseded; step = settled
            fi
        :: step == bury_above_row -> /* a row newer than the delete, and no document that it could stem from */
            put_tombstone(highest + 1, FRESH(highest + 1));
            forget_tombstone();
            step = read_tombstone
        :: step == settle_tombstone ->
            if
            :: tomb.rev == tomb_rev && tomb.op == tomb_op -> tomb.debt = 0
            :: else
            fi;
            outcome = confirmed; step = settled

        /* --- undo, and erasing debts (Settler.undo, Eraser, MongoStore.settle) ----------------------------------- */
        :: step == undo -> /* as a new revision, and only where the field still has the write's value */
            if
            :: doc.there && still_open ->
                if
                :: open == insert -> doc.deleted = 1
                :: open == delete -> doc.deleted = 0
                :: open == update && doc.value == op -> doc.value = before
                :: else
                fi;
                if
                :: doc.op == op && doc.debt == TENTATIVE -> latest = (doc.deleted -> 0 : doc.value)
                :: else /* another write, or a confirmed one: it should have stayed */
                fi;
                doc.debt = OWED; doc.open = nothing; doc.before = 0;
                doc.rev = rev + 1;
                gave(FRESH(doc.rev));
                take_image();
                step = (doc.deleted -> bury : apply)
            :: else -> outcome = superseded; step = settled
            fi
        :: step == settle ->
            if
            :: doc.there && still_at(mine, mine_op) && doc.debt == OWED -> doc.debt = 0
            :: else
            fi;
            step = erase
        :: step == erase ->
            if
            :: doc.there && still_at(erase_rev, erase_op) && doc.debt == OWED -> doc.debt = 0
            :: else
            fi;
            erase_rev = 0

        /* --- a reconciler's rounds: debts, and sweeps for what foreign writers left ------------------------------ */
        :: step == idle && me == RECONCILER && tomb.debt && !(passed_over && doc.there && doc.debt) ->
            count_round();
            passed_over = (quiet && doc.there && doc.debt); /* a round takes every debt that there is */
            tomb_rev = tomb.rev; tomb_op = tomb.op; step = bury_row
        :: step == idle && me == RECONCILER && doc.there && doc.debt -> /* an open write may be overdue at any time */
            count_round();
            passed_over = 0;
            take_image();
            step = (doc.debt == TENTATIVE -> undo : (doc.deleted -> bury : apply));
            mine = (step == apply -> rev : 0); mine_op = (step == apply -> op : 0)
#ifdef FOREIGN
        :: step == idle && me == RECONCILER && !equal && alive && !doc.debt -> count_round(); take_image(); step = adopt_document
        :: step == adopt_document ->
            note_held();
            if
            :: held_rev == rev && held_value == value && held_tomb < rev -> step = erase
            :: else -> step = (rev > highest -> apply : lift)
            fi;
            mine = (step == apply -> rev : 0); mine_op = (step == apply -> op : 0)
        :: step == idle && me == RECONCILER && row.there && !doc.there -> count_round(); base = row.rev; step = adopt_delete
        :: step == adopt_delete -> /* looked at twice */
            if
            :: doc.there || row.rev != base -> step = erase
            :: else -> put_tombstone(base + 1, FRESH(base + 1)); base = 0; step = read_tombstone
            fi
#endif

#ifdef CRASH
        /* kill -9, once, of anyone, before any request. PostgreSQL carries out what it was sent. */
        :: !crashed && step != ended && step != idle && step != bury_row_commits && step != bury_row_looks_again ->
            crashed = 1;
            end_process()
#endif
        fi;

        /* --- what the process makes of the answer ------------------------------------------------------------------ */
        if
        :: step == brought -> end_bring()
        :: else
        fi;
        if
        :: step == settled -> end_settling()
        :: else
        fi;
        if
        :: step == erase && !(erase_rev && erase_op) -> end_process()
        :: else
        fi;
        if
        :: step != read_again && step != lift && step != look_again && step != lift_above_tombstone &&
            step != bury_above_row && step != bury_row_looks_again -> forget_held()
        :: else
        fi;
        say(me, was, step);
        was = step;
        check_debt()
       }
    :: step == ended -> break
    :: atomic {
        step == idle && me == RECONCILER && quiet && late.kind == nothing && !in_debt && equal ->
        /* NO LOST WRITE, NO RESURRECTION: both stores hold what the primary's history ends in. */
        assert(latest == (alive -> doc.value : 0));
        /* STRATEGY HONOURED: what was told as undone is nowhere. */
        assert(told[1] != undone || (doc.value != 1 && row.value != 1));
        assert(told[2] != undone || (doc.value != 2 && row.value != 2));
        break
       }
    od
}

/* ===================================================================================================================
 * The rest of the world
 * ================================================================================================================= */

#ifdef FOREIGN
/* Another application, with a plain driver: one write that knows nothing of _cf. */
proctype Foreign() {
    atomic {
        if
        :: alive -> doc.value = OTHERS; latest = OTHERS; touched = 1; say(4, update, ended)
#ifdef RESETS
        :: doc.there -> /* replaced whole */
            remove_document();
            doc.there = 1; doc.rev = LEGACY; doc.value = OTHERS; latest = OTHERS; reset = 1;
            say(4, insert, ended)
        :: doc.there -> remove_document(); latest = 0; reset = 1; say(4, delete, ended)
        :: !doc.there ->
            doc.there = 1; doc.rev = LEGACY; doc.value = OTHERS; latest = OTHERS; reset = 1;
            say(4, insert, ended)
#endif
        :: true
        fi;
        others_ended = 1
    }
}
#endif

#ifdef SLOW
/* A slow secondary: what nobody waits for any more it carries out at any later moment, or never. */
proctype Network() {
end:
    do
    :: atomic { late.kind != nothing -> forget_late() }
    :: atomic {
        late.kind != nothing && !locked ->
        if
        :: late.kind == update -> put_row(late.rev, late.value, buried >= late.rev)
        :: late.kind == delete -> drop_row(late.rev); buried = max(buried, late.rev)
        fi;
        forget_late();
        say(5, apply, ended);
        check_debt()
       }
    od
}
#endif

#ifdef BACKFILL
/* A chunk of one record: read, copied under the tombstones that are committed by then, looked at again. */
proctype Backfill() {
    byte rev, value;
    bit covered;
    atomic {
        if
        :: alive -> rev = doc.rev; value = doc.value
        :: else
        fi;
        say(6, backfill, backfill_commits)
    };
    if
    :: rev ->
        atomic { covered = (buried >= rev); say(6, backfill_commits, backfill_commits) };
        atomic { put_row(rev, value, covered); uncommitted++; say(6, backfill_commits, backfill_looks_again) };
        atomic { look_after_commit(); say(6, backfill_looks_again, ended) }
    :: else
    fi;
    atomic { rev = 0; value = 0; covered = 0; backfilled = 1; check_debt() }
}
#endif

init {
    atomic {
        told[1] = nothing; told[2] = nothing; doc.open = nothing; late.kind = nothing;
        if
#ifdef THERE
        :: /* written through Crossfade, and settled */
            doc.there = 1; doc.rev = FIRST; doc.op = LONG_AGO; doc.value = OLD;
            row.there = 1; row.rev = FIRST; row.value = OLD;
            latest = OLD; newest = FIRST
#ifdef BACKFILL
        :: /* never written through Crossfade, and not copied yet */
            doc.there = 1; doc.rev = LEGACY; doc.value = OLD;
            latest = OLD; newest = LEGACY
#endif
        :: /* never written through Crossfade, and backfilled */
            doc.there = 1; doc.rev = LEGACY; doc.value = OLD;
            row.there = 1; row.rev = LEGACY; row.value = OLD;
            latest = OLD; newest = LEGACY
#endif
#ifdef ABSENT
        :: true /* never there */
        :: tomb.rev = FIRST; tomb.op = LONG_AGO; buried = FIRST; newest = FIRST /* deleted long ago */
#endif
        fi;
        say(0, nothing, nothing);
        run Process(1);
        run Process(2);
        run Process(RECONCILER);
#ifdef SLOW
        run Network();
#endif
#ifdef BACKFILL
        run Backfill();
#else
        backfilled = 1;
#endif
#ifdef FOREIGN
        run Foreign()
#else
        others_ended = 1
#endif
    }
}
