/* The switch of the primary from MongoDB to PostgreSQL: announce, fence, drain, decide. Promised: what was acknowledged
 * is in the store that decides, at every moment; so an acknowledgement never comes from a store that no longer does.
 *
 * How a record is written and its debt settled is record.pml's matter. Here there is one record, and its content is the
 * set of the writes that made it: a bit each. A store's revision stands beside it; PostgreSQL takes an image that is
 * newer than its row. Any process may stop at any step for ever: a crash; or for long: asleep, with a request on its way.
 * A request to MongoDB may be carried out long after its worker has given it up; MongoDB cannot be fenced. PostgreSQL
 * takes a write or an image only under the epoch that its copy of the control record shows.
 *
 * Time is not counted: a lease may end at any moment. A coordinator may go on once each worker's lease of an older epoch
 * has ended, or its entry in the registry says that it knows this one and has no older write under way.
 *
 * An attempt may be abandoned, by anybody and at any moment before the decision; with TWO_COORDINATORS another one is made,
 * perhaps while the first sleeps. A scope is that, and MOST_WRITES of worker 1. A broken variant is one -D more: DRAIN_BEFORE_FENCE, ACKNOWLEDGED_WITHOUT_LEASE,
 * LEASE_OF_ANY_EPOCH, DECIDED_WITHOUT_ATTEMPT, SIGNED_WITH_WRITES_UNDER_WAY, IMAGE_OF_ANY_EPOCH. */

mtype = { mongo_decides, switching, postgres_decides }; /* the state in the control record */
mtype = { /* steps */
    idle, send, carried_out, bring_image, acknowledge, give_up, look, lease_ends, sign, write_postgres,
    announce, fence, drain, decide, abort, copy, ended
};

/* --- The stores ---------------------------------------------------------------------------------------------------- */

byte mongo, mongo_rev = 1;       /* the document: the writes that made it, and its revision */
byte row, row_rev = 1;           /* the row */
mtype state = mongo_decides;     /* the control record, in MongoDB: the old primary's store */
byte epoch = 1;                  /* a new one for every change: what a compare-and-set matches */
byte copied = 1;                 /* PostgreSQL's copy: its epoch */
byte late;                       /* requests that were given up, and may be carried out yet: a write's bit each */

/* --- What a worker knows -------------------------------------------------------------------------------------------- */

typedef Worker_ {
    mtype state;     /* the control record as it saw it last, */
    byte epoch;      /* its epoch, */
    byte lease;      /* and the epochs of which it holds a lease, a bit each */
    byte heard;      /* the epoch that it has acknowledged in the registry */
    byte under;      /* the epoch of its write under way; 0: there is none */
    byte image, rev  /* what MongoDB answered */
};
Worker_ worker[2];
#define bit_of(e) (1 << (e))

/* What only the checker knows. */
byte acknowledged;

/* KEPT: what was acknowledged is in the store that decides. While nobody knows of the decision yet, it is made. */
inline check_kept() {
    assert((acknowledged & (state == postgres_decides -> row : mongo)) == acknowledged)
}

inline say(who, what, next) {
    printf("|%d|%e|%e|%e, epoch %d|%d at %d|%d at %d|%d|%e of %d, lease %d|%e of %d, lease %d|%d\n", who, what, next,
        state, epoch, mongo, mongo_rev, row, row_rev, copied, worker[0].state, worker[0].epoch, worker[0].lease,
        worker[1].state, worker[1].epoch, worker[1].lease, acknowledged)
}

#define me worker[w]

/* A write is acknowledged under a lease of the very epoch that it was admitted under (Board.leased). */
#ifdef ACKNOWLEDGED_WITHOUT_LEASE
#define may_acknowledge true
#else
#ifdef LEASE_OF_ANY_EPOCH
#define may_acknowledge (me.lease != 0)
#else
#define may_acknowledge (me.lease & bit_of(me.under))
#endif
#endif

#ifdef SIGNED_WITH_WRITES_UNDER_WAY
#define is_clear true
#else
#define is_clear (me.under == 0 || me.under == me.epoch)
#endif

#ifdef IMAGE_OF_ANY_EPOCH
#define postgres_takes(e) true
#else
#define postgres_takes(e) (copied == (e))
#endif

inline put_row(content, revision) {
    if
    :: row_rev < revision -> row = content; row_rev = revision
    :: else
    fi
}

/* ===================================================================================================================
 * A worker with a write or two, one after the other (Writer._operate, Board.refresh)
 * ================================================================================================================= */

#ifdef TWO_COORDINATORS
#define WRITES (w == 0 -> MOST_WRITES : 0) /* the other one only knows, and holds leases */
#else
#define WRITES (w == 0 -> MOST_WRITES : 1)
#endif
#define may_begin (step == idle && writes < WRITES && (me.lease & bit_of(me.epoch)))

inline begin(next) {
    mine = bit_of(2 * w + writes); writes++; me.under = me.epoch; step = next
}

inline done(what) {
    say(w + 1, what, step);
    /* What is not needed any more is forgotten: states that differ by nothing else are one. */
    if
    :: step == acknowledge -> me.image = 0; me.rev = 0
    :: step == idle -> me.image = 0; me.rev = 0; me.under = 0; mine = 0
    :: else
    fi;
    me.lease = me.lease & (bit_of(me.epoch) | (me.under -> bit_of(me.under) : 0));
    if
    :: step == idle && writes == WRITES ->
        step = ended; me.lease = 0; me.heard = 0; me.epoch = 0; me.state = mongo_decides
    :: else
    fi;
    check_kept()
}

proctype Worker(byte w) {
    mtype step = idle;
    byte writes;     /* begun so far */
    byte mine;       /* the bit of the one under way */
end:
    do
    /* Looks come at any moment; each gives a lease of the epoch that it has seen. Leases end, of older looks first. */
    :: d_step { step != ended && (me.epoch != epoch || (step == idle && me.lease == 0)) ->
        me.state = state; me.epoch = epoch; me.lease = me.lease | bit_of(epoch); done(look) }
    :: d_step { me.lease != 0 ->
        me.lease = (me.lease == bit_of(me.epoch) -> 0 : me.lease & bit_of(me.epoch)); done(lease_ends) }
    :: d_step { step != ended && me.state == switching && me.heard != me.epoch && is_clear ->
        me.heard = me.epoch; done(sign) }

    :: d_step { may_begin && me.state == mongo_decides -> begin(send); done(idle) }
    :: d_step { step == send ->
        mongo = mongo | mine; mongo_rev++; me.image = mongo; me.rev = mongo_rev; step = bring_image; done(send) }
    :: d_step { step == send -> late = late | mine; step = idle; done(give_up) }
    :: d_step { step == bring_image && postgres_takes(me.under) ->
        put_row(me.image, me.rev); step = acknowledge; done(bring_image) }
    :: d_step { step == bring_image -> step = acknowledge; done(give_up) } /* the debt brings it */

    :: d_step { may_begin && me.state == postgres_decides -> begin(write_postgres); done(idle) }
    :: d_step { step == write_postgres && copied == me.under ->
        row = row | mine; row_rev++; step = acknowledge; done(write_postgres) }
    :: d_step { step == write_postgres && copied != me.under -> step = idle; done(give_up) }

    :: d_step { step == acknowledge ->
        acknowledged = (may_acknowledge -> acknowledged | mine : acknowledged); step = idle; done(acknowledge) }
    od
}

/* ===================================================================================================================
 * What anybody does: the network, the copy that every look carries over (ControlRecord.spread), the way back
 * ================================================================================================================= */

#define first_of(set) ((set) & -(set))

proctype Anybody() {
end:
    do
    :: d_step { late != 0 ->
        mongo = mongo | first_of(late); mongo_rev++; late = late & ~first_of(late); say(3, carried_out, idle); check_kept() }
    :: d_step { copied != epoch -> copied = epoch; say(3, copy, idle); check_kept() }
    :: d_step { state == switching -> state = mongo_decides; epoch++; say(3, abort, idle); check_kept() }
    od
}

/* ===================================================================================================================
 * A coordinator (switch.py)
 * ================================================================================================================= */

#define is_fenced(w, e) (worker[w].heard >= e || (worker[w].lease & (bit_of(e) - 1)) == 0)
#define fenced (is_fenced(0, attempt) && is_fenced(1, attempt))
#ifdef DECIDED_WITHOUT_ATTEMPT
#define still_mine (state == switching)
#else
#define still_mine (state == switching && epoch == attempt)
#endif

#ifdef DRAIN_BEFORE_FENCE
#define AFTER_ANNOUNCE drain
#define AFTER_FENCE decide
#define AFTER_DRAIN fence
#else
#define AFTER_ANNOUNCE fence
#define AFTER_FENCE drain
#define AFTER_DRAIN decide
#endif

proctype Coordinator(byte number) {
    mtype step = announce;
    byte attempt;           /* the epoch of its announcement */
end:
    do
    :: d_step { step == announce && state == mongo_decides ->
        state = switching; epoch++; attempt = epoch; step = AFTER_ANNOUNCE; say(number + 3, announce, step); check_kept() }
    :: d_step { step == fence && fenced -> step = AFTER_FENCE; say(number + 3, fence, step) }
    /* A debt that PostgreSQL does not take is not settled, so the switch is not decided. */
    :: d_step { step == drain && copied == attempt ->
        put_row(mongo, mongo_rev); step = AFTER_DRAIN; say(number + 3, drain, step); check_kept() }
    :: d_step { step == decide && still_mine ->
        state = postgres_decides; epoch++; step = ended; attempt = 0; say(number + 3, decide, step); check_kept() }
    /* Somebody else has changed the record: there is nothing left to do. */
    :: d_step { step != announce && step != ended && epoch != attempt && !still_mine ->
        step = ended; attempt = 0; say(number + 3, abort, step) }
    od
}

init {
    atomic {
        worker[0].state = mongo_decides; worker[0].epoch = 1; worker[0].lease = bit_of(1); worker[0].heard = 1;
        worker[1].state = mongo_decides; worker[1].epoch = 1; worker[1].lease = bit_of(1); worker[1].heard = 1;
        say(0, idle, idle);
        run Worker(0);
        run Worker(1);
        run Anybody();
#ifdef TWO_COORDINATORS
        run Coordinator(2);
#endif
        run Coordinator(1)
    }
}
