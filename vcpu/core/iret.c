/* IRET in every mode: SDM vol. 2 (IRET), vol. 3 sections 6.12.1, 6.14.3, 20.2.3. */
#include "desc.h"

/* far.c: the code and stack segments of a far return */
struct seg_reg far_return_code(struct cpu *c, const struct uop *u, uint16_t selector);
struct seg_reg far_return_stack(struct cpu *c, const struct uop *u, uint16_t selector, const struct seg_reg *cs);

#define FLAGS_ANY_CPL (FLAGS_STATUS | FLAG_TF | FLAG_DF | FLAG_NT | FLAG_RF | FLAG_AC | FLAG_ID)

/* RFLAGS from a popped image: IF needs CPL <= IOPL, IOPL (and VIF, VIP, VM) need CPL 0; a 16-bit image has no upper half. */
static void load_flags(struct cpu *c, uint64_t image, unsigned width, unsigned cpl)
{
    uint64_t old = flags_get(c), mask = FLAGS_ANY_CPL;
    if (cpl <= (old & FLAG_IOPL) >> 12) {
        mask |= FLAG_IF;
    }
    if (cpl == 0) {
        mask |= FLAG_IOPL | FLAG_VIF | FLAG_VIP;
    }
    if (width == 2) {
        mask &= 0xffff;
    }
    flags_set(c, (old & ~mask) | (image & mask));
}

static void iret_real(struct cpu *c, const struct uop *u, unsigned width)
{
    bool vm86 = mode_vm86(c);
    if (vm86 && (ARCH(c)->rflags & FLAG_IOPL) != FLAG_IOPL) {
        raise_fault_code(c, u, VEC_GP, 0);
    }
    struct stack s = stack_current(c, u, width);
    uint64_t rip = stack_pop(c, &s);
    uint16_t selector = (uint16_t)stack_pop(c, &s);
    uint64_t image = stack_pop(c, &s);
    struct seg_reg cs = ARCH(c)->seg[CS];
    code_check_rip(c, u, &cs, rip, 0);
    cs.selector = selector;
    cs.base = (uint32_t)selector << 4;
    uint64_t old = flags_get(c), mask = FLAGS_ANY_CPL | FLAG_IF | (vm86 ? 0 : FLAG_IOPL);
    if (width == 2) {
        mask &= 0xffff;
    }
    stack_commit(c, &s);
    flags_set(c, (old & ~mask) | (image & mask));
    code_commit(c, &cs, rip, ARCH(c)->cpl);
}

static void iret_to_vm86(struct cpu *c, struct stack *s, uint64_t rip, uint16_t cs, uint64_t image)
{
    uint64_t sp = stack_pop(c, s);
    static const uint8_t order[] = {SS, ES, DS, FS, GS};
    uint16_t selector[sizeof order];
    for (unsigned i = 0; i < sizeof order; i++) {
        selector[i] = (uint16_t)stack_pop(c, s);
    }
    flags_get(c);
    flags_set(c, (image & (FLAGS_ANY_CPL | FLAG_IF | FLAG_IOPL | FLAG_VIF | FLAG_VIP)) | FLAG_VM);
    for (unsigned i = 0; i < sizeof order; i++) {
        seg_load_vm86(c, order[i], selector[i]);
    }
    seg_load_vm86(c, CS, cs);
    GPR(c, RSP) = (uint32_t)sp;
    ARCH(c)->rip = (uint16_t)rip;
    set_cpl(c, 3);
}

/* NT set: back to the task that the back link names */
static void iret_task(struct cpu *c, const struct uop *u)
{
    const struct seg_reg *tr = &ARCH(c)->tr;
    uint16_t selector = (uint16_t)mem_read_super(c, u, (uint32_t)tr->base, 2);
    struct desc d;
    uint32_t error = SEL_ERROR(selector);
    if (selector & 4 || SEL_NULL(selector) || !desc_read(c, u, selector, &d) || d.attr & ATTR_S ||
        ((d.attr & ATTR_TYPE) != DESC_TSS32_BUSY && (d.attr & ATTR_TYPE) != DESC_TSS16_BUSY)) {
        raise_fault_code(c, u, VEC_TS, error);
    }
    if (!(d.attr & ATTR_P)) {
        raise_fault_code(c, u, VEC_NP, error);
    }
    task_switch(c, u, &d, TASK_IRET, uop_next_rip(c, u), false, 0, 0);
}

static void iret_protected(struct cpu *c, const struct uop *u, unsigned width)
{
    struct cpu_arch *a = ARCH(c);
    unsigned cpl = a->cpl;
    if (a->rflags & FLAG_NT) {
        if (mode_long(c)) {
            raise_fault_code(c, u, VEC_GP, 0);
        }
        iret_task(c, u);
        return;
    }
    bool from64 = mode_64(c);
    struct stack s = stack_current(c, u, width);
    uint64_t rip = stack_pop(c, &s);
    uint16_t selector = (uint16_t)stack_pop(c, &s);
    uint64_t image = stack_pop(c, &s);
    if (width == 4 && image & FLAG_VM && cpl == 0 && !mode_long(c)) {
        iret_to_vm86(c, &s, rip, selector, image);
        return;
    }
    struct seg_reg cs = far_return_code(c, u, selector);
    unsigned rpl = SEL_RPL(selector);
    if (from64 || rpl != cpl) {
        uint64_t sp = stack_pop(c, &s);
        s.ss = far_return_stack(c, u, (uint16_t)stack_pop(c, &s), &cs);
        s.sp = sp;
        s.flat64 = mode_long(c) && cs.attr & ATTR_L;
    }
    code_check_rip(c, u, &cs, rip, 0);
    a->seg[SS] = s.ss;
    stack_commit(c, &s);
    load_flags(c, image, width, cpl);
    code_commit(c, &cs, rip, rpl);
    if (rpl != cpl) {
        seg_drop_privileged(c, rpl);
    }
}

void op_iret(struct cpu *c, const struct uop *u)
{
    unsigned width = uop_size(u);
    if (mode_real_or_vm86(c)) {
        iret_real(c, u, width);
    } else {
        iret_protected(c, u, width);
    }
    ARCH(c)->nmi_blocked = 0; /* SDM vol. 3 section 6.7.1 */
}
