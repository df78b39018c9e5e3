/* What the steps of a recorded forward pass are told of each run, beside what lies in the memory that they were
 * bound to. */
#ifndef FATHOM_PASS_H
#define FATHOM_PASS_H

#include <stdint.h>

struct lora_segment {
    int64_t slot, start, end;
};

/* The rows of a layer that apply LoRA. */
struct reached {
    const struct lora_segment *segments;
    int64_t num_segments;
};

/* Neighbouring rows that are the next tokens of one sequence. */
struct span {
    int64_t first_row, num_rows;
    int64_t kv_len;        /* tokens of the sequence, these included */
    const int64_t *blocks; /* its own, as many as that takes */
};

struct pass {
    const int64_t *slots;          /* [num_rows]: where each row's keys and values are written */
    const int64_t *block_table;    /* [num_decodes, table_width], of the rows before the first span */
    const int64_t *kv_lens;        /* [num_decodes], the row's own token included */
    int64_t table_width;
    const struct span *spans;      /* all rows behind the decode rows */
    int64_t num_spans;
    const int64_t *wanted;         /* [num_wanted], rising: rows read behind the last attention; or null: all */
    int64_t num_wanted;
    const struct reached *reached; /* by layer, lm_head's behind them; or null: no row applies LoRA */
    float *low;                    /* room for any one LoRA call's `low` */
    void (*begun)(void);           /* called by the caller's thread when the others may have begun; or null */
};

#endif
