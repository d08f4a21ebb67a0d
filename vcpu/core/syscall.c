/*
 * Fast system calls as an AMD processor has them: APM vol. 3 (SYSCALL, SYSRET, SYSENTER, SYSEXIT). SYSENTER and SYSEXIT
 * exist outside long mode only; SYSRET does not look whether RCX is canonical, the fetch behind it does.
 */
#include "desc.h"

#define FLAT_CODE (ATTR_G | ATTR_P | ATTR_S | ATTR_CODE | ATTR_READABLE | ATTR_ACCESSED)
#define FLAT_DATA (ATTR_G | ATTR_D | ATTR_P | ATTR_S | ATTR_WRITABLE | ATTR_ACCESSED)
#define SYSRET_FLAGS 0x3c7fd7u

/* Flat code and stack segments; bits: L or D of the code segment */
static void enter_flat(struct cpu *c, uint16_t cs, uint16_t ss, unsigned cpl, uint32_t bits, uint64_t rip)
{
    uint32_t dpl = ATTR_OF_DPL(cpl);
    struct seg_reg code = {0, 0xffffffff, (uint16_t)((cs & ~3u) | cpl), (uint16_t)(FLAT_CODE | dpl | bits)};
    ARCH(c)->seg[SS] = (struct seg_reg){0, 0xffffffff, (uint16_t)((ss & ~3u) | cpl), (uint16_t)(FLAT_DATA | dpl)};
    code_commit(c, &code, rip, cpl);
}

/* Single step over SYSCALL and SYSRET goes by TF as it is behind the instruction, so that an OS keeps the trap out of its
 * entry code by masking TF, and has it where SYSRET leads. */
static void step(struct cpu *c, bool tf_before)
{
    if (ARCH(c)->rflags & FLAG_TF) {
        debug_trap(c, DR6_BS);
    }
    if (tf_before) {
        cpu_unwind(c, NULL, UNWIND_RETRY);
    }
}

static _Noreturn void gp(struct cpu *c, const struct uop *u) { raise_fault_code(c, u, VEC_GP, 0); }

void op_syscall(struct cpu *c, const struct uop *u)
{
    struct cpu_arch *a = ARCH(c);
    if (!(a->efer & EFER_SCE) || !mode_protected(c)) {
        raise_fault(c, u, VEC_UD);
    }
    uint16_t selector = (uint16_t)(a->star >> 32);
    uint64_t next = uop_next_rip(c, u), flags = flags_get(c);
    GPR(c, RCX) = next;
    if (mode_long(c)) {
        GPR(c, R11) = flags & ~(uint64_t)FLAG_RF;
        flags_set(c, flags & ~(a->fmask | FLAG_RF));
        enter_flat(c, selector & 0xfffcu, selector + 8u, 0, ATTR_L, mode_64(c) ? a->lstar : a->cstar);
    } else {
        flags_set(c, flags & ~(uint64_t)(FLAG_IF | FLAG_VM | FLAG_RF));
        enter_flat(c, selector & 0xfffcu, selector + 8u, 0, ATTR_D, (uint32_t)a->star);
    }
    step(c, flags & FLAG_TF);
}

void op_sysret(struct cpu *c, const struct uop *u)
{
    struct cpu_arch *a = ARCH(c);
    if (!(a->efer & EFER_SCE)) {
        raise_fault(c, u, VEC_UD);
    }
    if (!mode_protected(c) || a->cpl) {
        gp(c, u);
    }
    uint16_t selector = (uint16_t)(a->star >> 48);
    uint64_t flags = flags_get(c);
    bool to64 = mode_64(c) && u->mode & UOP_OSZ64;
    if (mode_long(c)) {
        flags_set(c, GPR(c, R11) & SYSRET_FLAGS);
    } else {
        flags_set(c, flags | FLAG_IF);
    }
    if (to64) {
        enter_flat(c, selector + 16u, selector + 8u, 3, ATTR_L, GPR(c, RCX));
    } else {
        enter_flat(c, selector, selector + 8u, 3, ATTR_D, (uint32_t)GPR(c, RCX));
    }
    step(c, flags & FLAG_TF);
}

void op_sysenter(struct cpu *c, const struct uop *u)
{
    struct cpu_arch *a = ARCH(c);
    if (mode_long(c)) {
        raise_fault(c, u, VEC_UD);
    }
    uint16_t selector = (uint16_t)a->sysenter_cs;
    if (!mode_protected(c) || SEL_NULL(selector)) {
        gp(c, u);
    }
    flags_set(c, flags_get(c) & ~(uint64_t)(FLAG_IF | FLAG_VM | FLAG_RF));
    GPR(c, RSP) = (uint32_t)a->sysenter_esp;
    enter_flat(c, selector, selector + 8u, 0, ATTR_D, (uint32_t)a->sysenter_eip);
}

void op_sysexit(struct cpu *c, const struct uop *u)
{
    struct cpu_arch *a = ARCH(c);
    if (mode_long(c)) {
        raise_fault(c, u, VEC_UD);
    }
    uint16_t selector = (uint16_t)a->sysenter_cs;
    if (!mode_protected(c) || SEL_NULL(selector) || a->cpl) {
        gp(c, u);
    }
    GPR(c, RSP) = (uint32_t)GPR(c, RCX);
    enter_flat(c, selector + 16u, selector + 24u, 3, ATTR_D, (uint32_t)GPR(c, RDX));
}
