/* How a handler that changes rip gets to the next block. Handlers use ENTER and JUMP as their last statement. */
#ifndef ATOLL_BLOCK_H
#define ATOLL_BLOCK_H

#include "cpu.h"

/* To a block, unless attention or the budget calls for the run loop */
#define ENTER(c, target)                                                                                \
    do {                                                                                                \
        struct block *enter_ = (target);                                                                \
        int64_t left_ = (c)->budget - enter_->count;                                                    \
        (c)->block = enter_;                                                                            \
        ARCH(c)->rip = enter_->rip;                                                                     \
        if (unlikely(left_ < 0 || *(volatile uint32_t *)&(c)->s.attention)) {                           \
            return;                                                                                     \
        }                                                                                               \
        (c)->budget = left_;                                                                            \
        return enter_->u[0].fn((c), enter_->u);                                                         \
    } while (0)

/* To the target of a direct branch: the decoder made a block of u->imm (first a stub, see block.c) */
#define BRANCH(c, u) ENTER(c, (struct block *)(uintptr_t)(u)->imm)
/* Its rip */
static inline uint64_t branch_target(const struct uop *u) { return ((const struct block *)(uintptr_t)u->imm)->rip; }

/* Finds or translates the block at arch.rip and goes there. Faults of the fetch have arch.rip. (block.c) */
void block_go(struct cpu *c, const struct uop *u);

static inline struct jump_entry *jump_slot(struct cpu *c, uint64_t rip)
{
    return &c->jump[(rip ^ rip >> JUMP_BITS) & ((1 << JUMP_BITS) - 1)];
}

/* To a rip that has been checked against canonical form or CS limit */
#define JUMP(c, u, target)                                                                              \
    do {                                                                                                \
        uint64_t rip_ = (target);                                                                       \
        struct jump_entry *e_ = jump_slot(c, rip_);                                                     \
        if (likely(e_->key == (c)->jump_key && e_->block->rip == rip_)) {                               \
            ENTER(c, e_->block);                                                                        \
        }                                                                                               \
        ARCH(c)->rip = rip_;                                                                            \
        return block_go((c), (u));                                                                      \
    } while (0)

/* #GP(0) where a near branch may not lead: before anything is committed */
static inline void branch_check(struct cpu *c, const struct uop *u, uint64_t target)
{
    if (c->mode & MODE_64 ? (uint64_t)((int64_t)(target << 16) >> 16) != target : target > ARCH(c)->seg[CS].limit) {
        raise_fault_code(c, u, VEC_GP, 0);
    }
}

/* ---- for run.c and core.c ---- */
int blocks_create(struct cpu *c);
void blocks_destroy(struct cpu *c);
struct block *block_lookup(struct cpu *c, uint64_t rip); /* in c->mode; raises what the fetch raises */
/* Goes back to the run loop with rip at u, which has not been executed; the instruction count is put right. */
void leave_at(struct cpu *c, const struct uop *u);
/* Handlers of the uops that the decoder adds */
void op_goto(struct cpu *c, const struct uop *u);

/* fuse.c: flags that nobody sees are not computed; a comparison and the branch behind it become one. n uops, not yet in a block */
struct decoded;
void block_optimise(struct uop *u, unsigned n, const struct decoded *d);
/* fused.c: handler of a comparison for when Jcc of that condition follows; NULL: none */
uop_fn fused_compare(uop_fn first, unsigned condition);

#endif
