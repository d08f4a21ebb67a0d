/* Memory kernels: sieve (stores), pointer chase (cache misses), block copies. */
#include <stddef.h>
#include <string.h>

#include "bench.h"

/* --- sieve: the sieve of Eratosthenes, one byte a number ------------------------------------------ */

enum { SIEVE_LIMIT = 1 << 20, SIEVE_PASSES = 20 };

static uint8_t *composite;

static void sieve_setup(void)
{
    composite = allocate(SIEVE_LIMIT);
}

static uint64_t sieve_run(void)
{
    uint64_t check = 0;
    for (int pass = 0; pass < SIEVE_PASSES; pass++) {
        memset(composite, 0, SIEVE_LIMIT);
        for (uint32_t p = 2; p * p < SIEVE_LIMIT; p++)
            if (!composite[p])
                for (uint32_t multiple = p * p; multiple < SIEVE_LIMIT; multiple += p)
                    composite[multiple] = 1;
        uint32_t primes = 0;
        for (uint32_t n = 2; n < SIEVE_LIMIT; n++)
            primes += !composite[n];
        check = mix(check, primes);
    }
    return check;
}

/* --- chase: each load's address is the value of the one before ------------------------------------ */

enum { CHASE_SLOTS = 32 << 20 >> 6, CHASE_STEPS = 2500000 };

struct slot {
    uint64_t next;
    uint64_t fill[7]; /* one cache line a slot */
};

static struct slot *slots;

static void chase_setup(void)
{
    slots = allocate(CHASE_SLOTS * sizeof *slots);
    for (uint64_t i = 0; i < CHASE_SLOTS; i++)
        slots[i].next = i;
    uint64_t state = 3;
    for (uint64_t i = CHASE_SLOTS - 1; i > 0; i--) { /* Sattolo: one cycle through all slots */
        uint64_t j = next_random(&state) % i, other = slots[i].next;
        slots[i].next = slots[j].next;
        slots[j].next = other;
    }
}

static uint64_t chase_run(void)
{
    uint64_t at = 0, check = 0;
    for (uint32_t step = 0; step < CHASE_STEPS; step++) {
        at = slots[at].next;
        check += at ^ step;
    }
    return check;
}

/* --- memcpy: the C library's, whichever it picks for this CPU -------------------------------------- */

enum { COPY_BYTES = 8 << 20, COPY_PASSES = 48 };

static uint8_t *copy_from, *copy_to;

static void copy_setup(void)
{
    copy_from = allocate(COPY_BYTES);
    copy_to = allocate(COPY_BYTES);
    uint64_t state = 4;
    for (uint32_t i = 0; i < COPY_BYTES; i += 8) {
        uint64_t value = next_random(&state);
        memcpy(copy_from + i, &value, 8);
    }
}

static void *(*volatile copy_through)(void *, const void *, size_t) = memcpy;

static uint64_t copy_run(void)
{
    uint64_t check = 0, word;
    for (int pass = 0; pass < COPY_PASSES; pass++) {
        copy_through(copy_to, copy_from, COPY_BYTES);
        memcpy(&word, copy_to + pass * 65536, 8);
        check = mix(check, word);
    }
    return check;
}

const struct kernel memory_kernels[] = {
    {"sieve", "stores", sieve_setup, sieve_run},
    {"chase", "cache misses", chase_setup, chase_run},
    {"memcpy", "block copies", copy_setup, copy_run},
    {0},
};
