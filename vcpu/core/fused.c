/*
 * A comparison and the conditional branch behind it as one handler: it stands in the comparison's uop, reads the branch's
 * target from the uop behind it, and works out the condition from the operands instead of the flags, which it notes all
 * the same. fuse.c puts these in.
 */
#include "block.h"
#include "sized.h"

/* ---- operands, as in alu.c ---- */
#define OPERANDS_eg_r(B) U(B) a = RD_##B(c, u->rm), b = RD_##B(c, u->reg)
#define OPERANDS_ge_r(B) U(B) a = RD_##B(c, u->reg), b = RD_##B(c, u->rm)
#define OPERANDS_ei_r(B) U(B) a = RD_##B(c, u->rm), b = (U(B))u->imm
#define OPERANDS_eg_f(B) U(B) a = *p, b = RD_##B(c, u->reg)
#define OPERANDS_ge_f(B) U(B) a = RD_##B(c, u->reg), b = *p
#define OPERANDS_ei_f(B) U(B) a = *p, b = (U(B))u->imm
#define READ_r(B, general)
#define READ_f(B, general) FAST_READ(B, general, p)

#define NOTE_cmp(B)                                                                               \
    U(B) r = (U(B))(a - b);                                                                       \
    lazy_set(c, LAZY(LAZY_SUB, LOG2_##B), a, b, r)
#define NOTE_test(B)                                                                              \
    U(B) r = a & b;                                                                               \
    c->s.lazy = LAZY(LAZY_LOGIC, LOG2_##B);                                                         \
    c->s.lazy_result = r
#define NOTE_sub(B)                                                                               \
    NOTE_cmp(B);                                                                                  \
    WR_##B(c, u->rm, r)
#define NOTE_and(B)                                                                               \
    NOTE_test(B);                                                                                 \
    WR_##B(c, u->rm, r)
#define NOTE_add(B)                                                                               \
    U(B) r = (U(B))(a + b);                                                                       \
    lazy_set(c, LAZY(LAZY_ADD, LOG2_##B), a, b, r);                                               \
    WR_##B(c, u->rm, r)

#define FUSED(B, op, operands, form, cc, condition)                                               \
    static HANDLER(fused_##op##_##operands##_##B##_##form##_##cc)                                 \
    {                                                                                             \
        READ_##form(B, op_##op##_##operands##_##B##_##form);                                      \
        OPERANDS_##operands##_##form(B);                                                          \
        NOTE_##op(B);                                                                             \
        (void)r;                                                                                  \
        if (condition) {                                                                          \
            BRANCH(c, u + 1);                                                                     \
        }                                                                                         \
        NEXT(c, u + 1);                                                                           \
    }

/* ---- conditions: of a comparison, and of a result with CF = OF = 0 or where those do not matter ---- */
#define COMPARE_CONDITIONS(M, B, ...)                                                             \
    M(B, __VA_ARGS__, b, a < b)                                                                   \
    M(B, __VA_ARGS__, nb, a >= b)                                                                 \
    M(B, __VA_ARGS__, z, a == b)                                                                  \
    M(B, __VA_ARGS__, nz, a != b)                                                                 \
    M(B, __VA_ARGS__, be, a <= b)                                                                 \
    M(B, __VA_ARGS__, nbe, a > b)                                                                 \
    M(B, __VA_ARGS__, s, (S(B))r < 0)                                                             \
    M(B, __VA_ARGS__, ns, (S(B))r >= 0)                                                           \
    M(B, __VA_ARGS__, l, (S(B))a < (S(B))b)                                                       \
    M(B, __VA_ARGS__, nl, (S(B))a >= (S(B))b)                                                     \
    M(B, __VA_ARGS__, le, (S(B))a <= (S(B))b)                                                     \
    M(B, __VA_ARGS__, nle, (S(B))a > (S(B))b)
#define LOGIC_CONDITIONS(M, B, ...)                                                               \
    M(B, __VA_ARGS__, z, r == 0)                                                                  \
    M(B, __VA_ARGS__, nz, r != 0)                                                                 \
    M(B, __VA_ARGS__, s, (S(B))r < 0)                                                             \
    M(B, __VA_ARGS__, ns, (S(B))r >= 0)                                                           \
    M(B, __VA_ARGS__, l, (S(B))r < 0)                                                             \
    M(B, __VA_ARGS__, nl, (S(B))r >= 0)                                                           \
    M(B, __VA_ARGS__, le, (S(B))r <= 0)                                                           \
    M(B, __VA_ARGS__, nle, (S(B))r > 0)
#define ADD_CONDITIONS(M, B, ...)                                                                 \
    M(B, __VA_ARGS__, z, r == 0)                                                                  \
    M(B, __VA_ARGS__, nz, r != 0)                                                                 \
    M(B, __VA_ARGS__, s, (S(B))r < 0)                                                             \
    M(B, __VA_ARGS__, ns, (S(B))r >= 0)                                                           \
    M(B, __VA_ARGS__, b, r < a)                                                                   \
    M(B, __VA_ARGS__, nb, r >= a)

/* M(conditions, bits, op, operands, form): what is fused */
#define FAMILIES(M)                                                                               \
    M(COMPARE_CONDITIONS, 8, cmp, eg, r) M(COMPARE_CONDITIONS, 32, cmp, eg, r)                    \
    M(COMPARE_CONDITIONS, 64, cmp, eg, r) M(COMPARE_CONDITIONS, 8, cmp, ei, r)                    \
    M(COMPARE_CONDITIONS, 16, cmp, ei, r) M(COMPARE_CONDITIONS, 32, cmp, ei, r)                   \
    M(COMPARE_CONDITIONS, 64, cmp, ei, r) M(COMPARE_CONDITIONS, 32, cmp, eg, f)                   \
    M(COMPARE_CONDITIONS, 64, cmp, eg, f) M(COMPARE_CONDITIONS, 32, cmp, ge, f)                   \
    M(COMPARE_CONDITIONS, 64, cmp, ge, f) M(COMPARE_CONDITIONS, 8, cmp, ei, f)                    \
    M(COMPARE_CONDITIONS, 16, cmp, ei, f) M(COMPARE_CONDITIONS, 32, cmp, ei, f)                   \
    M(COMPARE_CONDITIONS, 64, cmp, ei, f) M(COMPARE_CONDITIONS, 32, sub, ei, r)                   \
    M(COMPARE_CONDITIONS, 64, sub, ei, r) M(LOGIC_CONDITIONS, 8, test, eg, r)                     \
    M(LOGIC_CONDITIONS, 32, test, eg, r) M(LOGIC_CONDITIONS, 64, test, eg, r)                     \
    M(LOGIC_CONDITIONS, 8, test, ei, r) M(LOGIC_CONDITIONS, 32, test, ei, r)                      \
    M(LOGIC_CONDITIONS, 8, test, ei, f) M(LOGIC_CONDITIONS, 32, test, ei, f)                      \
    M(LOGIC_CONDITIONS, 32, and, ei, r) M(ADD_CONDITIONS, 32, add, ei, r)                         \
    M(ADD_CONDITIONS, 64, add, ei, r)

#define DECLARE(conditions, B, op, operands, form) HANDLER(op_##op##_##operands##_##B##_##form);
FAMILIES(DECLARE)
#define DEFINE(conditions, B, op, operands, form) conditions(FUSED, B, op, operands, form)
FAMILIES(DEFINE)

/* ---- which handler stands for which pair ---- */
enum { CC_o, CC_no, CC_b, CC_nb, CC_z, CC_nz, CC_be, CC_nbe, CC_s, CC_ns, CC_p, CC_np, CC_l, CC_nl, CC_le, CC_nle };

struct family {
    uop_fn first;
    uop_fn fused[16];            /* by condition; NULL: not worth it */
};
#define ENTRY(B, op, operands, form, cc, condition) [CC_##cc] = fused_##op##_##operands##_##B##_##form##_##cc,
#define FAMILY(conditions, B, op, operands, form)                                                 \
    {op_##op##_##operands##_##B##_##form, {conditions(ENTRY, B, op, operands, form)}},
static const struct family families[] = {FAMILIES(FAMILY)};

uop_fn fused_compare(uop_fn first, unsigned condition)
{
    for (unsigned i = 0; i < sizeof families / sizeof families[0]; i++) {
        if (families[i].first == first) {
            return families[i].fused[condition];
        }
    }
    return NULL;
}
