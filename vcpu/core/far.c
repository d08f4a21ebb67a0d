/*
 * Far JMP, CALL and RET: SDM vol. 2 (JMP, CALL, RET), vol. 3 sections 5.8 and 7.2; call gates of long mode
 * section 5.8.3.1.
 */
#include "desc.h"
#include "ea.h"

void code_check_rip(struct cpu *c, const struct uop *u, const struct seg_reg *cs, uint64_t rip, uint32_t ext)
{
    bool ok = mode_long(c) && cs->attr & ATTR_L ? is_canonical(rip) : rip <= cs->limit;
    if (!ok) {
        raise_fault_code(c, u, VEC_GP, ext);
    }
}

void code_commit(struct cpu *c, const struct seg_reg *cs, uint64_t rip, unsigned cpl)
{
    ARCH(c)->seg[CS] = *cs;
    ARCH(c)->rip = rip;
    set_cpl(c, cpl);
}

/* A code segment descriptor that may be entered: presence, and L with D (APM vol. 2 section 4.8.1) */
static void check_code(struct cpu *c, const struct uop *u, const struct desc *d, uint32_t error)
{
    if (mode_long(c) && (d->attr & (ATTR_L | ATTR_D)) == (ATTR_L | ATTR_D)) {
        raise_fault_code(c, u, VEC_GP, error);
    }
    if (!(d->attr & ATTR_P)) {
        raise_fault_code(c, u, VEC_NP, error);
    }
}

/* ---- real mode and VM86 ---- */

static void far_real(struct cpu *c, const struct uop *u, uint16_t selector, uint64_t offset, bool call)
{
    struct seg_reg cs = ARCH(c)->seg[CS];
    struct stack s = stack_current(c, u, uop_size(u));
    if (call) {
        stack_push(c, &s, cs.selector);
        stack_push(c, &s, uop_next_rip(c, u));
    }
    code_check_rip(c, u, &cs, offset, 0);
    cs.selector = selector;
    cs.base = (uint32_t)selector << 4;
    if (call) {
        stack_commit(c, &s);
    }
    code_commit(c, &cs, offset, ARCH(c)->cpl);
}

/* ---- call gates ---- */

static void gate_inner(struct cpu *c, const struct uop *u, const struct desc *gate, struct seg_reg *cs, uint64_t offset,
                       unsigned width)
{
    struct cpu_arch *a = ARCH(c);
    unsigned cpl = ATTR_DPL(cs->attr);
    struct stack old = stack_current(c, u, width);
    struct stack s = old;
    s.mode = mmu_mode_for_cpl(c, cpl);
    unsigned params = 0;
    if (width == 8) {
        s.flat64 = true;
        s.ss = (struct seg_reg){0, 0, (uint16_t)cpl, ATTR_OF_DPL(cpl)};
        s.sp = task_inner_stack64(c, u, cpl, 0);
    } else {
        uint16_t selector;
        uint32_t esp;
        task_inner_stack(c, u, cpl, &selector, &esp, 0);
        s.ss = seg_check_stack(c, u, selector, cpl, VEC_TS, 0);
        s.sp = esp;
        s.error = SEL_ERROR(selector);
        params = gate->hi & 31;
    }
    code_check_rip(c, u, cs, offset, 0);
    stack_push(c, &s, old.ss.selector);
    stack_push(c, &s, GPR(c, RSP));
    for (unsigned i = params; i-- > 0;) {
        stack_push(c, &s, stack_peek(c, &old, i));
    }
    stack_push(c, &s, a->seg[CS].selector);
    stack_push(c, &s, uop_next_rip(c, u));
    a->seg[SS] = s.ss;
    stack_commit(c, &s);
    cs->selector = (uint16_t)((cs->selector & ~3u) | cpl);
    code_commit(c, cs, offset, cpl);
}

static void far_gate(struct cpu *c, const struct uop *u, struct desc *gate, bool call)
{
    unsigned cpl = ARCH(c)->cpl;
    uint16_t selector = (uint16_t)(gate->lo >> 16);
    uint64_t offset = (gate->lo & 0xffff) | (gate->hi & 0xffff0000);
    unsigned width = (gate->attr & ATTR_TYPE) == DESC_CALL16 ? 2 : 4;
    if (mode_long(c)) {
        uint64_t upper;
        if (!desc_read_upper(c, u, gate, &upper)) {
            raise_fault_code(c, u, VEC_GP, SEL_ERROR(gate->selector));
        }
        offset |= upper;
        width = 8;
    } else if (width == 2) {
        offset &= 0xffff;
    }
    struct desc d;
    if (SEL_NULL(selector)) {
        raise_fault_code(c, u, VEC_GP, 0);
    }
    uint32_t error = SEL_ERROR(selector);
    if (!desc_read(c, u, selector, &d) || (d.attr & (ATTR_S | ATTR_CODE)) != (ATTR_S | ATTR_CODE) ||
        ATTR_DPL(d.attr) > cpl || (mode_long(c) && (d.attr & (ATTR_L | ATTR_D)) != ATTR_L)) {
        raise_fault_code(c, u, VEC_GP, error);
    }
    bool conforming = d.attr & ATTR_CONFORMING;
    if (!call && !conforming && ATTR_DPL(d.attr) != cpl) {
        raise_fault_code(c, u, VEC_GP, error);
    }
    check_code(c, u, &d, error);
    desc_accessed(c, u, &d);
    struct seg_reg cs = desc_segment(&d, selector);
    if (call && !conforming && ATTR_DPL(d.attr) < cpl) {
        gate_inner(c, u, gate, &cs, offset, width);
        return;
    }
    struct stack s = stack_current(c, u, width);
    if (call) {
        stack_push(c, &s, ARCH(c)->seg[CS].selector);
        stack_push(c, &s, uop_next_rip(c, u));
    }
    code_check_rip(c, u, &cs, offset, 0);
    if (call) {
        stack_commit(c, &s);
    }
    cs.selector = (uint16_t)((selector & ~3u) | cpl);
    code_commit(c, &cs, offset, cpl);
}

/* ---- protected and long mode ---- */

static void far_system(struct cpu *c, const struct uop *u, struct desc *d, bool call)
{
    uint32_t error = SEL_ERROR(d->selector);
    unsigned type = d->attr & ATTR_TYPE;
    bool gate = type == DESC_CALL32 || (type == DESC_CALL16 && !mode_long(c));
    bool task_gate = type == DESC_TASK_GATE && !mode_long(c);
    bool tss = (type == DESC_TSS32 || type == DESC_TSS16) && !mode_long(c);
    unsigned dpl = ATTR_DPL(d->attr);
    if (!(gate || task_gate || tss) || dpl < ARCH(c)->cpl || dpl < SEL_RPL(d->selector) || (tss && d->selector & 4)) {
        raise_fault_code(c, u, VEC_GP, error);
    }
    if (!(d->attr & ATTR_P)) {
        raise_fault_code(c, u, VEC_NP, error);
    }
    if (gate) {
        far_gate(c, u, d, call);
        return;
    }
    if (task_gate) {
        uint16_t selector = (uint16_t)(d->lo >> 16);
        error = SEL_ERROR(selector);
        if (selector & 4 || SEL_NULL(selector) || !desc_read(c, u, selector, d) || d->attr & ATTR_S ||
            ((d->attr & ATTR_TYPE) != DESC_TSS32 && (d->attr & ATTR_TYPE) != DESC_TSS16)) {
            raise_fault_code(c, u, VEC_GP, error);
        }
        if (!(d->attr & ATTR_P)) {
            raise_fault_code(c, u, VEC_NP, error);
        }
    }
    task_switch(c, u, d, call ? TASK_CALL : TASK_JUMP, uop_next_rip(c, u), false, 0, 0);
}

static void far_transfer(struct cpu *c, const struct uop *u, uint16_t selector, uint64_t offset, bool call)
{
    if (mode_real_or_vm86(c)) {
        far_real(c, u, selector, offset, call);
        return;
    }
    struct desc d;
    if (SEL_NULL(selector)) {
        raise_fault_code(c, u, VEC_GP, 0);
    }
    uint32_t error = SEL_ERROR(selector);
    if (!desc_read(c, u, selector, &d)) {
        raise_fault_code(c, u, VEC_GP, error);
    }
    if (!(d.attr & ATTR_S)) {
        far_system(c, u, &d, call);
        return;
    }
    unsigned cpl = ARCH(c)->cpl, dpl = ATTR_DPL(d.attr);
    bool allowed = d.attr & ATTR_CONFORMING ? dpl <= cpl : dpl == cpl && SEL_RPL(selector) <= cpl;
    if (!(d.attr & ATTR_CODE) || !allowed) {
        raise_fault_code(c, u, VEC_GP, error);
    }
    check_code(c, u, &d, error);
    desc_accessed(c, u, &d);
    struct seg_reg cs = desc_segment(&d, (uint16_t)((selector & ~3u) | cpl));
    struct stack s = stack_current(c, u, uop_size(u));
    if (call) {
        stack_push(c, &s, ARCH(c)->seg[CS].selector);
        stack_push(c, &s, uop_next_rip(c, u));
    }
    code_check_rip(c, u, &cs, offset, 0);
    if (call) {
        stack_commit(c, &s);
    }
    code_commit(c, &cs, offset, cpl);
}

static void far_immediate(struct cpu *c, const struct uop *u, bool call)
{
    far_transfer(c, u, (uint16_t)(u->imm >> 32), (uint32_t)u->imm, call);
}

static void far_memory(struct cpu *c, const struct uop *u, bool call)
{
    unsigned n = uop_size(u);
    uint64_t offset = mem_read(c, u, ea_linear(c, u, n, false), n);
    uint16_t selector = mem_read16(c, u, ea_linear_plus(c, u, n, 2, false));
    far_transfer(c, u, selector, offset, call);
}

void op_jmpf(struct cpu *c, const struct uop *u) { far_immediate(c, u, false); }
void op_callf(struct cpu *c, const struct uop *u) { far_immediate(c, u, true); }
void op_jmpf_m(struct cpu *c, const struct uop *u) { far_memory(c, u, false); }
void op_callf_m(struct cpu *c, const struct uop *u) { far_memory(c, u, true); }

/* ---- RET far ---- */

static void ret_real(struct cpu *c, const struct uop *u, struct stack *s, uint64_t rip, uint16_t selector)
{
    struct seg_reg cs = ARCH(c)->seg[CS];
    code_check_rip(c, u, &cs, rip, 0);
    cs.selector = selector;
    cs.base = (uint32_t)selector << 4;
    s->sp += (uint16_t)u->imm;
    stack_commit(c, s);
    code_commit(c, &cs, rip, ARCH(c)->cpl);
}

struct seg_reg far_return_code(struct cpu *c, const struct uop *u, uint16_t selector)
{
    struct desc d;
    if (SEL_NULL(selector)) {
        raise_fault_code(c, u, VEC_GP, 0);
    }
    uint32_t error = SEL_ERROR(selector);
    unsigned rpl = SEL_RPL(selector);
    if (!desc_read(c, u, selector, &d) || (d.attr & (ATTR_S | ATTR_CODE)) != (ATTR_S | ATTR_CODE) || rpl < ARCH(c)->cpl ||
        (d.attr & ATTR_CONFORMING ? ATTR_DPL(d.attr) > rpl : ATTR_DPL(d.attr) != rpl)) {
        raise_fault_code(c, u, VEC_GP, error);
    }
    check_code(c, u, &d, error);
    desc_accessed(c, u, &d);
    return desc_segment(&d, selector);
}

struct seg_reg far_return_stack(struct cpu *c, const struct uop *u, uint16_t selector, const struct seg_reg *cs)
{
    unsigned rpl = SEL_RPL(cs->selector);
    if (SEL_NULL(selector) && mode_long(c) && cs->attr & ATTR_L && rpl != 3 && SEL_RPL(selector) == rpl) {
        return (struct seg_reg){0, 0, selector, ATTR_OF_DPL(rpl)};
    }
    return seg_check_stack(c, u, selector, rpl, VEC_GP, 0);
}

void op_retf(struct cpu *c, const struct uop *u)
{
    struct stack s = stack_current(c, u, uop_size(u));
    uint64_t rip = stack_pop(c, &s);
    uint16_t selector = (uint16_t)stack_pop(c, &s);
    if (mode_real_or_vm86(c)) {
        ret_real(c, u, &s, rip, selector);
        return;
    }
    struct seg_reg cs = far_return_code(c, u, selector);
    unsigned rpl = SEL_RPL(selector), cpl = ARCH(c)->cpl;
    s.sp += (uint16_t)u->imm;
    if (rpl == cpl) {
        code_check_rip(c, u, &cs, rip, 0);
        stack_commit(c, &s);
        code_commit(c, &cs, rip, cpl);
        return;
    }
    uint64_t sp = stack_pop(c, &s);
    s.ss = far_return_stack(c, u, (uint16_t)stack_pop(c, &s), &cs);
    code_check_rip(c, u, &cs, rip, 0);
    s.sp = sp + (uint16_t)u->imm;
    s.flat64 = mode_long(c) && cs.attr & ATTR_L;
    ARCH(c)->seg[SS] = s.ss;
    stack_commit(c, &s);
    code_commit(c, &cs, rip, rpl);
    seg_drop_privileged(c, rpl);
}
