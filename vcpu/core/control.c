/* Near control transfer, BOUND, PAUSE, and the instructions on single flags (SDM vol. 2). Far transfers: far.c. */
#include "block.h"
#include "stack.h"

#include <sched.h>

/* ---- Jcc ---- */
#define JCC(cc, number)                                                                           \
    HANDLER(op_j_##cc)                                                                            \
    {                                                                                             \
        if (flags_cond(c, number)) {                                                              \
            BRANCH(c, u);                                                                         \
        }                                                                                         \
        NEXT(c, u);                                                                               \
    }
JCC(o, 0) JCC(no, 1) JCC(b, 2) JCC(nb, 3) JCC(z, 4) JCC(nz, 5) JCC(be, 6) JCC(nbe, 7)
JCC(s, 8) JCC(ns, 9) JCC(p, 10) JCC(np, 11) JCC(l, 12) JCC(nl, 13) JCC(le, 14) JCC(nle, 15)

HANDLER(op_jmp) { BRANCH(c, u); }

/* ---- LOOP and JCXZ: the counter has the address size ---- */
static inline uint64_t counter(const struct cpu *c, const struct uop *u)
{
    return u->mode & UOP_ASZ16 ? (uint16_t)GPR(c, RCX) : u->mode & UOP_ASZ32 ? (uint32_t)GPR(c, RCX) : GPR(c, RCX);
}

/* Counts down; #GP of the target in segmented code comes before */
static inline bool count_down(struct cpu *c, const struct uop *u, bool condition)
{
    bool taken = counter(c, u) != 1 && condition;
    if (taken && !(c->mode & (MODE_64 | MODE_FLAT))) {
        branch_check(c, u, branch_target(u));
    }
    if (u->mode & UOP_ASZ16) {
        REG16(c, RCX)--;
    } else if (u->mode & UOP_ASZ32) {
        GPR(c, RCX) = (uint32_t)(GPR(c, RCX) - 1);
    } else {
        GPR(c, RCX)--;
    }
    return taken;
}

#define LOOP(name, condition)                                                                     \
    HANDLER(name)                                                                                 \
    {                                                                                             \
        if (count_down(c, u, condition)) {                                                        \
            BRANCH(c, u);                                                                         \
        }                                                                                         \
        NEXT(c, u);                                                                               \
    }
LOOP(op_loop, true)
LOOP(op_loope, flag_zf(c))
LOOP(op_loopne, !flag_zf(c))

HANDLER(op_jcxz)
{
    if (counter(c, u) == 0) {
        BRANCH(c, u);
    }
    NEXT(c, u);
}

/* ---- CALL and RET ---- */
static void call_64_general(struct cpu *c, const struct uop *u)
{
    push_value(c, u, uop_next_rip(c, u), 8);
    BRANCH(c, u);
}

HANDLER(op_call_64)
{
    uint64_t next = uop_next_rip(c, u);
    FAST_PUSH(call_64_general, p);
    *p = next;
    code_check(c, (const void *)p, 8);
    BRANCH(c, u);
}

#define CALL(B, ...)                                                                              \
    HANDLER(op_call_##B)                                                                          \
    {                                                                                             \
        branch_check(c, u, branch_target(u));                                                     \
        push_value(c, u, uop_next_rip(c, u), B / 8);                                              \
        BRANCH(c, u);                                                                             \
    }
CALL(16, )
CALL(32, )

#define INDIRECT(B, ...)                                                                          \
    HANDLER(op_call_ind_##B##_m)                                                                  \
    {                                                                                             \
        U(B) target = mem_read##B(c, u, ea_linear(c, u, B / 8, false));                           \
        branch_check(c, u, target);                                                               \
        push_value(c, u, uop_next_rip(c, u), B / 8);                                              \
        JUMP(c, u, target);                                                                       \
    }                                                                                             \
    static void call_ind_##B##_r_general(struct cpu *c, const struct uop *u)                      \
    {                                                                                             \
        U(B) target = RD_##B(c, u->rm);                                                           \
        branch_check(c, u, target);                                                               \
        push_value(c, u, uop_next_rip(c, u), B / 8);                                              \
        JUMP(c, u, target);                                                                       \
    }                                                                                             \
    HANDLER(op_jmp_ind_##B##_m)                                                                   \
    {                                                                                             \
        U(B) target = mem_read##B(c, u, ea_linear(c, u, B / 8, false));                           \
        branch_check(c, u, target);                                                               \
        JUMP(c, u, target);                                                                       \
    }                                                                                             \
    HANDLER(op_jmp_ind_##B##_r)                                                                   \
    {                                                                                             \
        U(B) target = RD_##B(c, u->rm);                                                           \
        branch_check(c, u, target);                                                               \
        JUMP(c, u, target);                                                                       \
    }                                                                                             \
    HANDLER(op_ret_imm_##B)                                                                       \
    {                                                                                             \
        U(B) target = (U(B))stack_read(c, u, 0, B / 8);                                           \
        branch_check(c, u, target);                                                               \
        stack_set(c, GPR(c, RSP) + B / 8 + u->imm);                                               \
        JUMP(c, u, target);                                                                       \
    }                                                                                             \
    static void ret_##B##_general(struct cpu *c, const struct uop *u)                             \
    {                                                                                             \
        U(B) target = (U(B))stack_read(c, u, 0, B / 8);                                           \
        branch_check(c, u, target);                                                               \
        stack_set(c, GPR(c, RSP) + B / 8);                                                        \
        JUMP(c, u, target);                                                                       \
    }
SIZES_V(INDIRECT, )

HANDLER(op_call_ind_16_r) { return call_ind_16_r_general(c, u); }
HANDLER(op_call_ind_32_r) { return call_ind_32_r_general(c, u); }

HANDLER(op_call_ind_64_r)
{
    uint64_t target = GPR(c, u->rm), next = uop_next_rip(c, u);
    if (unlikely(!canonical(target))) {
        return call_ind_64_r_general(c, u);
    }
    FAST_PUSH(call_ind_64_r_general, p);
    *p = next;
    code_check(c, (const void *)p, 8);
    JUMP(c, u, target);
}

HANDLER(op_ret_16) { return ret_16_general(c, u); }
HANDLER(op_ret_32) { return ret_32_general(c, u); }

HANDLER(op_ret_64)
{
    FAST_POP(ret_64_general, target);
    if (unlikely(!canonical(target))) {
        return ret_64_general(c, u);
    }
    GPR(c, RSP) = sp_ + 8;
    JUMP(c, u, target);
}

/* ---- BOUND: signed index against the pair in memory ---- */
HANDLER(op_bound)
{
    unsigned n = uop_size(u), shift = 64 - 8 * n;
    uint64_t lin = ea_linear(c, u, 2 * n, false);
    int64_t low = (int64_t)(mem_read(c, u, lin, n) << shift), high = (int64_t)(mem_read(c, u, lin + n, n) << shift);
    int64_t index = (int64_t)(GPR(c, u->reg) << shift);
    if (index < low || index > high) {
        raise_fault(c, u, VEC_BR);
    }
    NEXT(c, u);
}

/* A spinning vCPU lets others run now and then: the one it waits for may be among them. */
HANDLER(op_pause)
{
    if ((++c->pauses & 63) == 0) {
        sched_yield();
    }
    NEXT(c, u);
}

/* ---- single flags ---- */
HANDLER(op_clc) { flags_set_some(c, FLAG_CF, 0); NEXT(c, u); }
HANDLER(op_stc) { flags_set_some(c, FLAG_CF, FLAG_CF); NEXT(c, u); }
HANDLER(op_cmc) { flags_set_some(c, FLAG_CF, ~flags_get(c)); NEXT(c, u); }
HANDLER(op_cld) { ARCH(c)->rflags &= ~(uint64_t)FLAG_DF; NEXT(c, u); }
HANDLER(op_std) { ARCH(c)->rflags |= FLAG_DF; NEXT(c, u); }

/* AH is byte 1 of RAX */
HANDLER(op_lahf) { REG8(c, 1) = (uint8_t)((flags_get(c) & (FLAG_SF | FLAG_ZF | FLAG_AF | FLAG_PF | FLAG_CF)) | 2); NEXT(c, u); }
HANDLER(op_sahf) { flags_set_some(c, FLAG_SF | FLAG_ZF | FLAG_AF | FLAG_PF | FLAG_CF, REG8(c, 1)); NEXT(c, u); }
HANDLER(op_salc) { REG8(c, 0) = flag_cf(c) ? 0xff : 0; NEXT(c, u); }
