/* Work shared by the threads of PyTorch's own OpenMP pool.
 *
 * A pool of our own would wait for a core while PyTorch's threads spin at their barrier, so its pool is
 * borrowed through libgomp's ABI (`GOMP_parallel`, which LLVM's and Intel's runtimes have too). Where it
 * was not found the caller works alone. */
#ifndef FATHOM_TEAM_H
#define FATHOM_TEAM_H

#include <stdint.h>

/* Runs `work(arg)` on `num_threads` threads, the caller's among them, and returns when all have ended. */
void team_run(void (*work)(void *), void *arg, int num_threads);

/* Waits for the others of a team_run of as many threads; all have to come. */
void team_barrier(int num_threads);

/* The next item that nobody took. */
static inline int64_t take(int64_t *next) { return __atomic_fetch_add(next, 1, __ATOMIC_RELAXED); }

#endif
