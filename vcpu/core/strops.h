/* Registers and addresses of the string instructions: RSI, RDI and RCX with the address size. */
#ifndef ATOLL_STROPS_H
#define ATOLL_STROPS_H

#include "sized.h"

static inline uint64_t string_register(const struct cpu *c, const struct uop *u, unsigned r)
{
    return u->mode & UOP_ASZ16 ? (uint16_t)GPR(c, r) : u->mode & UOP_ASZ32 ? (uint32_t)GPR(c, r) : GPR(c, r);
}

static inline void string_set(struct cpu *c, const struct uop *u, unsigned r, uint64_t v)
{
    if (u->mode & UOP_ASZ16) {
        REG16(c, r) = (uint16_t)v;
    } else {
        GPR(c, r) = u->mode & UOP_ASZ32 ? (uint32_t)v : v;
    }
}

static inline void string_advance(struct cpu *c, const struct uop *u, unsigned r, int64_t by)
{
    string_set(c, u, r, GPR(c, r) + (uint64_t)by);
}

static inline uint64_t string_counter(const struct cpu *c, const struct uop *u) { return string_register(c, u, RCX); }
static inline void string_count(struct cpu *c, const struct uop *u, uint64_t v) { string_set(c, u, RCX, v); }

/* Linear addresses of the next item: DS (or an override) with RSI, ES with RDI */
static inline uint64_t string_source(struct cpu *c, const struct uop *u, unsigned n)
{
    return seg_linear(c, u, u->seg, string_register(c, u, RSI), n, false);
}

static inline uint64_t string_target(struct cpu *c, const struct uop *u, unsigned n, bool write)
{
    return seg_linear(c, u, ES, string_register(c, u, RDI), n, write);
}

#endif
