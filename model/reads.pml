/* Reads from PostgreSQL while MongoDB decides: the debt board, "secondary unreadable", and when a write may be
 * acknowledged. Promised: a read is no older than what was acknowledged before it began.
 *
 * What is applied and settled, and that it is right, is record.pml's matter: here a revision stands for its content.
 * Rules are as there. Time is not counted. A write that leaves debt waits "until every board is too old that began
 * before": `waits` holds the looks that a process waits for, and a look leaves it when it has become too old or has
 * been replaced by a later one. That a board becomes too old may happen at any moment.
 *
 * A scope is a set of -D: DELETES, FAILURES=n, OTHER_LIFTER. A broken variant is one -D more. */

#define FIRST 2

mtype = { readable, unreadable, lifting }; /* the flag in the control record */
mtype = { nothing, update, delete };
mtype = { /* steps */
    idle, write, bury, remove, apply, read_flag, set_flag, wait, erase, ended,
    look_at_control, look_at_tombstones, look_at_documents,
    set_lifting, outlast, see_tombstones, see_documents, finish_bury, finish_remove, bury_row, settle_tombstone,
    apply_debt, see_control, set_readable, ask_postgres, board_too_old, look_too_old
};

/* --- The stores ---------------------------------------------------------------------------------------------------- */

bit there = 1, deleted, debt, tomb_debt;
byte rev = FIRST, tomb;        /* MongoDB: the document's revision, the tombstone's */
byte row = FIRST, buried;      /* PostgreSQL: the row's revision (0: none), the tombstone's */
byte failed;                   /* requests that PostgreSQL did not carry out: at most FAILURES */
mtype flag = readable;         /* the control record */
byte token;                    /* who set it; 0: nobody */

/* --- What each of two workers knows: its board, and the look that is under way -------------------------------------- */

typedef Look {
    mtype flag;
    byte token;
    bit debt
};
typedef Board {
    Look look;
    bit fresh;
    byte noted;        /* the flag's token as first seen by this worker */
    byte stage;        /* of the look under way; 0: none */
    Look next
};
Board board[2];

/* Whom it waits for: bit b: the look that board b has, bit b+2: the one that is under way there. Waiting: workers
 * 0 and 1; what worker 0 and 1 would wait for, had they to since they noted the flag (2, 3); lifters (4, 5). */
byte waits[6];

/* Which copies of the control record are still what it is: a compare-and-set matches with no other. Bits 0 and 1:
 * the look that a board has, 2 and 3: the one under way, 4 and 5: workers', 6 and 7: lifters'. */
byte current = 3;
#define is_current(bit_) ((current >> (bit_)) & 1)
#define becomes_current(bit_) current = current | (1 << (bit_))
#define control_changes() current = 0

/* What only the checker knows. */
bit writes[2] = 1; /* the worker's write is not over */
byte acknowledged = FIRST;

#ifdef OTHER_LIFTER
#define lifts_from(b) true
#else
#define lifts_from(b) (b == 0)
#endif

#define max(a, b) ((a) > (b) -> (a) : (b))
#define fresh_look(b) (board[b].fresh)
#ifdef AGE_FROM_THE_END_OF_A_LOOK
#define look_under_way(b) 0
#else
#define look_under_way(b) (board[b].stage != 0)
#endif
/* Every look that there is now. */
#define all_looks (fresh_look(0) + 2 * fresh_look(1) + 4 * look_under_way(0) + 8 * look_under_way(1))

#ifdef ACKNOWLEDGED_AT_ONCE
#define outlasted true
#else
#define outlasted (waits[me] == 0)
#endif

/* READS: a row, or its absence, is no older than what was acknowledged when the read began. PostgreSQL's revisions
 * only rise, so a read is the oldest if it is answered at once. */
#define may_ask_postgres(b) (board[b].fresh && board[b].look.flag == readable && !board[b].look.debt)
inline check_reads() {
    assert(!(may_ask_postgres(0) || may_ask_postgres(1)) || (row -> row : buried) >= acknowledged)
}

inline say(who, what, next) {
    printf("|%d|%e|%e|%d: deleted %d, debt %d|%d: debt %d|%d|%d|%e|%e, debt %d, fresh %d|%e, debt %d, fresh %d|%d\n", who, what,
        next, rev * there, deleted, debt, tomb, tomb_debt, row, buried, flag,
        board[0].look.flag, board[0].look.debt, board[0].fresh, board[1].look.flag, board[1].look.debt, board[1].fresh,
        acknowledged)
}

inline put_row(revision) {
    row = (buried >= revision || row >= revision -> row : revision)
}

inline put_grave(revision) {
    buried = max(buried, revision);
    row = (row <= revision -> 0 : row)
}

#define may_fail (failed < FAILURES)

/* ===================================================================================================================
 * A worker with one write (MongoPrimary._then_postgres, _acknowledge_with_debt; Board.mark_unreadable)
 * ================================================================================================================= */

/* The beginning of Board.mark_unreadable, which asks nobody. */
inline consider_flag() {
    if
    :: board[me].look.flag == unreadable && board[me].fresh -> waits[me] = waits[me + 2]; step = wait
    :: else -> step = read_flag
    fi
}

proctype Worker(byte me) {
    mtype step = write, was = write, kind = update;
    byte mine;
    do
    :: atomic {
        if
        :: step == write && there && !deleted ->
            if
            :: kind = update; step = apply
#ifdef DELETES
            :: kind = delete; deleted = 1; step = bury
#endif
            fi;
            rev++; debt = 1; mine = rev
        :: step == write && (!there || deleted) -> step = ended
        :: step == bury ->
            tomb_debt = (tomb < mine -> 1 : tomb_debt); tomb = max(tomb, mine); step = remove
        :: step == remove ->
            if
            :: there && deleted && rev == mine -> there = 0; deleted = 0; debt = 0
            :: else
            fi;
            step = apply
        :: step == bury || step == remove -> step = apply /* MongoDB did not answer: somebody else will */

        :: step == apply && board[me].look.flag != unreadable ->
            if
            :: kind == update -> put_row(mine)
            :: else -> put_grave(mine)
            fi;
            acknowledged = max(acknowledged, mine); step = erase
        :: step == apply && board[me].look.flag != unreadable && may_fail ->
            failed++;
            consider_flag()
        :: step == apply && board[me].look.flag == unreadable -> consider_flag()
        :: step == read_flag ->
            if
            :: flag == unreadable ->
                waits[me] = (board[me].noted == token -> waits[me + 2] : all_looks);
                step = wait
            :: else -> becomes_current(me + 4); step = set_flag
            fi
        :: step == set_flag ->
            if
            :: is_current(me + 4) ->
                control_changes(); flag = unreadable; token = me + 1;
                waits[me] = all_looks; step = wait
            :: else -> step = read_flag
            fi;
            current = current & (255 - (16 << me))
        :: step == wait && outlasted -> acknowledged = max(acknowledged, mine); step = ended
        :: step == erase ->
            if
            :: kind == update && there && rev == mine -> debt = 0
            :: kind == delete && !there && tomb == mine -> tomb_debt = 0
            :: else
            fi;
            step = ended
#ifdef CRASH
        :: step != ended && step != write -> step = ended
#endif
        fi;
        say(me + 1, was, step);
        check_reads();
        was = step;
        if
        :: step == ended -> mine = 0; waits[me] = 0; waits[me + 2] = 0; board[me].noted = 0; writes[me] = 0; kind = update
        :: else
        fi
       }
    :: step == ended && was == ended -> break
    od
}

/* ===================================================================================================================
 * A worker's looks (Board.refresh)
 * ================================================================================================================= */

/* The look that board b had is no longer waited for; the one under way, if it came in time, takes its place. */
inline replaced(w, b) {
    waits[w] = (waits[w] & (15 - (1 << b) - (4 << b))) | ((waits[w] >> 2) & (1 << b))
}
inline no_longer_waited_for(w, looks) {
    waits[w] = waits[w] & (15 - (looks))
}
inline all_replaced(b) {
    replaced(0, b); replaced(1, b); replaced(2, b); replaced(3, b); replaced(4, b); replaced(5, b)
}
inline none_waits_for(looks) {
    no_longer_waited_for(0, looks); no_longer_waited_for(1, looks); no_longer_waited_for(2, looks);
    no_longer_waited_for(3, looks); no_longer_waited_for(4, looks); no_longer_waited_for(5, looks)
}

inline see_flag(b) {
    board[b].next.flag = flag; board[b].next.token = token; becomes_current(b + 2)
}

inline forget_look(b) {
    board[b].stage = 0;
    board[b].next.flag = readable; board[b].next.token = 0; board[b].next.debt = 0;
    current = current & (255 - (4 << b))
}

proctype Looks(byte b) {
end:
    do
    :: atomic {
        board[b].stage == 0 -> /* the control record first */
        see_flag(b);
#ifdef DELETES
        board[b].stage = 1;
#else
        board[b].stage = 2;
#endif
        say(b + 3, look_at_control, look_at_tombstones)
       }
    :: atomic {
        board[b].stage == 1 ->
        board[b].next.debt = tomb_debt; board[b].stage = 2;
        say(b + 3, look_at_tombstones, look_at_documents)
       }
    :: atomic {
        board[b].stage == 2 ->
        board[b].next.debt = board[b].next.debt || (there && debt);
        board[b].look.flag = board[b].next.flag; board[b].look.token = board[b].next.token;
        board[b].look.debt = board[b].next.debt;
        current = (current & (255 - (1 << b))) | ((current >> 2) & (1 << b));
        board[b].fresh = 1;
        all_replaced(b);
        forget_look(b);
        if
        :: !writes[b] -> board[b].noted = 0; board[b].look.token = (lifts_from(b) -> board[b].look.token : 0)
        :: writes[b] && board[b].look.flag == unreadable && board[b].noted != board[b].look.token ->
            board[b].noted = board[b].look.token; waits[b + 2] = all_looks
        :: writes[b] && board[b].look.flag != unreadable -> board[b].noted = 0; waits[b + 2] = 0
        :: else
        fi;
        say(b + 3, look_at_documents, idle);
        check_reads()
       }
    /* A look that takes too long might as well have ended, and its board have become too old at once. */
    :: atomic { board[b].stage -> none_waits_for(4 << b); forget_look(b); say(b + 3, look_too_old, idle) }
    :: atomic { board[b].fresh -> board[b].fresh = 0; board[b].look.debt = 0; none_waits_for(1 << b); say(b + 3, board_too_old, idle) }
    od
}

/* ===================================================================================================================
 * A reconciler: settles debts, and makes the secondary readable again (Board.lift_unreadable)
 * ================================================================================================================= */

proctype Reconciler(byte b) {
    mtype step = idle, was = idle;
    byte image, lifted;
    bit buries, lifts;
    do
    :: atomic {
        if
        /* rounds for their own sake */
        :: step == idle && there && debt && !deleted -> put_row(rev); debt = 0
        :: step == idle && there && debt && deleted -> image = rev; step = finish_bury
        :: step == idle && tomb_debt -> step = bury_row
        :: step == idle && board[b].look.flag != readable -> lifts = 1; lifted = board[b].look.token; step = set_lifting
        :: step == set_lifting ->
#ifdef LIFTED_IN_ONE_STEP
            if
            :: is_current(b) -> step = see_tombstones
            :: else -> step = idle
            fi
#else
            if
            :: board[b].look.flag == lifting -> waits[b + 4] = all_looks; step = outlast
            :: board[b].look.flag == unreadable && is_current(b) ->
                control_changes(); flag = lifting; waits[b + 4] = all_looks; step = outlast
            :: else -> step = idle
            fi
#endif
        :: step == outlast && waits[b + 4] == 0 -> step = see_tombstones
        /* settle_everything: what there is now */
        :: step == see_tombstones ->
            buries = tomb_debt;
#ifdef DELETES
            step = see_documents
        :: step == see_documents ->
#endif
            if
            :: there && debt && deleted -> image = rev; step = finish_bury
            :: there && debt && !deleted -> image = rev; step = apply_debt
            :: else -> step = (buries -> bury_row : see_control)
            fi
        :: step == finish_bury ->
            tomb_debt = (tomb < image -> 1 : tomb_debt); tomb = max(tomb, image); buries = 1; step = finish_remove
        :: step == finish_remove ->
            if
            :: there && deleted && rev == image -> there = 0; deleted = 0; debt = 0
            :: else
            fi;
            step = bury_row
        :: step == apply_debt && may_fail -> failed++; lifts = 0; step = see_control
        :: step == apply_debt ->
            put_row(image);
            if
            :: there && rev == image -> debt = 0
            :: else
            fi;
            step = (buries -> bury_row : see_control)
        :: step == bury_row && may_fail -> failed++; lifts = 0; step = see_control
        :: step == bury_row -> image = tomb; put_grave(tomb); step = settle_tombstone
        :: step == settle_tombstone ->
            if
            :: tomb == image -> tomb_debt = 0
            :: else
            fi;
            step = see_control
        :: step == see_control && lifts -> /* is it still ours to lift? */
            becomes_current(b + 6);
#ifdef LIFTED_IN_ONE_STEP
            step = (flag == unreadable && token == lifted -> set_readable : idle)
#else
            step = (flag == lifting && token == lifted -> set_readable : idle)
#endif
        :: step == set_readable ->
            if
            :: is_current(b + 6) -> control_changes(); flag = readable; token = 0
            :: else
            fi;
            step = idle
        fi;
        if
        :: step == see_control && !lifts -> step = idle
        :: else
        fi;
        if
        :: step == idle -> image = 0; current = current & (255 - (64 << b)); lifted = 0; buries = 0; lifts = 0; waits[b + 4] = 0
        :: step == set_readable || step == see_control -> image = 0; buries = 0; waits[b + 4] = 0
        :: else
        fi;
        say(b + 5, was, step);
        was = step
       }
    od
}

init {
    atomic {
        board[0].look.flag = readable; board[1].look.flag = readable;
        board[0].next.flag = readable; board[1].next.flag = readable;
        board[0].fresh = 1; board[1].fresh = 1;
        say(0, nothing, nothing);
        run Worker(0);
        run Worker(1);
        run Looks(0);
        run Looks(1);
#ifdef OTHER_LIFTER
        run Reconciler(1);
#endif
        run Reconciler(0)
    }
}
