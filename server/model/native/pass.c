#include "pass.h"

const int64_t fathom_sizeof_pass = sizeof(struct pass);
const int64_t fathom_sizeof_step = sizeof(struct step);

/* Runs the steps in their order: one call for the caller, who then has no work between them. */
void fathom_run_steps(const struct step *steps, int64_t num_steps, struct pass *pass)
{
    for (int64_t i = 0; i < num_steps; i++)
        steps[i].run(steps[i].call, pass);
}
