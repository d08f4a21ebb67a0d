/* Descriptors, their checks, and stacks: see desc.h. */
#include "desc.h"

bool desc_read(struct cpu *c, const struct uop *u, uint16_t selector, struct desc *d)
{
    const struct cpu_arch *a = ARCH(c);
    const struct seg_reg *table = selector & 4 ? &a->ldtr : &a->gdtr;
    uint32_t offset = selector & 0xfff8u;
    if ((selector & 4 && !(table->attr & ATTR_P)) || offset + 7 > table->limit) {
        return false;
    }
    d->linear = table->base + offset;
    if (!mode_long(c)) {
        d->linear = (uint32_t)d->linear;
    }
    uint64_t raw = mem_read_super(c, u, d->linear, 8);
    d->lo = (uint32_t)raw;
    d->hi = (uint32_t)(raw >> 32);
    d->selector = selector;
    d->attr = (d->hi >> 8) & 0xf0ff;
    d->base = (d->lo >> 16) | (d->hi & 0xff) << 16 | (d->hi & 0xff000000);
    d->limit = (d->lo & 0xffff) | (d->hi & 0xf0000);
    if (d->attr & ATTR_G) {
        d->limit = d->limit << 12 | 0xfff;
    }
    return true;
}

bool desc_read_upper(struct cpu *c, const struct uop *u, struct desc *d, uint64_t *upper)
{
    const struct seg_reg *table = d->selector & 4 ? &ARCH(c)->ldtr : &ARCH(c)->gdtr;
    if ((d->selector & 0xfff8u) + 15 > table->limit) {
        return false;
    }
    uint64_t raw = mem_read_super(c, u, d->linear + 8, 8);
    *upper = (raw & 0xffffffff) << 32;
    return !(raw >> 32 & 0x1f00);
}

void desc_accessed(struct cpu *c, const struct uop *u, struct desc *d)
{
    if (!(d->attr & ATTR_ACCESSED)) {
        mmu_or_super(c, u, d->linear + 5, ATTR_ACCESSED);
        d->attr |= ATTR_ACCESSED;
        d->hi |= ATTR_ACCESSED << 8;
    }
}

struct seg_reg desc_segment(const struct desc *d, uint16_t selector)
{
    return (struct seg_reg){d->base, d->limit, selector, d->attr};
}

void seg_load_real(struct cpu *c, unsigned seg, uint16_t selector)
{
    struct seg_reg *s = &ARCH(c)->seg[seg];
    s->selector = selector;
    s->base = (uint32_t)selector << 4;
    /* Limit and attributes stay, "unreal mode" relies on it (SDM vol. 3 section 20.1.1); but an unusable segment is usable again. */
    s->attr |= ATTR_P | ATTR_S | ATTR_WRITABLE | ATTR_ACCESSED;
}

void seg_load_vm86(struct cpu *c, unsigned seg, uint16_t selector)
{
    ARCH(c)->seg[seg] = (struct seg_reg){(uint32_t)selector << 4, 0xffff, selector,
                                         ATTR_P | ATTR_OF_DPL(3) | ATTR_S | ATTR_WRITABLE | ATTR_ACCESSED};
}

void seg_load_null(struct cpu *c, unsigned seg, uint16_t selector)
{
    ARCH(c)->seg[seg] = (struct seg_reg){0, 0, selector, 0}; /* base cleared: CPUID 8000_0021h EAX bit 6 */
}

void seg_load_data(struct cpu *c, const struct uop *u, unsigned seg, uint16_t selector, unsigned cpl, enum vector v,
                   uint32_t ext)
{
    if (SEL_NULL(selector)) {
        seg_load_null(c, seg, selector);
        return;
    }
    struct desc d;
    uint32_t error = SEL_ERROR(selector) | ext;
    if (!desc_read(c, u, selector, &d) || !(d.attr & ATTR_S)) {
        raise_fault_code(c, u, v, error);
    }
    bool code = d.attr & ATTR_CODE;
    if (code && !(d.attr & ATTR_READABLE)) {
        raise_fault_code(c, u, v, error);
    }
    unsigned dpl = ATTR_DPL(d.attr);
    if (!(code && d.attr & ATTR_CONFORMING) && (SEL_RPL(selector) > dpl || cpl > dpl)) {
        raise_fault_code(c, u, v, error);
    }
    if (!(d.attr & ATTR_P)) {
        raise_fault_code(c, u, VEC_NP, error);
    }
    desc_accessed(c, u, &d);
    ARCH(c)->seg[seg] = desc_segment(&d, selector);
}

struct seg_reg seg_check_stack(struct cpu *c, const struct uop *u, uint16_t selector, unsigned cpl, enum vector v, uint32_t ext)
{
    struct desc d;
    uint32_t error = SEL_ERROR(selector) | ext;
    if (SEL_NULL(selector)) {
        raise_fault_code(c, u, v, v == VEC_TS ? error : ext);
    }
    if (!desc_read(c, u, selector, &d) || SEL_RPL(selector) != cpl || !(d.attr & ATTR_S) || d.attr & ATTR_CODE ||
        !(d.attr & ATTR_WRITABLE) || ATTR_DPL(d.attr) != cpl) {
        raise_fault_code(c, u, v, error);
    }
    if (!(d.attr & ATTR_P)) {
        raise_fault_code(c, u, VEC_SS, error);
    }
    desc_accessed(c, u, &d);
    return desc_segment(&d, selector);
}

void seg_drop_privileged(struct cpu *c, unsigned cpl)
{
    static const uint8_t data[] = {ES, DS, FS, GS};
    for (unsigned i = 0; i < sizeof data; i++) {
        const struct seg_reg *s = &ARCH(c)->seg[data[i]];
        bool conforming = (s->attr & (ATTR_CODE | ATTR_CONFORMING)) == (ATTR_CODE | ATTR_CONFORMING);
        if (SEL_NULL(s->selector)) {
            continue; /* FS and GS keep a base that an MSR gave them */
        }
        if (s->attr & ATTR_P && !conforming && ATTR_DPL(s->attr) < cpl) {
            seg_load_null(c, data[i], 0);
        }
    }
}

void ldtr_load(struct cpu *c, const struct uop *u, uint16_t selector, enum vector v, uint32_t ext)
{
    if (SEL_NULL(selector)) {
        ARCH(c)->ldtr = (struct seg_reg){0, 0, selector, 0};
        return;
    }
    struct desc d;
    uint32_t error = SEL_ERROR(selector) | ext;
    if (selector & 4 || !desc_read(c, u, selector, &d) || (d.attr & (ATTR_S | ATTR_TYPE)) != DESC_LDT) {
        raise_fault_code(c, u, v, error);
    }
    if (!(d.attr & ATTR_P)) {
        raise_fault_code(c, u, v == VEC_TS ? v : VEC_NP, error);
    }
    if (mode_long(c)) {
        uint64_t upper;
        if (!desc_read_upper(c, u, &d, &upper) || !is_canonical(d.base | upper)) {
            raise_fault_code(c, u, v, error);
        }
        d.base |= upper;
    }
    ARCH(c)->ldtr = desc_segment(&d, selector);
}

void set_cpl(struct cpu *c, unsigned cpl)
{
    ARCH(c)->cpl = cpl;
    mmu_set_mode(c);
}

/* ---- stacks ---- */

static uint64_t stack_mask(const struct stack *s)
{
    return s->flat64 ? UINT64_MAX : s->ss.attr & ATTR_D ? 0xffffffffu : 0xffffu;
}

struct stack stack_current(struct cpu *c, const struct uop *u, unsigned width)
{
    struct stack s = {.u = u, .ss = ARCH(c)->seg[SS], .mode = mmu_mode_for_cpl(c, ARCH(c)->cpl), .width = width,
                      .flat64 = mode_64(c)};
    s.sp = GPR(c, RSP) & stack_mask(&s);
    return s;
}

static void check_alignment(struct cpu *c, const struct stack *s, uint64_t lin)
{
    if (lin & (s->width - 1) && s->mode == TLB_USER && ARCH(c)->rflags & FLAG_AC && ARCH(c)->cr0 & CR0_AM) {
        raise_fault_code(c, s->u, VEC_AC, 0);
    }
}

static uint64_t stack_linear(struct cpu *c, const struct stack *s, uint64_t sp)
{
    if (s->flat64) {
        if (!is_canonical(sp) || !is_canonical(sp + s->width - 1)) {
            raise_fault_code(c, s->u, VEC_SS, s->error);
        }
        check_alignment(c, s, sp);
        return sp;
    }
    uint64_t last = sp + s->width - 1;
    bool inside = s->ss.attr & ATTR_DOWN ? sp > s->ss.limit && last <= stack_mask(s) : last <= s->ss.limit;
    if (!inside || !(s->ss.attr & ATTR_P)) {
        raise_fault_code(c, s->u, VEC_SS, s->error);
    }
    uint32_t lin = (uint32_t)(s->ss.base + sp);
    check_alignment(c, s, lin);
    return lin;
}

void stack_push(struct cpu *c, struct stack *s, uint64_t value)
{
    uint64_t sp = (s->sp - s->width) & stack_mask(s);
    mmu_write_as(c, s->u, stack_linear(c, s, sp), value, s->width, s->mode);
    s->sp = sp;
}

uint64_t stack_peek(struct cpu *c, const struct stack *s, unsigned item)
{
    uint64_t sp = (s->sp + (uint64_t)item * s->width) & stack_mask(s);
    return mmu_read_as(c, s->u, stack_linear(c, s, sp), s->width, s->mode);
}

uint64_t stack_pop(struct cpu *c, struct stack *s)
{
    uint64_t value = stack_peek(c, s, 0);
    s->sp = (s->sp + s->width) & stack_mask(s);
    return value;
}

void stack_commit(struct cpu *c, const struct stack *s)
{
    uint64_t mask = stack_mask(s);
    uint64_t sp = s->sp & mask;
    GPR(c, RSP) = mask == 0xffff ? (GPR(c, RSP) & ~(uint64_t)0xffff) | sp : sp;
}
