/* Effective and linear addresses, SDM vol. 1 section 3.7.5, vol. 3 sections 3.3.7.1, 3.4 and 5.3. */
#ifndef ATOLL_EA_H
#define ATOLL_EA_H

#include "cpu.h"

/* 64-bit addresses in a segment without a base */
static inline uint64_t ea64(const struct cpu *c, const struct uop *u)
{
    return GPR(c, u->base) + (GPR(c, u->index) << u->scale) + (uint64_t)(int64_t)u->disp;
}

/* The offset in the segment, any address size: what LEA computes */
static inline uint64_t ea_offset(const struct cpu *c, const struct uop *u)
{
    uint64_t ea = ea64(c, u);
    return u->mode & UOP_ASZ32 ? (uint32_t)ea : u->mode & UOP_ASZ16 ? (uint16_t)ea : ea;
}

/* Segment checks and base outside 64-bit mode: limit, type, unusable segments; #SS(0) for SS, else #GP(0). n: bytes. (ea.c) */
uint64_t seg_linear_checked(struct cpu *c, const struct uop *u, unsigned seg, uint64_t offset, unsigned n, bool write);

/* Linear address of offset in a segment, any mode; in 64-bit mode a non-canonical result faults in the access. */
static inline uint64_t seg_linear(struct cpu *c, const struct uop *u, unsigned seg, uint64_t offset, unsigned n, bool write)
{
    if (likely(c->mode & MODE_64)) {
        return seg >= FS ? offset + ARCH(c)->seg[seg].base : offset;
    }
    return seg_linear_checked(c, u, seg, offset, n, write);
}

/* Linear address of the memory operand, any mode. n: bytes accessed */
static inline uint64_t ea_linear(struct cpu *c, const struct uop *u, unsigned n, bool write)
{
    return seg_linear(c, u, u->seg, ea_offset(c, u), n, write);
}

/* The same with a signed displacement added to the effective address before it wraps (second word of a far pointer, BT bit strings) */
static inline uint64_t ea_linear_plus(struct cpu *c, const struct uop *u, int64_t plus, unsigned n, bool write)
{
    uint64_t ea = ea64(c, u) + (uint64_t)plus;
    ea = u->mode & UOP_ASZ32 ? (uint32_t)ea : u->mode & UOP_ASZ16 ? (uint16_t)ea : ea;
    return seg_linear(c, u, u->seg, ea, n, write);
}

static inline bool canonical(uint64_t a) { return (uint64_t)((int64_t)(a << 16) >> 16) == a; }

#endif
