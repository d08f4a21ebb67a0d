/* The stack of the current mode. Nothing here changes RSP before its last possible fault. */
#ifndef ATOLL_STACK_H
#define ATOLL_STACK_H

#include "sized.h"

/* Bits of RSP in use: SDM vol. 1 section 6.2.3 */
static inline uint64_t stack_mask(const struct cpu *c)
{
    return c->mode & MODE_64 ? ~(uint64_t)0 : ARCH(c)->seg[SS].attr & 0x4000 ? UINT32_MAX : UINT16_MAX;
}

static inline void stack_set(struct cpu *c, uint64_t sp)
{
    uint64_t mask = stack_mask(c);
    GPR(c, RSP) = (mask == UINT16_MAX ? GPR(c, RSP) & ~mask : 0) | (sp & mask);
}

/* A stack address that is not canonical is #SS(0) whatever segment the instruction's operand is in. */
static inline uint64_t stack_linear(struct cpu *c, const struct uop *u, uint64_t sp, unsigned n, bool write)
{
    uint64_t lin = seg_linear(c, u, SS, sp, n, write);
    if (unlikely(!canonical(lin) || !canonical(lin + (n - 1)))) {
        raise_fault_code(c, u, VEC_SS, 0);
    }
    return lin;
}

/* Item of n bytes at RSP + displacement */
static inline uint64_t stack_read(struct cpu *c, const struct uop *u, int64_t displacement, unsigned n)
{
    uint64_t sp = (GPR(c, RSP) + (uint64_t)displacement) & stack_mask(c);
    return mem_read(c, u, stack_linear(c, u, sp, n, false), n);
}

static inline void stack_write(struct cpu *c, const struct uop *u, int64_t displacement, uint64_t value, unsigned n)
{
    uint64_t sp = (GPR(c, RSP) + (uint64_t)displacement) & stack_mask(c);
    mem_write(c, u, stack_linear(c, u, sp, n, true), value, n);
}

static inline void push_value(struct cpu *c, const struct uop *u, uint64_t value, unsigned n)
{
    stack_write(c, u, -(int64_t)n, value, n);
    stack_set(c, GPR(c, RSP) - n);
}

/* Fast push and pop of 64-bit mode; on a TLB miss the general form takes over. Then RSP is changed and *p is the item. */
#define FAST_PUSH(general, p)                                                                     \
    uint64_t sp_ = GPR(c, RSP) - 8;                                                               \
    const struct tlb_entry *e_ = tlb_slot(c, sp_);                                                \
    if (unlikely(!tlb_writes(e_, sp_, 8))) {                                                      \
        return general(c, u);                                                                     \
    }                                                                                             \
    volatile any64 *p = (volatile any64 *)(sp_ + e_->addend);                                     \
    GPR(c, RSP) = sp_

#define FAST_POP(general, value)                                                                  \
    uint64_t sp_ = GPR(c, RSP);                                                                   \
    const struct tlb_entry *e_ = tlb_slot(c, sp_);                                                \
    if (unlikely(!tlb_reads(e_, sp_, 8))) {                                                       \
        return general(c, u);                                                                     \
    }                                                                                             \
    uint64_t value = *(volatile any64 *)(sp_ + e_->addend)

#endif
