/* ADD OR ADC SBB AND SUB XOR CMP, TEST, NOT, NEG, INC, DEC in all forms (SDM vol. 2); names: vcpu/optable.py. */
#include "sized.h"

/* ---- results without effects: RES_op(c, a, b) ---- */
#define RES_add(B) ((U(B))(a + b))
#define RES_sub(B) ((U(B))(a - b))
#define RES_cmp(B) ((U(B))(a - b))
#define RES_adc(B) ((U(B))(a + b + flag_cf(c)))
#define RES_sbb(B) ((U(B))(a - b - flag_cf(c)))
#define RES_or(B) ((U(B))(a | b))
#define RES_and(B) ((U(B))(a & b))
#define RES_test(B) ((U(B))(a & b))
#define RES_xor(B) ((U(B))(a ^ b))

/* ---- flags: FLAGS_op, with the flags still those from before ---- */
#define LAZY_ARITH(B, op) lazy_set(c, LAZY(op, LOG2_##B), a, b, r)
#define LAZY_LOGICAL(B)                                                                           \
    do {                                                                                          \
        c->s.lazy = LAZY(LAZY_LOGIC, LOG2_##B);                                                     \
        c->s.lazy_result = r;                                                                       \
    } while (0)
#define FLAGS_add(B) LAZY_ARITH(B, LAZY_ADD)
#define FLAGS_sub(B) LAZY_ARITH(B, LAZY_SUB)
#define FLAGS_cmp(B) LAZY_ARITH(B, LAZY_SUB)
#define FLAGS_adc(B) LAZY_ARITH(B, flag_cf(c) ? LAZY_ADC : LAZY_ADD)
#define FLAGS_sbb(B) LAZY_ARITH(B, flag_cf(c) ? LAZY_SBB : LAZY_SUB)
#define FLAGS_or(B) LAZY_LOGICAL(B)
#define FLAGS_and(B) LAZY_LOGICAL(B)
#define FLAGS_test(B) LAZY_LOGICAL(B)
#define FLAGS_xor(B) LAZY_LOGICAL(B)

/* Computes r from a and b, then flags */
#define APPLY(op, B)                                                                              \
    U(B) r = RES_##op(B);                                                                         \
    FLAGS_##op(B)

/* ---- forms that write their first operand ---- */
#define ALU_WRITES(B, op)                                                                         \
    HANDLER(op_##op##_eg_##B##_r)                                                                 \
    {                                                                                             \
        U(B) a = RD_##B(c, u->rm), b = RD_##B(c, u->reg);                                         \
        APPLY(op, B);                                                                             \
        WR_##B(c, u->rm, r);                                                                      \
        NEXT(c, u);                                                                               \
    }                                                                                             \
    HANDLER(op_##op##_eg_##B##_r_nf)                                                              \
    {                                                                                             \
        U(B) a = RD_##B(c, u->rm), b = RD_##B(c, u->reg);                                         \
        WR_##B(c, u->rm, RES_##op(B));                                                            \
        NEXT(c, u);                                                                               \
    }                                                                                             \
    HANDLER(op_##op##_eg_##B##_m)                                                                 \
    {                                                                                             \
        U(B) b = RD_##B(c, u->reg);                                                               \
        RMW_MEMORY(B, 0, RES_##op(B));                                                            \
        APPLY(op, B);                                                                             \
        NEXT(c, u);                                                                               \
    }                                                                                             \
    HANDLER(op_##op##_eg_##B##_l)                                                                 \
    {                                                                                             \
        U(B) b = RD_##B(c, u->reg);                                                               \
        RMW_MEMORY(B, 1, RES_##op(B));                                                            \
        APPLY(op, B);                                                                             \
        NEXT(c, u);                                                                               \
    }                                                                                             \
    HANDLER(op_##op##_eg_##B##_f)                                                                 \
    {                                                                                             \
        FAST_WRITE(B, op_##op##_eg_##B##_m, p);                                                   \
        U(B) a = *p, b = RD_##B(c, u->reg);                                                       \
        APPLY(op, B);                                                                             \
        *p = r;                                                                                   \
        STORED_NEXT(B, p);                                                                        \
    }                                                                                             \
    HANDLER(op_##op##_ge_##B##_r)                                                                 \
    {                                                                                             \
        U(B) a = RD_##B(c, u->reg), b = RD_##B(c, u->rm);                                         \
        APPLY(op, B);                                                                             \
        WR_##B(c, u->reg, r);                                                                     \
        NEXT(c, u);                                                                               \
    }                                                                                             \
    HANDLER(op_##op##_ge_##B##_r_nf)                                                              \
    {                                                                                             \
        U(B) a = RD_##B(c, u->reg), b = RD_##B(c, u->rm);                                         \
        WR_##B(c, u->reg, RES_##op(B));                                                           \
        NEXT(c, u);                                                                               \
    }                                                                                             \
    HANDLER(op_##op##_ge_##B##_m)                                                                 \
    {                                                                                             \
        U(B) b = mem_read##B(c, u, ea_linear(c, u, B / 8, false)), a = RD_##B(c, u->reg);         \
        APPLY(op, B);                                                                             \
        WR_##B(c, u->reg, r);                                                                     \
        NEXT(c, u);                                                                               \
    }                                                                                             \
    HANDLER(op_##op##_ge_##B##_f)                                                                 \
    {                                                                                             \
        FAST_READ(B, op_##op##_ge_##B##_m, p);                                                    \
        U(B) a = RD_##B(c, u->reg), b = *p;                                                       \
        APPLY(op, B);                                                                             \
        WR_##B(c, u->reg, r);                                                                     \
        NEXT(c, u);                                                                               \
    }                                                                                             \
    HANDLER(op_##op##_ei_##B##_r)                                                                 \
    {                                                                                             \
        U(B) a = RD_##B(c, u->rm), b = (U(B))u->imm;                                              \
        APPLY(op, B);                                                                             \
        WR_##B(c, u->rm, r);                                                                      \
        NEXT(c, u);                                                                               \
    }                                                                                             \
    HANDLER(op_##op##_ei_##B##_r_nf)                                                              \
    {                                                                                             \
        U(B) a = RD_##B(c, u->rm), b = (U(B))u->imm;                                              \
        WR_##B(c, u->rm, RES_##op(B));                                                            \
        NEXT(c, u);                                                                               \
    }                                                                                             \
    HANDLER(op_##op##_ei_##B##_m)                                                                 \
    {                                                                                             \
        U(B) b = (U(B))u->imm;                                                                    \
        RMW_MEMORY(B, 0, RES_##op(B));                                                            \
        APPLY(op, B);                                                                             \
        NEXT(c, u);                                                                               \
    }                                                                                             \
    HANDLER(op_##op##_ei_##B##_l)                                                                 \
    {                                                                                             \
        U(B) b = (U(B))u->imm;                                                                    \
        RMW_MEMORY(B, 1, RES_##op(B));                                                            \
        APPLY(op, B);                                                                             \
        NEXT(c, u);                                                                               \
    }                                                                                             \
    HANDLER(op_##op##_ei_##B##_f)                                                                 \
    {                                                                                             \
        FAST_WRITE(B, op_##op##_ei_##B##_m, p);                                                   \
        U(B) a = *p, b = (U(B))u->imm;                                                            \
        APPLY(op, B);                                                                             \
        *p = r;                                                                                   \
        STORED_NEXT(B, p);                                                                        \
    }

SIZES(ALU_WRITES, add)
SIZES(ALU_WRITES, or)
SIZES(ALU_WRITES, adc)
SIZES(ALU_WRITES, sbb)
SIZES(ALU_WRITES, and)
SIZES(ALU_WRITES, sub)
SIZES(ALU_WRITES, xor)

/* ---- CMP and TEST: flags alone; their flags may be dead too (then they only look like a NOP) ---- */
#define ALU_COMPARES(B, op)                                                                       \
    HANDLER(op_##op##_eg_##B##_r)                                                                 \
    {                                                                                             \
        U(B) a = RD_##B(c, u->rm), b = RD_##B(c, u->reg);                                         \
        APPLY(op, B);                                                                             \
        NEXT(c, u);                                                                               \
    }                                                                                             \
    HANDLER(op_##op##_eg_##B##_r_nf) { NEXT(c, u); }                                              \
    HANDLER(op_##op##_eg_##B##_m)                                                                 \
    {                                                                                             \
        U(B) a = mem_read##B(c, u, ea_linear(c, u, B / 8, false)), b = RD_##B(c, u->reg);         \
        APPLY(op, B);                                                                             \
        NEXT(c, u);                                                                               \
    }                                                                                             \
    HANDLER(op_##op##_eg_##B##_f)                                                                 \
    {                                                                                             \
        FAST_READ(B, op_##op##_eg_##B##_m, p);                                                    \
        U(B) a = *p, b = RD_##B(c, u->reg);                                                       \
        APPLY(op, B);                                                                             \
        NEXT(c, u);                                                                               \
    }                                                                                             \
    HANDLER(op_##op##_ei_##B##_r)                                                                 \
    {                                                                                             \
        U(B) a = RD_##B(c, u->rm), b = (U(B))u->imm;                                              \
        APPLY(op, B);                                                                             \
        NEXT(c, u);                                                                               \
    }                                                                                             \
    HANDLER(op_##op##_ei_##B##_r_nf) { NEXT(c, u); }                                              \
    HANDLER(op_##op##_ei_##B##_m)                                                                 \
    {                                                                                             \
        U(B) a = mem_read##B(c, u, ea_linear(c, u, B / 8, false)), b = (U(B))u->imm;              \
        APPLY(op, B);                                                                             \
        NEXT(c, u);                                                                               \
    }                                                                                             \
    HANDLER(op_##op##_ei_##B##_f)                                                                 \
    {                                                                                             \
        FAST_READ(B, op_##op##_ei_##B##_m, p);                                                    \
        U(B) a = *p, b = (U(B))u->imm;                                                            \
        APPLY(op, B);                                                                             \
        NEXT(c, u);                                                                               \
    }

SIZES(ALU_COMPARES, cmp)
SIZES(ALU_COMPARES, test)

#define CMP_GE(B, op)                                                                             \
    HANDLER(op_##op##_ge_##B##_r)                                                                 \
    {                                                                                             \
        U(B) a = RD_##B(c, u->reg), b = RD_##B(c, u->rm);                                         \
        APPLY(op, B);                                                                             \
        NEXT(c, u);                                                                               \
    }                                                                                             \
    HANDLER(op_##op##_ge_##B##_r_nf) { NEXT(c, u); }                                              \
    HANDLER(op_##op##_ge_##B##_m)                                                                 \
    {                                                                                             \
        U(B) b = mem_read##B(c, u, ea_linear(c, u, B / 8, false)), a = RD_##B(c, u->reg);         \
        APPLY(op, B);                                                                             \
        NEXT(c, u);                                                                               \
    }                                                                                             \
    HANDLER(op_##op##_ge_##B##_f)                                                                 \
    {                                                                                             \
        FAST_READ(B, op_##op##_ge_##B##_m, p);                                                    \
        U(B) a = RD_##B(c, u->reg), b = *p;                                                       \
        APPLY(op, B);                                                                             \
        NEXT(c, u);                                                                               \
    }

SIZES(CMP_GE, cmp)

/* ---- one operand ---- */

/* INC and DEC leave CF alone: it moves into rflags, where their lazy forms look for it */
static inline void keep_cf(struct cpu *c)
{
    unsigned op = c->s.lazy >> 2;
    if (op != LAZY_NONE && op != LAZY_INC && op != LAZY_DEC) {
        ARCH(c)->rflags = (ARCH(c)->rflags & ~(uint64_t)FLAG_CF) | flag_cf(c);
    }
}

#define RES_inc(B) ((U(B))(a + 1))
#define RES_dec(B) ((U(B))(a - 1))
#define RES_neg(B) ((U(B))(0 - a))
#define RES_not(B) ((U(B))~a)
#define LAZY_COUNT(B, op)                                                                         \
    do {                                                                                          \
        keep_cf(c);                                                                               \
        c->s.lazy = LAZY(op, LOG2_##B);                                                             \
        c->s.lazy_result = r;                                                                       \
    } while (0)
#define FLAGS_inc(B) LAZY_COUNT(B, LAZY_INC)
#define FLAGS_dec(B) LAZY_COUNT(B, LAZY_DEC)
#define FLAGS_neg(B) lazy_set(c, LAZY(LAZY_SUB, LOG2_##B), 0, a, r)
#define FLAGS_not(B) (void)r

#define ALU_UNARY(B, op)                                                                          \
    HANDLER(op_##op##_##B##_r)                                                                    \
    {                                                                                             \
        U(B) a = RD_##B(c, u->rm);                                                                \
        APPLY(op, B);                                                                             \
        WR_##B(c, u->rm, r);                                                                      \
        NEXT(c, u);                                                                               \
    }                                                                                             \
    HANDLER(op_##op##_##B##_m)                                                                    \
    {                                                                                             \
        RMW_MEMORY(B, 0, RES_##op(B));                                                            \
        APPLY(op, B);                                                                             \
        NEXT(c, u);                                                                               \
    }                                                                                             \
    HANDLER(op_##op##_##B##_l)                                                                    \
    {                                                                                             \
        RMW_MEMORY(B, 1, RES_##op(B));                                                            \
        APPLY(op, B);                                                                             \
        NEXT(c, u);                                                                               \
    }                                                                                             \
    HANDLER(op_##op##_##B##_f)                                                                    \
    {                                                                                             \
        FAST_WRITE(B, op_##op##_##B##_m, p);                                                      \
        U(B) a = *p;                                                                              \
        APPLY(op, B);                                                                             \
        *p = r;                                                                                   \
        STORED_NEXT(B, p);                                                                        \
    }

#define ALU_COUNT_NF(B, op)                                                                       \
    HANDLER(op_##op##_##B##_r_nf)                                                                 \
    {                                                                                             \
        U(B) a = RD_##B(c, u->rm);                                                                \
        WR_##B(c, u->rm, RES_##op(B));                                                            \
        NEXT(c, u);                                                                               \
    }

SIZES(ALU_UNARY, inc)
SIZES(ALU_UNARY, dec)
SIZES(ALU_UNARY, neg)
SIZES(ALU_UNARY, not)
SIZES(ALU_COUNT_NF, inc)
SIZES(ALU_COUNT_NF, dec)
