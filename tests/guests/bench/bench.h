/* The benchmark's kernels: each call of run() does the same work and returns the same value, which
 * depends on all of the work, so that an emulator that computes wrongly is caught. One call takes
 * about 0.02 to 0.25 s on a machine of 2023.
 */
#ifndef BENCH_H
#define BENCH_H

#include <stdint.h>

struct kernel {
    const char *name;
    const char *what;
    void (*setup)(void); /* memory and inputs, outside the measured time; may be NULL */
    uint64_t (*run)(void);
};

extern const struct kernel integer_kernels[]; /* each array ends with a NULL name */
extern const struct kernel memory_kernels[];
extern const struct kernel float_kernels[];
extern const struct kernel system_kernels[];

/* A linear congruential generator (Knuth, MMIX); the upper bits are the good ones. */
static inline uint64_t next_random(uint64_t *state)
{
    *state = *state * 6364136223846793005u + 1442695040888963407u;
    return *state >> 16;
}

static inline uint64_t mix(uint64_t hash, uint64_t value)
{
    return (hash ^ value) * 0x9e3779b97f4a7c15u;
}

/* Memory for a kernel; ends the program with a message where there is none. */
void *allocate(uint64_t bytes);

#endif
