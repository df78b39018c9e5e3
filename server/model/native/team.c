#include "team.h"

typedef void (*parallel_function)(void (*)(void *), void *, unsigned, unsigned);
typedef void (*barrier_function)(void);

static parallel_function parallel;
static barrier_function barrier;

/* The addresses of the process's `GOMP_parallel` and `GOMP_barrier`, or two nulls. */
void fathom_use_team(void *parallel_address, void *barrier_address)
{
    parallel = (parallel_function)parallel_address;
    barrier = (barrier_function)barrier_address;
}

void team_run(void (*work)(void *), void *arg, int num_threads)
{
    if (parallel && num_threads > 1)
        parallel(work, arg, (unsigned)num_threads, 0);
    else
        work(arg);
}

void team_barrier(int num_threads)
{
    if (barrier && num_threads > 1)
        barrier();
}
