/*
 * Instructions on segment registers and descriptor tables: SDM vol. 2 (MOV, PUSH, POP, LDS..., LGDT..., LAR, LSL,
 * VERR, VERW, ARPL, SWAPGS, RDFSBASE...), vol. 3 chapter 3 and section 5.10.
 */
#include "desc.h"
#include "ea.h"

/* ---- loads ---- */

static void load_segment(struct cpu *c, const struct uop *u, unsigned seg, uint16_t selector)
{
    struct cpu_arch *a = ARCH(c);
    if (!mode_protected(c)) {
        seg_load_real(c, seg, selector);
    } else if (mode_vm86(c)) {
        seg_load_vm86(c, seg, selector);
    } else if (seg != SS) {
        seg_load_data(c, u, seg, selector, a->cpl, VEC_GP, 0);
    } else if (SEL_NULL(selector) && mode_64(c) && a->cpl != 3 && SEL_RPL(selector) == a->cpl) {
        a->seg[SS] = (struct seg_reg){0, 0, selector, (uint16_t)ATTR_OF_DPL(a->cpl)};
    } else {
        a->seg[SS] = seg_check_stack(c, u, selector, a->cpl, VEC_GP, 0);
    }
}

/* ModRM.reg as a segment register that may be read, or written */
static unsigned segment_operand(struct cpu *c, const struct uop *u, bool write)
{
    unsigned seg = u->reg & 7;
    if (seg > GS || (write && seg == CS)) {
        raise_fault(c, u, VEC_UD);
    }
    return seg;
}

static uint16_t read_rm16(struct cpu *c, const struct uop *u)
{
    return uop_mem(u) ? mem_read16(c, u, ea_linear(c, u, 2, false)) : (uint16_t)GPR(c, u->rm);
}

/* A register takes the operand size, memory 16 bits. */
static void write_rm_selector(struct cpu *c, const struct uop *u, uint64_t value)
{
    if (uop_mem(u)) {
        mem_write16(c, u, ea_linear(c, u, 2, true), (uint16_t)value);
    } else if (uop_size(u) == 2) {
        GPR(c, u->rm) = (GPR(c, u->rm) & ~(uint64_t)0xffff) | (uint16_t)value;
    } else {
        GPR(c, u->rm) = uop_size(u) == 4 ? (uint32_t)value : value;
    }
}

static void write_reg(struct cpu *c, const struct uop *u, unsigned reg, uint64_t value)
{
    unsigned n = uop_size(u);
    GPR(c, reg) = n == 8 ? value : n == 4 ? (uint32_t)value : (GPR(c, reg) & ~(uint64_t)0xffff) | (uint16_t)value;
}

void op_mov_from_sreg(struct cpu *c, const struct uop *u)
{
    write_rm_selector(c, u, ARCH(c)->seg[segment_operand(c, u, false)].selector);
    NEXT(c, u);
}

void op_mov_to_sreg(struct cpu *c, const struct uop *u)
{
    unsigned seg = segment_operand(c, u, true);
    load_segment(c, u, seg, read_rm16(c, u));
    if (seg == SS) {
        ARCH(c)->inhibit |= INHIBIT_MOV_SS;
    }
    NEXT(c, u);
}

static void push_segment(struct cpu *c, const struct uop *u, unsigned seg)
{
    struct stack s = stack_current(c, u, uop_size(u));
    stack_push(c, &s, ARCH(c)->seg[seg].selector);
    stack_commit(c, &s);
}

static void pop_segment(struct cpu *c, const struct uop *u, unsigned seg)
{
    struct stack s = stack_current(c, u, uop_size(u));
    uint16_t selector = (uint16_t)stack_pop(c, &s);
    struct seg_reg old_ss = ARCH(c)->seg[SS];
    load_segment(c, u, seg, selector);
    struct seg_reg new_ss = ARCH(c)->seg[SS];
    ARCH(c)->seg[SS] = old_ss; /* the pointer has the old stack's size */
    stack_commit(c, &s);
    ARCH(c)->seg[SS] = new_ss;
    if (seg == SS) {
        ARCH(c)->inhibit |= INHIBIT_MOV_SS;
    }
}

/* u->aux: the segment register (PUSH and POP, LDS and its like) */
void op_push_sreg(struct cpu *c, const struct uop *u)
{
    push_segment(c, u, u->aux);
    NEXT(c, u);
}

void op_pop_sreg(struct cpu *c, const struct uop *u)
{
    pop_segment(c, u, u->aux);
    NEXT(c, u);
}

void op_load_far(struct cpu *c, const struct uop *u)
{
    unsigned n = uop_size(u);
    uint64_t offset = mem_read(c, u, ea_linear(c, u, n, false), n);
    uint16_t selector = mem_read16(c, u, ea_linear_plus(c, u, n, 2, false));
    load_segment(c, u, u->aux, selector);
    write_reg(c, u, u->reg, offset);
    NEXT(c, u);
}

/* ---- tables ---- */

static void require_protected(struct cpu *c, const struct uop *u)
{
    if (mode_real_or_vm86(c)) {
        raise_fault(c, u, VEC_UD);
    }
}

/* CR4.UMIP keeps SGDT, SIDT, SLDT, STR and SMSW from CPL 1-3 */
static void check_umip(struct cpu *c, const struct uop *u)
{
    if (ARCH(c)->cr4 & CR4_UMIP && ARCH(c)->cpl) {
        raise_fault_code(c, u, VEC_GP, 0);
    }
}

static void store_table(struct cpu *c, const struct uop *u, const struct seg_reg *t)
{
    check_umip(c, u);
    unsigned n = mode_64(c) ? 10 : 6;
    uint8_t image[10];
    uint16_t limit = (uint16_t)t->limit;
    memcpy(image, &limit, 2);
    memcpy(image + 2, &t->base, 8);
    mem_write_bytes(c, u, ea_linear(c, u, n, true), image, n);
}

static void load_table(struct cpu *c, const struct uop *u, struct seg_reg *t)
{
    unsigned n = mode_64(c) ? 10 : 6;
    uint8_t image[10] = {0};
    mem_read_bytes(c, u, ea_linear(c, u, n, false), image, n);
    uint16_t limit;
    uint64_t base;
    memcpy(&limit, image, 2);
    memcpy(&base, image + 2, 8);
    if (n == 6) {
        base = (uint32_t)base;
        if (u->mode & UOP_OSZ16) {
            base &= 0xffffff;
        }
    } else if (!is_canonical(base)) {
        raise_fault_code(c, u, VEC_GP, 0);
    }
    t->base = base;
    t->limit = limit;
}

void op_sgdt(struct cpu *c, const struct uop *u)
{
    store_table(c, u, &ARCH(c)->gdtr);
    NEXT(c, u);
}

void op_sidt(struct cpu *c, const struct uop *u)
{
    store_table(c, u, &ARCH(c)->idtr);
    NEXT(c, u);
}

void op_lgdt(struct cpu *c, const struct uop *u)
{
    load_table(c, u, &ARCH(c)->gdtr);
    NEXT(c, u);
}

void op_lidt(struct cpu *c, const struct uop *u)
{
    load_table(c, u, &ARCH(c)->idtr);
    NEXT(c, u);
}

void op_sldt(struct cpu *c, const struct uop *u)
{
    require_protected(c, u);
    check_umip(c, u);
    write_rm_selector(c, u, ARCH(c)->ldtr.selector);
    NEXT(c, u);
}

void op_str(struct cpu *c, const struct uop *u)
{
    require_protected(c, u);
    check_umip(c, u);
    write_rm_selector(c, u, ARCH(c)->tr.selector);
    NEXT(c, u);
}

/* LLDT and LTR are not cpl0 rows: outside protected mode they are #UD, whatever CPL is. */
static void require_cpl0(struct cpu *c, const struct uop *u)
{
    require_protected(c, u);
    if (ARCH(c)->cpl) {
        raise_fault_code(c, u, VEC_GP, 0);
    }
}

void op_lldt(struct cpu *c, const struct uop *u)
{
    require_cpl0(c, u);
    ldtr_load(c, u, read_rm16(c, u), VEC_GP, 0);
    NEXT(c, u);
}

static void load_task_register(struct cpu *c, const struct uop *u)
{
    require_cpl0(c, u);
    uint16_t selector = read_rm16(c, u);
    uint32_t error = SEL_ERROR(selector);
    struct desc d;
    if (SEL_NULL(selector)) {
        raise_fault_code(c, u, VEC_GP, 0);
    }
    unsigned type = 0;
    if (!(selector & 4) && desc_read(c, u, selector, &d) && !(d.attr & ATTR_S)) {
        type = d.attr & ATTR_TYPE;
    }
    if (type != DESC_TSS32 && (type != DESC_TSS16 || mode_long(c))) {
        raise_fault_code(c, u, VEC_GP, error);
    }
    if (!(d.attr & ATTR_P)) {
        raise_fault_code(c, u, VEC_NP, error);
    }
    if (mode_long(c)) {
        uint64_t upper;
        if (!desc_read_upper(c, u, &d, &upper) || !is_canonical(d.base | upper)) {
            raise_fault_code(c, u, VEC_GP, error);
        }
        d.base |= upper;
    }
    mmu_or_super(c, u, d.linear + 5, DESC_BUSY);
    d.attr |= DESC_BUSY;
    ARCH(c)->tr = desc_segment(&d, selector);
}

void op_ltr(struct cpu *c, const struct uop *u)
{
    load_task_register(c, u);
    NEXT(c, u);
}

/* ---- LAR LSL VERR VERW ARPL ---- */

static void set_zf(struct cpu *c, bool on) { flags_set_some(c, FLAG_ZF, on ? FLAG_ZF : 0); }

/* A descriptor visible at CPL and RPL; conforming code always is. */
static bool visible(struct cpu *c, uint16_t selector, const struct desc *d)
{
    bool conforming = (d->attr & (ATTR_S | ATTR_CODE | ATTR_CONFORMING)) == (ATTR_S | ATTR_CODE | ATTR_CONFORMING);
    unsigned dpl = ATTR_DPL(d->attr);
    return conforming || (ARCH(c)->cpl <= dpl && SEL_RPL(selector) <= dpl);
}

/* types: system descriptor types that count, as bits; long mode has fewer (SDM vol. 2, LAR table 3-53, LSL table 3-63). */
static bool inspect(struct cpu *c, const struct uop *u, uint16_t selector, uint32_t types, uint32_t types_long, struct desc *d)
{
    if (SEL_NULL(selector) || !desc_read(c, u, selector, d)) {
        return false;
    }
    uint32_t allowed = mode_long(c) ? types_long : types;
    if (!(d->attr & ATTR_S) && !(allowed >> (d->attr & ATTR_TYPE) & 1)) {
        return false;
    }
    return visible(c, selector, d);
}

#define TYPES_LSL (1u << DESC_TSS16 | 1u << DESC_LDT | 1u << DESC_TSS16_BUSY | 1u << DESC_TSS32 | 1u << DESC_TSS32_BUSY)
#define TYPES_LSL_LONG (1u << DESC_LDT | 1u << DESC_TSS32 | 1u << DESC_TSS32_BUSY)
#define TYPES_LAR (TYPES_LSL | 1u << DESC_CALL16 | 1u << DESC_TASK_GATE | 1u << DESC_CALL32)
#define TYPES_LAR_LONG (TYPES_LSL_LONG | 1u << DESC_CALL32)

static void access_rights(struct cpu *c, const struct uop *u)
{
    struct desc d;
    require_protected(c, u);
    bool ok = inspect(c, u, read_rm16(c, u), TYPES_LAR, TYPES_LAR_LONG, &d);
    if (ok) {
        write_reg(c, u, u->reg, d.hi & (uop_size(u) == 2 ? 0xff00 : 0xffff00));
    }
    set_zf(c, ok);
}

static void segment_limit(struct cpu *c, const struct uop *u)
{
    struct desc d;
    require_protected(c, u);
    bool ok = inspect(c, u, read_rm16(c, u), TYPES_LSL, TYPES_LSL_LONG, &d);
    if (ok) {
        write_reg(c, u, u->reg, d.limit);
    }
    set_zf(c, ok);
}

void op_lar(struct cpu *c, const struct uop *u)
{
    access_rights(c, u);
    NEXT(c, u);
}

void op_lsl(struct cpu *c, const struct uop *u)
{
    segment_limit(c, u);
    NEXT(c, u);
}

static bool verify(struct cpu *c, const struct uop *u, bool write)
{
    struct desc d;
    require_protected(c, u);
    uint16_t selector = read_rm16(c, u);
    if (!inspect(c, u, selector, 0, 0, &d)) {
        return false;
    }
    bool code = d.attr & ATTR_CODE, bit1 = d.attr & ATTR_WRITABLE;
    return write ? !code && bit1 : !code || bit1;
}

static void verify_and_set(struct cpu *c, const struct uop *u, bool write) { set_zf(c, verify(c, u, write)); }

void op_verr(struct cpu *c, const struct uop *u)
{
    verify_and_set(c, u, false);
    NEXT(c, u);
}

void op_verw(struct cpu *c, const struct uop *u)
{
    verify_and_set(c, u, true);
    NEXT(c, u);
}

static void arpl(struct cpu *c, const struct uop *u)
{
    require_protected(c, u);
    uint64_t lin = uop_mem(u) ? ea_linear(c, u, 2, true) : 0;
    uint16_t selector = uop_mem(u) ? mem_read16(c, u, lin) : (uint16_t)GPR(c, u->rm);
    unsigned rpl = GPR(c, u->reg) & 3;
    bool raise = SEL_RPL(selector) < rpl;
    if (raise) {
        selector = (uint16_t)((selector & ~3u) | rpl);
        if (uop_mem(u)) {
            mem_write16(c, u, lin, selector);
        } else {
            GPR(c, u->rm) = (GPR(c, u->rm) & ~(uint64_t)0xffff) | selector;
        }
    }
    set_zf(c, raise);
}

void op_arpl(struct cpu *c, const struct uop *u)
{
    arpl(c, u);
    NEXT(c, u);
}

/* ---- bases of FS and GS ---- */

void op_swapgs(struct cpu *c, const struct uop *u)
{
    struct cpu_arch *a = ARCH(c);
    uint64_t base = a->seg[GS].base;
    a->seg[GS].base = a->kernel_gs_base;
    a->kernel_gs_base = base;
    NEXT(c, u);
}

/* aux: FS or GS */
void op_rdbase(struct cpu *c, const struct uop *u)
{
    if (!(ARCH(c)->cr4 & CR4_FSGSBASE)) {
        raise_fault(c, u, VEC_UD);
    }
    write_reg(c, u, u->rm, ARCH(c)->seg[u->aux].base);
    NEXT(c, u);
}

void op_wrbase(struct cpu *c, const struct uop *u)
{
    if (!(ARCH(c)->cr4 & CR4_FSGSBASE)) {
        raise_fault(c, u, VEC_UD);
    }
    uint64_t base = uop_size(u) == 8 ? GPR(c, u->rm) : (uint32_t)GPR(c, u->rm);
    if (!is_canonical(base)) {
        raise_fault_code(c, u, VEC_GP, 0);
    }
    ARCH(c)->seg[u->aux].base = base;
    NEXT(c, u);
}
