/* Lazy flags worked out: SDM vol. 1 section 3.4.3.1 and the flags paragraphs of each instruction in vol. 2. */
#include "flags.h"

unsigned flag_cf_slow(const struct cpu *c)
{
    unsigned bits = 8u << (c->s.lazy & 3);
    uint64_t a = c->s.lazy_a, b = c->s.lazy_b, r = c->s.lazy_result;
    switch (c->s.lazy >> 2) {
    case LAZY_ADD: return r < a;
    case LAZY_ADC: return r <= a;
    case LAZY_SUB: return a < b;
    case LAZY_SBB: return a <= b;
    case LAZY_LOGIC: return 0;
    case LAZY_SHL: return b <= bits ? (a >> (bits - b)) & 1 : 0;
    case LAZY_SHR: return (a >> (b - 1)) & 1;
    case LAZY_SAR: return (unsigned)((int64_t)(a << (64 - bits)) >> (64 - bits) >> (b - 1)) & 1;
    case LAZY_MUL: return (unsigned)b;
    default: return c->s.arch.rflags & 1;
    }
}

unsigned flag_of_slow(const struct cpu *c)
{
    unsigned top = (8u << (c->s.lazy & 3)) - 1;
    uint64_t a = c->s.lazy_a, b = c->s.lazy_b, r = c->s.lazy_result;
    switch (c->s.lazy >> 2) {
    case LAZY_ADD:
    case LAZY_ADC: return (((a ^ r) & (b ^ r)) >> top) & 1;
    case LAZY_SUB:
    case LAZY_SBB: return (((a ^ b) & (a ^ r)) >> top) & 1;
    case LAZY_INC: return r == (uint64_t)1 << top;
    case LAZY_DEC: return r == ((uint64_t)1 << top) - 1;
    case LAZY_SHL: return ((r >> top) & 1) ^ flag_cf_slow(c);
    case LAZY_SHR: return b == 1 ? (a >> top) & 1 : 0;
    case LAZY_MUL: return (unsigned)b;
    case LAZY_NONE: return (c->s.arch.rflags >> 11) & 1;
    default: return 0; /* LOGIC, SAR */
    }
}

static unsigned flag_af(const struct cpu *c)
{
    switch (c->s.lazy >> 2) {
    case LAZY_ADD:
    case LAZY_ADC:
    case LAZY_SUB:
    case LAZY_SBB: return ((c->s.lazy_a ^ c->s.lazy_b ^ c->s.lazy_result) >> 4) & 1;
    case LAZY_INC: return (c->s.lazy_result & 15) == 0;
    case LAZY_DEC: return (c->s.lazy_result & 15) == 15;
    default: return 0; /* undefined or, for LOGIC, undefined and 0 on hardware */
    }
}

uint64_t flags_status_slow(const struct cpu *c)
{
    if (c->s.lazy == LAZY_NONE) {
        return c->s.arch.rflags & FLAGS_STATUS;
    }
    return (uint64_t)flag_cf_slow(c) | (uint64_t)flag_pf(c) << 2 | (uint64_t)flag_af(c) << 4 | (uint64_t)flag_zf(c) << 6 |
           (uint64_t)flag_sf(c) << 7 | (uint64_t)flag_of_slow(c) << 11;
}
