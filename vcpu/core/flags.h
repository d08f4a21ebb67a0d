/*
 * Status flags, lazily: an ALU operation notes its kind, size, operands and result (all zero-extended);
 * a flag is worked out when something asks. SDM vol. 1 section 3.4.3.1.
 */
#ifndef ATOLL_FLAGS_H
#define ATOLL_FLAGS_H

#include "cpu.h"

#define LAZY(op, log2) ((uint32_t)(op) << 2 | (log2))
#define LOG2_8 0
#define LOG2_16 1
#define LOG2_32 2
#define LOG2_64 3

uint64_t flags_status_slow(const struct cpu *c); /* flags.c: the six status flags in place; looks at c->s alone */
unsigned flag_cf_slow(const struct cpu *c);
unsigned flag_of_slow(const struct cpu *c);

/* RFLAGS, exact; nothing is lazy afterwards */
static inline uint64_t flags_get(struct cpu *c)
{
    if (c->s.lazy != LAZY_NONE) {
        ARCH(c)->rflags = (ARCH(c)->rflags & ~(uint64_t)FLAGS_STATUS) | flags_status_slow(c);
        c->s.lazy = LAZY_NONE;
    }
    return ARCH(c)->rflags;
}

/* Sets all of OF SF ZF AF PF CF; the other bits of f are ignored */
static inline void flags_set_status(struct cpu *c, uint64_t f)
{
    ARCH(c)->rflags = (ARCH(c)->rflags & ~(uint64_t)FLAGS_STATUS) | (f & FLAGS_STATUS);
    c->s.lazy = LAZY_NONE;
}

/* Sets the status flags in mask to those of f and keeps the others */
static inline void flags_set_some(struct cpu *c, uint64_t mask, uint64_t f)
{
    ARCH(c)->rflags = (flags_get(c) & ~mask) | (f & mask);
}

/* Sets RFLAGS as a whole (the caller has masked what may not change); the interrupt and mode consequences are the caller's */
static inline void flags_set(struct cpu *c, uint64_t rflags)
{
    ARCH(c)->rflags = rflags | 2;
    c->s.lazy = LAZY_NONE;
}

static inline void lazy_set(struct cpu *c, uint32_t lazy, uint64_t a, uint64_t b, uint64_t result)
{
    c->s.lazy = lazy;
    c->s.lazy_a = a;
    c->s.lazy_b = b;
    c->s.lazy_result = result;
}

/* ---- single flags, 0 or 1 ---- */
static inline unsigned flag_zf(const struct cpu *c)
{
    return likely(c->s.lazy != LAZY_NONE) ? c->s.lazy_result == 0 : (ARCH(c)->rflags >> 6) & 1;
}

static inline unsigned flag_sf(const struct cpu *c)
{
    return likely(c->s.lazy != LAZY_NONE) ? (c->s.lazy_result >> ((8u << (c->s.lazy & 3)) - 1)) & 1 : (ARCH(c)->rflags >> 7) & 1;
}

static inline unsigned flag_pf(const struct cpu *c)
{
    return likely(c->s.lazy != LAZY_NONE) ? !__builtin_parity((uint8_t)c->s.lazy_result) : (ARCH(c)->rflags >> 2) & 1;
}

static inline unsigned flag_cf(const struct cpu *c)
{
    switch (c->s.lazy >> 2) {
    case LAZY_SUB: return c->s.lazy_a < c->s.lazy_b;
    case LAZY_ADD: return c->s.lazy_result < c->s.lazy_a;
    case LAZY_LOGIC: return 0;
    case LAZY_NONE:
    case LAZY_INC:
    case LAZY_DEC: return ARCH(c)->rflags & 1;
    default: return flag_cf_slow(c);
    }
}

static inline unsigned flag_of(const struct cpu *c)
{
    unsigned top = (8u << (c->s.lazy & 3)) - 1;
    switch (c->s.lazy >> 2) {
    case LAZY_NONE: return (ARCH(c)->rflags >> 11) & 1;
    case LAZY_SUB: return (((c->s.lazy_a ^ c->s.lazy_b) & (c->s.lazy_a ^ c->s.lazy_result)) >> top) & 1;
    case LAZY_LOGIC: return 0;
    default: return flag_of_slow(c);
    }
}

/* ---- conditions, SDM vol. 1 appendix B; cc is a constant wherever this is inlined ---- */
static inline bool flags_cond(const struct cpu *c, unsigned cc)
{
    unsigned t;
    switch (cc >> 1) {
    case 0: t = flag_of(c); break;
    case 1: t = flag_cf(c); break;
    case 2: t = flag_zf(c); break;
    case 3: t = flag_cf(c) | flag_zf(c); break;
    case 4: t = flag_sf(c); break;
    case 5: t = flag_pf(c); break;
    case 6: t = flag_sf(c) ^ flag_of(c); break;
    default: t = flag_zf(c) | (flag_sf(c) ^ flag_of(c)); break;
    }
    return t ^ (cc & 1);
}

#endif
