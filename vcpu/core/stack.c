/* PUSH POP PUSHA POPA PUSHF POPF ENTER LEAVE (SDM vol. 2). */
#include "stack.h"
#include "system.h"

#define PUSH_POP(B, ...)                                                                          \
    static void push_##B##_general(struct cpu *c, const struct uop *u)                            \
    {                                                                                             \
        push_value(c, u, RD_##B(c, u->rm), B / 8);                                                \
        NEXT(c, u);                                                                               \
    }                                                                                             \
    HANDLER(op_push_##B##_m)                                                                      \
    {                                                                                             \
        U(B) v = mem_read##B(c, u, ea_linear(c, u, B / 8, false));                                \
        push_value(c, u, v, B / 8);                                                               \
        NEXT(c, u);                                                                               \
    }                                                                                             \
    static void pop_##B##_general(struct cpu *c, const struct uop *u)                             \
    {                                                                                             \
        U(B) v = (U(B))stack_read(c, u, 0, B / 8);                                                \
        stack_set(c, GPR(c, RSP) + B / 8);                                                        \
        WR_##B(c, u->rm, v);                                                                      \
        NEXT(c, u);                                                                               \
    }                                                                                             \
    /* an address based on RSP is computed with the RSP after the pop */                          \
    HANDLER(op_pop_##B##_m)                                                                       \
    {                                                                                             \
        U(B) v = (U(B))stack_read(c, u, 0, B / 8);                                                \
        uint64_t lin = ea_linear_plus(c, u, u->base == RSP ? B / 8 : 0, B / 8, true);             \
        mem_write##B(c, u, lin, v);                                                               \
        stack_set(c, GPR(c, RSP) + B / 8);                                                        \
        NEXT(c, u);                                                                               \
    }                                                                                             \
    HANDLER(op_push_i_##B)                                                                        \
    {                                                                                             \
        push_value(c, u, (U(B))u->imm, B / 8);                                                    \
        NEXT(c, u);                                                                               \
    }

SIZES_V(PUSH_POP, )

HANDLER(op_push_16_r) { return push_16_general(c, u); }
HANDLER(op_push_32_r) { return push_32_general(c, u); }
HANDLER(op_pop_16_r) { return pop_16_general(c, u); }
HANDLER(op_pop_32_r) { return pop_32_general(c, u); }

HANDLER(op_push_64_r)
{
    uint64_t v = GPR(c, u->rm);
    FAST_PUSH(push_64_general, p);
    *p = v;
    STORED_NEXT(64, p);
}

HANDLER(op_pop_64_r)
{
    FAST_POP(pop_64_general, v);
    GPR(c, RSP) = sp_ + 8;
    GPR(c, u->rm) = v;
    NEXT(c, u);
}

HANDLER(op_pusha)
{
    unsigned n = uop_size(u);
    for (unsigned i = 1; i <= 8; i++) {
        mem_probe_write(c, u, stack_linear(c, u, (GPR(c, RSP) - i * n) & stack_mask(c), n, true), n);
    }
    for (unsigned i = 0; i < 8; i++) {
        stack_write(c, u, -(int64_t)((i + 1) * n), GPR(c, i), n);
    }
    stack_set(c, GPR(c, RSP) - 8 * n);
    NEXT(c, u);
}

static void popa(struct cpu *c, const struct uop *u)
{
    unsigned n = uop_size(u);
    uint64_t v[8];
    for (unsigned i = 8; i-- > 0;) {
        v[i] = stack_read(c, u, (int64_t)((7 - i) * n), n);
    }
    stack_set(c, GPR(c, RSP) + 8 * n);
    for (unsigned i = 0; i < 8; i++) {
        if (i != RSP) {
            if (n == 2) {
                REG16(c, i) = (uint16_t)v[i];
            } else {
                GPR(c, i) = v[i];
            }
        }
    }
}

HANDLER(op_popa) { popa(c, u); NEXT(c, u); }

/* In VM86 mode with IOPL below 3: #GP(0) (no VME in the model) */
static void check_vm86_iopl(struct cpu *c, const struct uop *u)
{
    if (mode_vm86(c) && (ARCH(c)->rflags & FLAG_IOPL) != FLAG_IOPL) {
        raise_fault_code(c, u, VEC_GP, 0);
    }
}

HANDLER(op_pushf)
{
    check_vm86_iopl(c, u);
    push_value(c, u, flags_get(c) & ~(uint64_t)(FLAG_VM | FLAG_RF), uop_size(u));
    NEXT(c, u);
}

HANDLER(op_popf)
{
    check_vm86_iopl(c, u);
    unsigned n = uop_size(u), iopl = (unsigned)(ARCH(c)->rflags & FLAG_IOPL) >> 12;
    uint64_t v = stack_read(c, u, 0, n), change = FLAGS_STATUS | FLAG_TF | FLAG_DF | FLAG_NT;
    if (n != 2) {
        change |= FLAG_AC | FLAG_ID | FLAG_RF;
        v &= ~(uint64_t)FLAG_RF;
    }
    if (ARCH(c)->cpl <= iopl) {
        change |= FLAG_IF;
    }
    if (ARCH(c)->cpl == 0) {
        change |= FLAG_IOPL;
    }
    stack_set(c, GPR(c, RSP) + n);
    uint64_t before = flags_get(c);
    flags_set(c, (before & ~change) | (v & change));
    if ((before ^ v) & change & FLAG_AC) {
        mmu_set_mode(c);
    }
    NEXT(c, u);
}

HANDLER(op_enter)
{
    unsigned n = uop_size(u), level = u->aux & 31;
    uint64_t mask = stack_mask(c), frame = GPR(c, RSP) - n;
    uint64_t bytes = (uint64_t)n * (1 + level);
    uint64_t final = (GPR(c, RSP) - bytes - u->imm) & mask;
    /* everything that can fault, in the order of the accesses */
    mem_probe_write(c, u, stack_linear(c, u, frame & mask, n, true), n);
    for (unsigned i = 1; i <= level; i++) {
        if (i < level) {
            mem_probe_read(c, u, stack_linear(c, u, (GPR(c, RBP) - (uint64_t)i * n) & mask, n, false), n);
        }
        mem_probe_write(c, u, stack_linear(c, u, (frame - (uint64_t)i * n) & mask, n, true), n);
    }
    mem_probe_write(c, u, stack_linear(c, u, final, n, true), n);
    stack_write(c, u, -(int64_t)n, GPR(c, RBP), n);
    for (unsigned i = 1; i < level; i++) {
        uint64_t display = mem_read(c, u, stack_linear(c, u, (GPR(c, RBP) - (uint64_t)i * n) & mask, n, false), n);
        stack_write(c, u, -(int64_t)(n * (i + 1)), display, n);
    }
    if (level) {
        stack_write(c, u, -(int64_t)bytes, frame, n);
    }
    if (n == 2) {
        REG16(c, RBP) = (uint16_t)frame;
    } else {
        GPR(c, RBP) = n == 4 ? (uint32_t)frame : frame;
    }
    stack_set(c, final);
    NEXT(c, u);
}

HANDLER(op_leave)
{
    unsigned n = uop_size(u);
    uint64_t sp = GPR(c, RBP) & stack_mask(c);
    uint64_t v = mem_read(c, u, stack_linear(c, u, sp, n, false), n);
    stack_set(c, sp + n);
    if (n == 2) {
        REG16(c, RBP) = (uint16_t)v;
    } else {
        GPR(c, RBP) = v;
    }
    NEXT(c, u);
}
