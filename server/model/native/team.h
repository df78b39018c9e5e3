/* Steps shared by the threads of PyTorch's own OpenMP pool.
 *
 * A pool of our own would wait for a core while PyTorch's threads spin at their barrier, so its pool is
 * borrowed through libgomp's ABI (`GOMP_parallel`, which LLVM's and Intel's runtimes have too). Where it
 * was not found the caller works alone.
 *
 * Every thread goes through the same steps in the same order. Of each it takes items that nobody took, and it
 * goes on when all are done, whoever did them: a thread that has lost its core to another process is waited
 * for only where it holds an item. An open item, whose result is written at its end, is not even then: a
 * thread that has waited for longer than such an item takes does it again, and the other's result is dropped. */
#ifndef FATHOM_TEAM_H
#define FATHOM_TEAM_H

#include <stdint.h>

struct pass;

enum { PHASES = 2 }; /* of a step: no item of the second is begun before all of the first are done */

struct share {
    int64_t next;     /* the item that nobody took */
    int64_t num_done;
} __attribute__((aligned(64)));

struct seat {
    int64_t holds;    /* the key of an open item that this thread computes, or 0 */
    int64_t reserved; /* of the one that it does after that, or 0 */
} __attribute__((aligned(64)));

/* One thread in one step. */
struct worker {
    struct share *shares; /* [PHASES] */
    struct seat *seats;   /* [num_threads] */
    int64_t self, num_threads;
    int64_t step;
    int64_t began_ns, item_ns; /* of the last open item: when it was begun, and how long one takes */
    struct pass *pass;    /* or null */
};

/* One kernel's call. */
struct step {
    void (*run)(const void *call, struct worker *worker);
    const void *call;
};

/* The next item that nobody took, perhaps one past the last. */
static inline int64_t take_item(struct worker *worker, int phase)
{
    return __atomic_fetch_add(&worker->shares[phase].next, 1, __ATOMIC_RELAXED);
}

/* This thread has done some more of the items that it took. */
static inline void items_done(struct worker *worker, int phase, int64_t num)
{
    __atomic_fetch_add(&worker->shares[phase].num_done, num, __ATOMIC_RELEASE);
}

/* Returns when all items are done. */
void await_items(struct worker *worker, int phase, int64_t num_items);

/* An open item for this thread, and in `then` the one that it will probably be given next, or -1; -1 once all
 * are done. */
int64_t open_item(struct worker *worker, int phase, int64_t num_items, int64_t *then);

/* Whether the open item's result is still wanted, of which nothing may be written before. If it is, nobody does
 * the item again, and `items_done` follows. */
int may_write(struct worker *worker);

#endif
