/*
 * Exceptions, interrupts and how they reach their handlers: SDM vol. 3 chapter 6, real mode section 20.1.4, VM86
 * section 20.3; APM vol. 2 chapter 8.
 *
 * The model has no VME: CR4.VME and PVI are reserved, INT n in VM86 needs IOPL 3.
 */
#include "desc.h"

/* Classes of table 6-4; combinations of table 6-5 */
enum fault_class { CLASS_BENIGN, CLASS_CONTRIBUTORY, CLASS_PAGE_FAULT, CLASS_DOUBLE };

static enum fault_class class_of(unsigned vector, enum event_kind kind)
{
    if (kind != EVENT_FAULT) {
        return CLASS_BENIGN;
    }
    switch (vector) {
    case VEC_DE: case VEC_TS: case VEC_NP: case VEC_SS: case VEC_GP: return CLASS_CONTRIBUTORY;
    case VEC_PF: return CLASS_PAGE_FAULT;
    case VEC_DF: return CLASS_DOUBLE;
    default: return CLASS_BENIGN;
    }
}

/* ---- raising ---- */

COLD _Noreturn void raise_fault(struct cpu *c, const struct uop *u, enum vector v)
{
    c->fault_vector = v;
    c->fault_has_error = false;
    c->fault_error = 0;
    c->sys.event_kind = EVENT_FAULT;
    cpu_unwind(c, u, UNWIND_FAULT);
}

COLD _Noreturn void raise_fault_code(struct cpu *c, const struct uop *u, enum vector v, uint32_t error)
{
    c->fault_vector = v;
    c->fault_has_error = true;
    c->fault_error = error;
    c->sys.event_kind = EVENT_FAULT;
    cpu_unwind(c, u, UNWIND_FAULT);
}

COLD _Noreturn void raise_page_fault(struct cpu *c, const struct uop *u, uint64_t linear, uint32_t error)
{
    ARCH(c)->cr2 = linear;
    raise_fault_code(c, u, VEC_PF, error);
}

COLD _Noreturn void raise_trap(struct cpu *c, const struct uop *u, enum vector v)
{
    c->fault_vector = v;
    c->fault_has_error = false;
    c->fault_error = 0;
    c->sys.event_kind = EVENT_TRAP;
    cpu_unwind(c, u, UNWIND_TRAP);
}

/* ---- delivery ---- */

struct event {
    const struct uop *u; /* software interrupts: the instruction, for faults on the way */
    unsigned vector;
    enum event_kind kind;
    bool has_error;
    uint32_t error;
    uint64_t rip;        /* return address */
    uint64_t rflags;     /* image to push */
    uint32_t ext;        /* EXT bit of error codes */
};

/* Error code that names an IDT entry */
static uint32_t idt_error(const struct event *e) { return e->vector << 3 | 2 | e->ext; }

static void enter_flags(struct cpu *c, bool interrupt_gate)
{
    uint64_t clear = FLAG_TF | FLAG_NT | FLAG_RF | FLAG_VM | (interrupt_gate ? FLAG_IF : 0);
    flags_set(c, ARCH(c)->rflags & ~clear);
}

static void deliver_real(struct cpu *c, const struct event *e)
{
    const struct seg_reg *idtr = &ARCH(c)->idtr;
    if (e->vector * 4 + 3 > idtr->limit) {
        raise_fault_code(c, e->u, VEC_GP, idt_error(e));
    }
    uint32_t vector = (uint32_t)mem_read_super(c, e->u, (uint32_t)(idtr->base + e->vector * 4), 4);
    struct seg_reg cs = ARCH(c)->seg[CS];
    struct stack s = stack_current(c, e->u, 2);
    s.error = e->ext;
    stack_push(c, &s, e->rflags);
    stack_push(c, &s, cs.selector);
    stack_push(c, &s, e->rip);
    code_check_rip(c, e->u, &cs, vector & 0xffff, e->ext);
    cs.selector = (uint16_t)(vector >> 16);
    cs.base = vector >> 16 << 4;
    stack_commit(c, &s);
    flags_set(c, ARCH(c)->rflags & ~(uint64_t)(FLAG_IF | FLAG_TF | FLAG_AC | FLAG_RF));
    code_commit(c, &cs, vector & 0xffff, ARCH(c)->cpl);
}

/* The code segment that a gate names; DPL <= CPL. */
static void gate_code(struct cpu *c, const struct event *e, uint16_t selector, struct desc *d)
{
    if (SEL_NULL(selector)) {
        raise_fault_code(c, e->u, VEC_GP, e->ext);
    }
    uint32_t error = SEL_ERROR(selector) | e->ext;
    if (!desc_read(c, e->u, selector, d) || (d->attr & (ATTR_S | ATTR_CODE)) != (ATTR_S | ATTR_CODE) ||
        ATTR_DPL(d->attr) > ARCH(c)->cpl || (mode_long(c) && (d->attr & (ATTR_L | ATTR_D)) != ATTR_L)) {
        raise_fault_code(c, e->u, VEC_GP, error);
    }
    if (!(d->attr & ATTR_P)) {
        raise_fault_code(c, e->u, VEC_NP, error);
    }
}

static void check_gate(struct cpu *c, const struct event *e, unsigned attr, uint32_t types)
{
    if (attr & ATTR_S || !(types >> (attr & ATTR_TYPE) & 1)) {
        raise_fault_code(c, e->u, VEC_GP, idt_error(e));
    }
    if (e->kind == EVENT_SOFT && ATTR_DPL(attr) < ARCH(c)->cpl) {
        raise_fault_code(c, e->u, VEC_GP, idt_error(e));
    }
    if (!(attr & ATTR_P)) {
        raise_fault_code(c, e->u, VEC_NP, idt_error(e));
    }
}

static void deliver_task(struct cpu *c, const struct event *e, uint16_t selector)
{
    struct desc d;
    uint32_t error = SEL_ERROR(selector) | e->ext;
    if (selector & 4 || SEL_NULL(selector) || !desc_read(c, e->u, selector, &d) || d.attr & ATTR_S ||
        ((d.attr & ATTR_TYPE) != DESC_TSS32 && (d.attr & ATTR_TYPE) != DESC_TSS16)) {
        raise_fault_code(c, e->u, VEC_GP, error);
    }
    if (!(d.attr & ATTR_P)) {
        raise_fault_code(c, e->u, VEC_NP, error);
    }
    flags_set(c, (ARCH(c)->rflags & ~(uint64_t)FLAG_RF) | (e->rflags & FLAG_RF));
    task_switch(c, e->u, &d, TASK_EVENT, e->rip, e->has_error, e->error, e->ext);
}

static void deliver_protected(struct cpu *c, const struct event *e)
{
    struct cpu_arch *a = ARCH(c);
    if (e->vector * 8 + 7 > a->idtr.limit) {
        raise_fault_code(c, e->u, VEC_GP, idt_error(e));
    }
    uint64_t gate = mem_read_super(c, e->u, (uint32_t)(a->idtr.base + e->vector * 8), 8);
    unsigned attr = (gate >> 40) & 0xff, type = attr & ATTR_TYPE;
    check_gate(c, e, attr, 1u << DESC_TASK_GATE | 1u << DESC_INT16 | 1u << DESC_TRAP16 | 1u << DESC_INT32 | 1u << DESC_TRAP32);
    uint16_t selector = (uint16_t)(gate >> 16);
    if (type == DESC_TASK_GATE) {
        deliver_task(c, e, selector);
        return;
    }
    bool vm86 = mode_vm86(c);
    uint32_t error = SEL_ERROR(selector) | e->ext;
    struct desc d;
    gate_code(c, e, selector, &d);
    unsigned cpl = a->cpl, dpl = ATTR_DPL(d.attr);
    bool conforming = d.attr & ATTR_CONFORMING;
    bool inner = !conforming && dpl < cpl;
    if ((!inner && !conforming && dpl != cpl) || (vm86 && (conforming || dpl != 0))) {
        raise_fault_code(c, e->u, VEC_GP, error);
    }
    unsigned width = type & 8 ? 4 : 2, to = inner ? dpl : cpl;
    struct stack s = stack_current(c, e->u, width);
    s.error = e->ext;
    if (inner) {
        uint16_t ss;
        uint32_t esp;
        task_inner_stack(c, e->u, dpl, &ss, &esp, e->ext);
        s.ss = seg_check_stack(c, e->u, ss, dpl, VEC_TS, e->ext);
        s.sp = esp;
        s.mode = mmu_mode_for_cpl(c, dpl);
        s.error = SEL_ERROR(ss) | e->ext;
        if (vm86) {
            stack_push(c, &s, a->seg[GS].selector);
            stack_push(c, &s, a->seg[FS].selector);
            stack_push(c, &s, a->seg[DS].selector);
            stack_push(c, &s, a->seg[ES].selector);
        }
        stack_push(c, &s, a->seg[SS].selector);
        stack_push(c, &s, GPR(c, RSP));
    }
    stack_push(c, &s, e->rflags);
    stack_push(c, &s, a->seg[CS].selector);
    stack_push(c, &s, e->rip);
    if (e->has_error) {
        stack_push(c, &s, e->error);
    }
    struct seg_reg cs = desc_segment(&d, (uint16_t)((selector & ~3u) | to));
    uint32_t offset = (uint32_t)(gate & 0xffff) | (type & 8 ? (uint32_t)(gate >> 32) & 0xffff0000u : 0);
    code_check_rip(c, e->u, &cs, offset, e->ext);
    desc_accessed(c, e->u, &d);
    cs.attr = d.attr;
    if (vm86) {
        seg_load_null(c, GS, 0);
        seg_load_null(c, FS, 0);
        seg_load_null(c, DS, 0);
        seg_load_null(c, ES, 0);
    }
    a->seg[SS] = s.ss;
    stack_commit(c, &s);
    enter_flags(c, !(type & 1));
    code_commit(c, &cs, offset, to);
}

static void deliver_long(struct cpu *c, const struct event *e)
{
    struct cpu_arch *a = ARCH(c);
    if (e->vector * 16 + 15 > a->idtr.limit) {
        raise_fault_code(c, e->u, VEC_GP, idt_error(e));
    }
    uint64_t gate = mem_read_super(c, e->u, a->idtr.base + e->vector * 16, 8);
    uint64_t upper = mem_read_super(c, e->u, a->idtr.base + e->vector * 16 + 8, 8);
    unsigned attr = (gate >> 40) & 0xff, ist = (gate >> 32) & 7;
    check_gate(c, e, attr, 1u << DESC_INT32 | 1u << DESC_TRAP32);
    uint16_t selector = (uint16_t)(gate >> 16);
    struct desc d;
    gate_code(c, e, selector, &d);
    unsigned cpl = a->cpl, dpl = ATTR_DPL(d.attr);
    bool conforming = d.attr & ATTR_CONFORMING;
    bool inner = !conforming && dpl < cpl;
    if (!conforming && !inner && dpl != cpl) {
        raise_fault_code(c, e->u, VEC_GP, SEL_ERROR(selector) | e->ext);
    }
    unsigned to = inner ? dpl : cpl;
    struct stack s = {.u = e->u, .ss = a->seg[SS], .mode = mmu_mode_for_cpl(c, to), .width = 8, .error = e->ext, .flat64 = true};
    s.sp = ist ? task_inner_stack64(c, e->u, ist + 3, e->ext) : inner ? task_inner_stack64(c, e->u, dpl, e->ext) : GPR(c, RSP);
    s.sp &= ~(uint64_t)15;
    if (inner) {
        s.ss = (struct seg_reg){0, 0, (uint16_t)dpl, ATTR_OF_DPL(dpl)};
    }
    stack_push(c, &s, a->seg[SS].selector);
    stack_push(c, &s, GPR(c, RSP));
    stack_push(c, &s, e->rflags);
    stack_push(c, &s, a->seg[CS].selector);
    stack_push(c, &s, e->rip);
    if (e->has_error) {
        stack_push(c, &s, e->error);
    }
    struct seg_reg cs = desc_segment(&d, (uint16_t)((selector & ~3u) | to));
    uint64_t offset = (gate & 0xffff) | (gate >> 32 & 0xffff0000u) | upper << 32;
    code_check_rip(c, e->u, &cs, offset, e->ext);
    desc_accessed(c, e->u, &d);
    cs.attr = d.attr;
    a->seg[SS] = s.ss;
    stack_commit(c, &s);
    enter_flags(c, !(attr & 1));
    code_commit(c, &cs, offset, to);
}

static void deliver(struct cpu *c, struct event *e)
{
    e->rflags = flags_get(c);
    if (e->kind == EVENT_FAULT && e->vector != VEC_DB) {
        e->rflags |= FLAG_RF; /* SDM vol. 3 section 17.3.1.1 */
    } else if (e->kind != EVENT_EXTERNAL && e->kind != EVENT_NMI) {
        e->rflags &= ~(uint64_t)FLAG_RF;
    }
    e->ext = e->kind != EVENT_SOFT;
    c->sys.delivering = true;
    c->sys.delivering_vector = (uint8_t)e->vector;
    c->sys.delivering_kind = (uint8_t)e->kind;
    ARCH(c)->inhibit = 0;
    if (!mode_protected(c)) {
        deliver_real(c, e);
    } else if (mode_long(c)) {
        deliver_long(c, e);
    } else {
        deliver_protected(c, e);
    }
    c->sys.delivering = false;
    if (e->vector == VEC_DB && e->kind != EVENT_SOFT) {
        ARCH(c)->dr[7] &= ~(uint64_t)DR7_GD; /* SDM vol. 3 section 17.2.4 */
    }
}

static void shut_down(struct cpu *c)
{
    c->sys.delivering = false;
    ARCH(c)->activity = ACT_SHUTDOWN;
    c->s.exit_reason = EXIT_SHUTDOWN;
}

void fault_deliver(struct cpu *c)
{
    struct event e = {.vector = c->fault_vector, .kind = c->sys.event_kind, .has_error = c->fault_has_error,
                      .error = c->fault_error, .rip = ARCH(c)->rip};
    if (e.kind == EVENT_FAULT) {
        c->sys.debug_hit = 0; /* the instruction will touch its breakpoints again */
    }
    if (c->sys.delivering) {
        enum fault_class first = class_of(c->sys.delivering_vector, c->sys.delivering_kind);
        enum fault_class second = class_of(e.vector, e.kind);
        if (first == CLASS_DOUBLE && second != CLASS_BENIGN) {
            shut_down(c);
            return;
        }
        if ((first == CLASS_CONTRIBUTORY && second == CLASS_CONTRIBUTORY) ||
            (first == CLASS_PAGE_FAULT && second != CLASS_BENIGN)) {
            e.vector = VEC_DF;
            e.has_error = true;
            e.error = 0;
        }
    }
    deliver(c, &e);
}

void deliver_interrupt(struct cpu *c, unsigned vector, enum event_kind kind)
{
    struct event e = {.vector = vector, .kind = kind, .rip = ARCH(c)->rip};
    if (kind == EVENT_NMI) {
        ARCH(c)->nmi_blocked = 1;
    }
    deliver(c, &e);
}

/* ---- software interrupts: jump rows. Faults on the way leave rip at the instruction. ---- */

static void software(struct cpu *c, const struct uop *u, unsigned vector, enum event_kind kind)
{
    struct event e = {.u = u, .vector = vector, .kind = kind, .rip = uop_next_rip(c, u)};
    bool tf = ARCH(c)->rflags & FLAG_TF;
    deliver(c, &e);
    if (tf) { /* TF has been cleared with it, and no trap follows: SDM vol. 3 section 18.3.1.4 */
        cpu_unwind(c, NULL, UNWIND_RETRY);
    }
}

void op_int(struct cpu *c, const struct uop *u)
{
    if (mode_vm86(c) && (ARCH(c)->rflags & FLAG_IOPL) != FLAG_IOPL) {
        raise_fault_code(c, u, VEC_GP, 0);
    }
    software(c, u, (uint8_t)u->imm, EVENT_SOFT);
}

void op_int3(struct cpu *c, const struct uop *u) { software(c, u, VEC_BP, EVENT_SOFT); }

void op_int1(struct cpu *c, const struct uop *u) { software(c, u, VEC_DB, EVENT_ICEBP); }

void op_into(struct cpu *c, const struct uop *u)
{
    if (flag_of(c)) {
        software(c, u, VEC_OF, EVENT_SOFT);
    } else {
        ARCH(c)->rip = uop_next_rip(c, u);
    }
}
