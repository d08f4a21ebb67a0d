/* Task state segments and the hardware task switch: SDM vol. 3 chapter 7. */
#include "desc.h"

/* Offsets, figures 7-2 (32-bit) and 7-10 (16-bit) */
struct tss_layout {
    unsigned limit;                 /* smallest */
    unsigned width;                 /* of a register */
    unsigned ip, flags, gpr, seg, segs, ldt;
};
static const struct tss_layout tss32 = {0x67, 4, 0x20, 0x24, 0x28, 0x48, 6, 0x60};
static const struct tss_layout tss16 = {0x2b, 2, 0x0e, 0x10, 0x12, 0x22, 4, 0x2a};
#define TSS32_CR3 0x1c
#define TSS32_TRAP 0x64
#define TSS32_IO_MAP 0x66

static const struct tss_layout *layout_of(unsigned attr) { return attr & 8 ? &tss32 : &tss16; }

/* ---- inner stacks ---- */

static _Noreturn void tss_fault(struct cpu *c, const struct uop *u, uint32_t ext)
{
    raise_fault_code(c, u, VEC_TS, SEL_ERROR(ARCH(c)->tr.selector) | ext);
}

void task_inner_stack(struct cpu *c, const struct uop *u, unsigned dpl, uint16_t *ss, uint32_t *esp, uint32_t ext)
{
    const struct seg_reg *tr = &ARCH(c)->tr;
    unsigned width = layout_of(tr->attr)->width, at = width + dpl * 2 * width;
    if (at + width + 1 > tr->limit) {
        tss_fault(c, u, ext);
    }
    *esp = (uint32_t)mem_read_super(c, u, (uint32_t)tr->base + at, width);
    *ss = (uint16_t)mem_read_super(c, u, (uint32_t)tr->base + at + width, 2);
}

uint64_t task_inner_stack64(struct cpu *c, const struct uop *u, unsigned item, uint32_t ext)
{
    const struct seg_reg *tr = &ARCH(c)->tr;
    unsigned at = 4 + item * 8; /* figure 7-11: RSP0 at 4, IST1 at 24h */
    if (at + 7 > tr->limit) {
        tss_fault(c, u, ext);
    }
    uint64_t rsp = mem_read_super(c, u, tr->base + at, 8);
    if (!is_canonical(rsp)) {
        raise_fault_code(c, u, VEC_SS, ext);
    }
    return rsp;
}

/* ---- switch ---- */

struct tss_image {
    uint32_t ip, flags, cr3, gpr[8];
    uint16_t seg[6], ldt;
    bool trap;
};

static void image_read(struct cpu *c, const struct uop *u, const struct tss_layout *l, uint32_t base, struct tss_image *t)
{
    *t = (struct tss_image){0};
    t->ip = (uint32_t)mem_read_super(c, u, base + l->ip, l->width);
    t->flags = (uint32_t)mem_read_super(c, u, base + l->flags, l->width);
    for (unsigned i = 0; i < 8; i++) {
        t->gpr[i] = (uint32_t)mem_read_super(c, u, base + l->gpr + i * l->width, l->width);
    }
    for (unsigned i = 0; i < l->segs; i++) {
        t->seg[i] = (uint16_t)mem_read_super(c, u, base + l->seg + i * l->width, 2);
    }
    t->ldt = (uint16_t)mem_read_super(c, u, base + l->ldt, 2);
    if (l == &tss32) {
        t->cr3 = (uint32_t)mem_read_super(c, u, base + TSS32_CR3, 4);
        t->trap = mem_read_super(c, u, base + TSS32_TRAP, 2) & 1;
    }
}

static void image_save(struct cpu *c, const struct uop *u, uint64_t next_rip, bool nested)
{
    const struct cpu_arch *a = ARCH(c);
    const struct tss_layout *l = layout_of(a->tr.attr);
    uint32_t base = (uint32_t)a->tr.base;
    uint64_t flags = nested ? a->rflags : a->rflags & ~(uint64_t)FLAG_NT; /* IRET clears NT in the old task */
    mem_write_super(c, u, base + l->ip, next_rip, l->width);
    mem_write_super(c, u, base + l->flags, flags, l->width);
    for (unsigned i = 0; i < 8; i++) {
        mem_write_super(c, u, base + l->gpr + i * l->width, a->gpr[i], l->width);
    }
    for (unsigned i = 0; i < l->segs; i++) {
        mem_write_super(c, u, base + l->seg + i * l->width, a->seg[i].selector, 2);
    }
}

static void set_busy(struct cpu *c, const struct uop *u, uint16_t selector, bool busy)
{
    uint32_t at = (uint32_t)ARCH(c)->gdtr.base + (selector & 0xfff8u) + 5;
    uint8_t old = (uint8_t)mem_read_super(c, u, at, 1);
    mem_write_super(c, u, at, busy ? old | DESC_BUSY : old & ~DESC_BUSY, 1);
}

/* The code segment of the incoming task, #TS where it is none */
static void load_code(struct cpu *c, uint16_t selector, uint32_t ext)
{
    struct desc d;
    uint32_t error = SEL_ERROR(selector) | ext;
    unsigned rpl = SEL_RPL(selector);
    if (SEL_NULL(selector) || !desc_read(c, NULL, selector, &d) ||
        (d.attr & (ATTR_S | ATTR_CODE)) != (ATTR_S | ATTR_CODE) ||
        (d.attr & ATTR_CONFORMING ? ATTR_DPL(d.attr) > rpl : ATTR_DPL(d.attr) != rpl)) {
        raise_fault_code(c, NULL, VEC_TS, error);
    }
    if (!(d.attr & ATTR_P)) {
        raise_fault_code(c, NULL, VEC_NP, error);
    }
    desc_accessed(c, NULL, &d);
    ARCH(c)->seg[CS] = desc_segment(&d, selector);
    set_cpl(c, rpl);
}

/* Descriptors of the incoming task: its selectors are in place, a fault from here on is the new task's. */
static void load_segments(struct cpu *c, const struct tss_image *t, uint32_t ext)
{
    static const uint8_t data[] = {ES, DS, FS, GS};
    struct cpu_arch *a = ARCH(c);
    ldtr_load(c, NULL, t->ldt, VEC_TS, ext);
    if (t->flags & FLAG_VM) {
        for (unsigned i = 0; i < 6; i++) {
            seg_load_vm86(c, i, t->seg[i]);
        }
        set_cpl(c, 3);
        return;
    }
    load_code(c, t->seg[CS], ext);
    a->seg[SS] = seg_check_stack(c, NULL, t->seg[SS], a->cpl, VEC_TS, ext);
    for (unsigned i = 0; i < sizeof data; i++) {
        seg_load_data(c, NULL, data[i], t->seg[data[i]], a->cpl, VEC_TS, ext);
    }
    code_check_rip(c, NULL, &a->seg[CS], a->rip, ext);
}

void task_switch(struct cpu *c, const struct uop *u, struct desc *d, enum task_reason reason, uint64_t next_rip,
                 bool has_error, uint32_t error, uint32_t ext)
{
    struct cpu_arch *a = ARCH(c);
    const struct tss_layout *l = layout_of(d->attr);
    uint32_t base = (uint32_t)d->base;
    if (d->limit < l->limit) {
        raise_fault_code(c, u, VEC_TS, SEL_ERROR(d->selector) | ext);
    }
    struct tss_image t;
    flags_get(c);
    image_read(c, u, l, base, &t);
    bool nested = reason == TASK_CALL || reason == TASK_EVENT;
    image_save(c, u, next_rip, reason != TASK_IRET);
    if (nested) {
        mem_write_super(c, u, base, a->tr.selector, 2);
    } else {
        set_busy(c, u, a->tr.selector, false);
    }
    if (reason != TASK_IRET) {
        set_busy(c, u, d->selector, true);
    }

    /* From here the new task runs: it takes the faults. */
    d->attr |= DESC_BUSY;
    a->tr = desc_segment(d, d->selector);
    a->cr0 |= CR0_TS;
    a->dr[7] &= ~(uint64_t)DR7_LOCAL;
    if (l == &tss32 && a->cr0 & CR0_PG) {
        if (a->cr4 & CR4_PAE && !mmu_load_pdptes(c, t.cr3)) {
            raise_fault_code(c, u, VEC_TS, SEL_ERROR(d->selector) | ext);
        }
        a->cr3 = t.cr3;
        mmu_flush(c, false);
    }
    for (unsigned i = 0; i < 8; i++) {
        a->gpr[i] = l->width == 4 ? t.gpr[i] : (a->gpr[i] & 0xffff0000u) | t.gpr[i];
    }
    a->rip = t.ip;
    uint64_t flags = t.flags & (l->width == 4 ? 0x3f7fd5u : 0x7fd5u);
    flags_set(c, nested ? flags | FLAG_NT : flags);
    for (unsigned i = 0; i < 6; i++) {
        a->seg[i].selector = t.seg[i];
        a->seg[i].attr &= i == CS || i == SS ? 0xffff : 0; /* what is not loaded yet is unusable */
    }
    debug_update(c);
    load_segments(c, &t, ext);
    if (has_error) {
        struct stack s = stack_current(c, NULL, l->width);
        s.error = ext;
        stack_push(c, &s, error);
        stack_commit(c, &s);
    }
    if (t.trap) {
        c->sys.delivering = false;
        debug_trap(c, DR6_BT);
    }
}

/* ---- I/O permission: SDM vol. 1 section 18.5 ---- */

void io_check(struct cpu *c, const struct uop *u, unsigned port, unsigned width)
{
    const struct cpu_arch *a = ARCH(c);
    if (mode_protected(c) && (mode_vm86(c) || a->cpl > (a->rflags & FLAG_IOPL) >> 12)) {
        bool is32 = (a->tr.attr & (ATTR_P | 8)) == (ATTR_P | 8); /* 32- or 64-bit TSS */
        if (!is32 || a->tr.limit < TSS32_IO_MAP + 1) {
            raise_fault_code(c, u, VEC_GP, 0);
        }
        uint64_t map = mem_read_super(c, u, a->tr.base + TSS32_IO_MAP, 2) + port / 8;
        if (map + 1 > a->tr.limit) {
            raise_fault_code(c, u, VEC_GP, 0);
        }
        uint64_t bits = mem_read_super(c, u, a->tr.base + map, 2);
        if (bits >> port % 8 & ((1u << width) - 1)) {
            raise_fault_code(c, u, VEC_GP, 0);
        }
    }
    debug_io(c, port, width);
}
