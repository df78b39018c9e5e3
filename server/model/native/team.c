#include "pass.h"
#include "team.h"

#include <sched.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

const int64_t fathom_sizeof_step = sizeof(struct step);
const int64_t fathom_sizeof_pass = sizeof(struct pass);

enum {
    LEAST_PATIENCE_NS = 20000,
    YIELD_AFTER_NS = 50000,  /* more threads than cores: whoever is waited for may need this one */
    LOOK_EVERY = 32          /* turns of waiting, as looking takes time from who works */
};

typedef void (*parallel_function)(void (*)(void *), void *, unsigned, unsigned);

static parallel_function parallel;

/* The address of the process's `GOMP_parallel`, or null. */
void fathom_use_team(void *parallel_address)
{
    parallel = (parallel_function)parallel_address;
}

static int64_t now_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (int64_t)now.tv_sec * 1000000000 + now.tv_nsec;
}

static inline void pause_briefly(void)
{
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

static int are_done(const struct worker *worker, int phase, int64_t num_items)
{
    return __atomic_load_n(&worker->shares[phase].num_done, __ATOMIC_ACQUIRE) == num_items;
}

/* An item of this very step and phase; never 0. */
static int64_t key_of(const struct worker *worker, int phase, int64_t item)
{
    return (worker->step * PHASES + phase) << 40 | (item + 1);
}

static int64_t item_of(int64_t key) { return (key & (((int64_t)1 << 40) - 1)) - 1; }

/* Takes an item of this step and phase from a field of a thread's seat; -1 where there is none. */
static int64_t take_from(struct worker *worker, int phase, int64_t *field)
{
    int64_t key = __atomic_load_n(field, __ATOMIC_RELAXED);
    if (!key || key >> 40 != key_of(worker, phase, 0) >> 40)
        return -1;
    int is_taken = __atomic_compare_exchange_n(field, &key, 0, 0, __ATOMIC_ACQ_REL, __ATOMIC_RELAXED);
    return is_taken ? item_of(key) : -1;
}

/* An item that another thread has: one that it has not begun, or has held for too long. */
static int64_t take_over(struct worker *worker, int phase, int64_t waited_ns)
{
    const int64_t patience = 2 * worker->item_ns;
    const int is_late = waited_ns > (patience > LEAST_PATIENCE_NS ? patience : LEAST_PATIENCE_NS);
    for (int64_t i = 1; i < worker->num_threads; i++) {
        struct seat *seat = worker->seats + (worker->self + i) % worker->num_threads;
        int64_t item = take_from(worker, phase, &seat->reserved);
        if (item < 0 && is_late)
            item = take_from(worker, phase, &seat->holds);
        if (item >= 0)
            return item;
    }
    return -1;
}

/* Waits until all items are done, or for an open one of another thread, which it returns; else -1. */
static int64_t others_item(struct worker *worker, int phase, int64_t num_items)
{
    if (are_done(worker, phase, num_items))
        return -1;
    const int64_t since = now_ns();
    for (int64_t turn = 0; !are_done(worker, phase, num_items); turn++) {
        if (turn % LOOK_EVERY == 0) {
            const int64_t waited_ns = now_ns() - since, item = take_over(worker, phase, waited_ns);
            if (item >= 0)
                return item;
            if (waited_ns > YIELD_AFTER_NS)
                sched_yield();
        }
        pause_briefly();
    }
    return -1;
}

void await_items(struct worker *worker, int phase, int64_t num_items)
{
    others_item(worker, phase, num_items); /* nobody holds an open one */
}

int64_t open_item(struct worker *worker, int phase, int64_t num_items, int64_t *then)
{
    struct seat *own = worker->seats + worker->self;
    if (worker->began_ns)
        worker->item_ns = now_ns() - worker->began_ns;
    int64_t item = take_from(worker, phase, &own->reserved);
    if (item < 0) {
        item = take_item(worker, phase);
        if (item >= num_items)
            item = others_item(worker, phase, num_items);
    }
    if (item < 0) {
        worker->began_ns = 0;
        return -1;
    }
    worker->began_ns = now_ns();
    __atomic_store_n(&own->holds, key_of(worker, phase, item), __ATOMIC_RELEASE);
    *then = take_item(worker, phase);
    if (*then < num_items)
        __atomic_store_n(&own->reserved, key_of(worker, phase, *then), __ATOMIC_RELEASE);
    else
        *then = -1;
    return item;
}

int may_write(struct worker *worker)
{
    struct seat *own = worker->seats + worker->self;
    return __atomic_exchange_n(&own->holds, 0, __ATOMIC_ACQ_REL) != 0;
}

struct run {
    const struct step *steps;
    int64_t num_steps, num_threads, num_entered;
    struct share *shares; /* [num_steps, PHASES] */
    struct seat *seats;
    struct pass *pass;
};

static _Thread_local const struct run *called;

static void run_all(void *arg)
{
    struct run *run = arg;
    if (called == run && run->pass && run->pass->begun)
        run->pass->begun();
    struct worker worker = {
        .seats = run->seats,
        .self = __atomic_fetch_add(&run->num_entered, 1, __ATOMIC_RELAXED),
        .num_threads = run->num_threads,
        .pass = run->pass,
    };
    for (; worker.step < run->num_steps; worker.step++) {
        worker.shares = run->shares + worker.step * PHASES;
        run->steps[worker.step].run(run->steps[worker.step].call, &worker);
    }
}

/* Runs the steps in their order. pass: what they are told, or null for steps that are told nothing. */
void fathom_run_steps(const struct step *steps, int64_t num_steps, int64_t num_threads, struct pass *pass)
{
    if (!parallel || num_threads < 1)
        num_threads = 1;
    const size_t shares_size = (size_t)(num_steps * PHASES) * sizeof(struct share);
    const size_t seats_size = (size_t)num_threads * sizeof(struct seat);
    char *memory = aligned_alloc(64, shares_size + seats_size);
    memset(memory, 0, shares_size + seats_size);
    struct run run = {
        .steps = steps,
        .num_steps = num_steps,
        .num_threads = num_threads,
        .shares = (struct share *)memory,
        .seats = (struct seat *)(memory + shares_size),
        .pass = pass,
    };
    called = &run;
    if (num_threads > 1)
        parallel(run_all, &run, (unsigned)num_threads, 0);
    else
        run_all(&run);
    called = 0;
    free(memory);
}
