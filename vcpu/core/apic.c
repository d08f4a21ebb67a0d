/*
 * Registers of the local APIC (SDM vol. 3 chapter 11), by MMIO (xAPIC) and by MSR (x2APIC).
 */
#include "apic_private.h"
#include "api.h"

#define VERSION 0x00060014u /* integrated APIC, highest LVT entry 6 (with CMCI): section 11.4.8 */
#define MSR_APIC_BASE 0x1b
#define MSR_TSC_DEADLINE 0x6e0
#define MSR_X2APIC 0x800
#define PHYSICAL_LIMIT (UINT64_C(1) << 40) /* MAXPHYADDR of the CPU model */
#define ICR_WRITABLE 0x000ccfffu
#define ICR_SELF 0x40000u

/* Writable bits of the local vector table, section 11.5.1 */
static const struct lvt {
    uint8_t reg;
    uint16_t at;       /* of the field in struct apic_state */
    uint32_t writable;
} lvts[] = {
    {REG_LVT_CMCI, offsetof(struct apic_state, lvt_cmci), 0x107ff},
    {REG_LVT_TIMER, offsetof(struct apic_state, lvt_timer), 0x700ff},
    {REG_LVT_THERMAL, offsetof(struct apic_state, lvt_thermal), 0x107ff},
    {REG_LVT_PMC, offsetof(struct apic_state, lvt_pmc), 0x107ff},
    {REG_LVT_LINT0, offsetof(struct apic_state, lvt_lint0), 0x1a7ff},
    {REG_LVT_LINT1, offsetof(struct apic_state, lvt_lint1), 0x1a7ff},
    {REG_LVT_ERROR, offsetof(struct apic_state, lvt_error), 0x100ff},
};
#define LVTS (sizeof lvts / sizeof lvts[0])

static const struct lvt *find_lvt(unsigned reg)
{
    for (unsigned i = 0; i < LVTS; i++) {
        if (lvts[i].reg == reg) {
            return &lvts[i];
        }
    }
    return NULL;
}

static uint32_t *lvt_field(struct apic_state *a, const struct lvt *l) { return (uint32_t *)((char *)a + l->at); }

static uint32_t half(const uint64_t bits[4], unsigned n) { return (uint32_t)(bits[n >> 1] >> (n & 1 ? 32 : 0)); }

/* ---- reset ---- */
static void reset_registers(struct cpu *c)
{
    struct apic_state *a = &c->s.arch.apic;
    uint64_t base = a->base_msr;
    uint32_t id = a->id;
    memset(a, 0, sizeof *a);
    a->base_msr = base;
    a->id = id;
    a->dfr = 0xffffffff;
    a->svr = 0xff;
    for (unsigned i = 0; i < LVTS; i++) {
        *lvt_field(a, &lvts[i]) = LVT_MASKED;
    }
    if (apic_mode(c) == APIC_MODE_X2) { /* section 11.12.10.2 */
        a->ldr = id >> 4 << 16 | 1u << (id & 15);
    }
}

void apic_reset(struct cpu *c, bool init)
{
    struct apic_state *a = &c->s.arch.apic;
    if (!init) {
        a->id = c->index;
        a->base_msr = APIC_BASE_DEFAULT | APIC_BASE_ENABLE | (c->index == 0 ? APIC_BASE_BSP : 0);
    }
    reset_registers(c);
    if (c->index == 0) {
        a->lvt_lint0 = DELIVER_EXTINT << 8; /* virtual wire mode, so that the PIC works before firmware sets it up */
    }
    for (unsigned word = 0; word < 4; word++) {
        seg_store_sc(&c->s.posted_irr[word], 0);
        seg_store_sc(&c->s.posted_tmr[word], 0);
    }
    seg_store_sc(&c->s.posted_nmi, 0);
    seg_store_sc(&c->s.posted_init, 0);
    if (!init) {
        seg_store_sc(&c->s.posted_sipi, 0);
        seg_and(&c->s.extint_level, ~(uint32_t)EXTINT_MESSAGE);
    }
    c->lint0_seen = false;
    apic_timer_clear(c);
    apic_publish(c);
}

/* ---- reading ---- */
/* false: there is no such register */
static bool read_register(struct cpu *c, unsigned reg, uint32_t *value)
{
    struct apic_state *a = &c->s.arch.apic;
    const struct lvt *l = find_lvt(reg);
    if (l) {
        *value = *lvt_field(a, l);
        return true;
    }
    if (reg >= REG_ISR && reg < REG_ESR) {
        const uint64_t *bits = reg < REG_TMR ? a->isr : reg < REG_IRR ? a->tmr : a->irr;
        if (bits == a->irr) {
            apic_drain(c); /* what was posted is requested */
        }
        *value = half(bits, reg & 7);
        return true;
    }
    switch (reg) {
    case REG_ID: *value = apic_mode(c) == APIC_MODE_X2 ? a->id : a->id << 24; return true;
    case REG_VERSION: *value = VERSION; return true;
    case REG_TPR: *value = a->tpr; return true;
    case REG_APR:
    case REG_PPR: *value = c->s.apic_ppr; return true;
    case REG_EOI:
    case REG_RRD: *value = 0; return true;
    case REG_LDR: *value = a->ldr; return true;
    case REG_DFR: *value = a->dfr; return true;
    case REG_SVR: *value = a->svr; return true;
    case REG_ESR: *value = a->esr; return true;
    case REG_ICR_LOW: *value = a->icr_low; return true;
    case REG_ICR_HIGH: *value = a->icr_high; return true;
    case REG_TIMER_INITIAL: *value = a->timer_initial; return true;
    case REG_TIMER_CURRENT:
        *value = apic_timer_count(c);
        apic_timer_check(c); /* who reads 0 finds the interrupt requested */
        return true;
    case REG_TIMER_DIVIDE: *value = a->timer_divide; return true;
    default: return false;
    }
}

/* ---- writing ---- */
static void write_svr(struct cpu *c, uint32_t value)
{
    struct apic_state *a = &c->s.arch.apic;
    bool was = a->svr & SVR_ENABLE;
    a->svr = value & 0x3ff;
    if (!(a->svr & SVR_ENABLE)) { /* section 11.4.7.2: all entries are masked */
        for (unsigned i = 0; i < LVTS; i++) {
            *lvt_field(a, &lvts[i]) |= LVT_MASKED;
        }
    }
    apic_publish(c);
    if (!was && a->svr & SVR_ENABLE) {
        fabric_resolve(c->seg); /* level pins that nobody would take so far */
    }
}

static void write_lvt(struct cpu *c, const struct lvt *l, uint32_t value)
{
    struct apic_state *a = &c->s.arch.apic;
    value &= l->writable;
    if (!(a->svr & SVR_ENABLE)) {
        value |= LVT_MASKED;
    }
    if (l->reg == REG_LVT_TIMER) {
        apic_timer_check(c); /* what is due fires through the entry as it was */
        apic_timer_mode(c, value);
    }
    *lvt_field(a, l) = value;
    if (l->reg == REG_LVT_LINT0) {
        c->lint0_seen = false; /* a request that waits is seen through the new entry */
        apic_drain(c);
    }
}

static void write_icr(struct cpu *c, uint32_t low, uint32_t high)
{
    struct apic_state *a = &c->s.arch.apic;
    a->icr_low = low & ICR_WRITABLE;
    a->icr_high = high;
    if ((low >> 8 & 7) <= DELIVER_LOWEST && (low & 0xff) < 16) {
        apic_error(c, ESR_SEND_ILLEGAL);
        return;
    }
    fabric_ipi(c->seg, c->index, (uint64_t)high << 32 | a->icr_low);
    if (seg_load(&c->s.posted_irr[(low & 0xff) >> 6])) { /* also to ourselves: pending at once */
        apic_drain(c);
    }
}

/* Registers that both modes have alike */
static bool write_register(struct cpu *c, unsigned reg, uint32_t value)
{
    struct apic_state *a = &c->s.arch.apic;
    const struct lvt *l = find_lvt(reg);
    if (l) {
        write_lvt(c, l, value);
        return true;
    }
    switch (reg) {
    case REG_TPR:
        a->tpr = value & 0xff;
        apic_update(c);
        return true;
    case REG_EOI: apic_eoi(c); return true;
    case REG_SVR: write_svr(c, value); return true;
    case REG_ESR: /* a write latches what was collected: section 11.5.3 */
        a->esr = a->esr_pending;
        a->esr_pending = 0;
        return true;
    case REG_TIMER_INITIAL: apic_timer_load(c, value); return true;
    case REG_TIMER_DIVIDE: apic_timer_divide(c, value); return true;
    default: return false;
    }
}

/* ---- xAPIC: 32-bit registers on 16-byte boundaries, section 11.4.1 ---- */

/* The run loop alone delivers interrupts, and a move does not lead there: what became deliverable by it (a lower TPR, an EOI, a
 * due timer) draws attention. WRMSR and MOV CR8 end their block and need not. */
static void notice(struct cpu *c)
{
    if (c->intr_ready) {
        core_attend(c, ATTN_IRQ);
    }
}

uint64_t apic_mmio_read(struct cpu *c, uint64_t gpa, unsigned width)
{
    unsigned reg = gpa >> 4 & 0xff, skip = gpa & 15;
    uint32_t value = 0;
    seg_count(&c->s.accesses[SEG_DEVICE_LAPIC][ACCESS_MEMORY]);
    if (skip >= 4) {
        return 0;
    }
    if (!read_register(c, reg, &value)) {
        apic_error(c, ESR_REGISTER_ILLEGAL);
    }
    notice(c);
    uint64_t shifted = (uint64_t)value >> 8 * skip;
    return width == 8 ? shifted : shifted & ((UINT64_C(1) << 8 * width) - 1);
}

void apic_mmio_write(struct cpu *c, uint64_t gpa, unsigned width, uint64_t wide)
{
    struct apic_state *a = &c->s.arch.apic;
    unsigned reg = gpa >> 4 & 0xff;
    uint32_t value = (uint32_t)wide;
    seg_count(&c->s.accesses[SEG_DEVICE_LAPIC][ACCESS_MEMORY]);
    if (width < 4 || gpa & 15) {
        return; /* undefined by section 11.4.1 */
    }
    switch (reg) {
    case REG_LDR:
        a->ldr = value & 0xff000000u;
        apic_publish(c);
        break;
    case REG_DFR:
        a->dfr = value | 0x0fffffffu;
        apic_publish(c);
        break;
    case REG_ICR_LOW: write_icr(c, value, a->icr_high); break;
    case REG_ICR_HIGH: a->icr_high = value & 0xff000000u; break;
    case REG_ID: /* read-only since Nehalem */
    case REG_VERSION:
    case REG_APR:
    case REG_PPR:
    case REG_RRD:
    case REG_TIMER_CURRENT: break;
    default:
        if (!(reg >= REG_ISR && reg < REG_ESR) && !write_register(c, reg, value)) {
            apic_error(c, ESR_REGISTER_ILLEGAL);
        }
    }
    notice(c);
}

/* ---- x2APIC, section 11.12 ---- */
static bool x2_read(struct cpu *c, unsigned reg, uint64_t *value)
{
    struct apic_state *a = &c->s.arch.apic;
    uint32_t low;
    if (reg == REG_ICR_LOW) {
        *value = (uint64_t)a->icr_high << 32 | a->icr_low;
        return true;
    }
    if (reg == REG_APR || reg == REG_EOI || reg == REG_RRD || reg == REG_DFR || reg == REG_ICR_HIGH || reg == REG_SELF_IPI ||
        !read_register(c, reg, &low)) {
        return false;
    }
    *value = low;
    return true;
}

/* Reserved bits of each register that x2APIC software writes: a one there faults */
static bool x2_reserved(unsigned reg, uint64_t value)
{
    const struct lvt *l = find_lvt(reg);
    switch (reg) {
    case REG_ICR_LOW: return value & 0xfff33000u;
    case REG_TPR:
    case REG_SELF_IPI: return value & ~UINT64_C(0xff);
    case REG_EOI:
    case REG_ESR: return value != 0;
    case REG_SVR: return value & ~UINT64_C(0x3ff);
    case REG_TIMER_INITIAL: return value >> 32;
    case REG_TIMER_DIVIDE: return value & ~UINT64_C(0xb);
    /* delivery status (12) and remote IRR (14) are read-only, not reserved */
    default: return !l || value & ~(uint64_t)(l->writable | 0x5000u);
    }
}

static bool x2_write(struct cpu *c, unsigned reg, uint64_t value)
{
    if (x2_reserved(reg, value)) {
        return false;
    }
    if (reg == REG_ICR_LOW) {
        write_icr(c, (uint32_t)value, (uint32_t)(value >> 32));
        return true;
    }
    if (reg == REG_SELF_IPI) {
        uint32_t kept_low = c->s.arch.apic.icr_low, kept_high = c->s.arch.apic.icr_high;
        write_icr(c, ICR_SELF | (uint32_t)value, 0);
        c->s.arch.apic.icr_low = kept_low;
        c->s.arch.apic.icr_high = kept_high;
        return true;
    }
    return write_register(c, reg, (uint32_t)value);
}

/* Transitions of figure 11-27 */
static bool write_base(struct cpu *c, uint64_t value)
{
    struct apic_state *a = &c->s.arch.apic;
    bool enable = value & APIC_BASE_ENABLE, x2 = value & APIC_BASE_X2;
    unsigned before = apic_mode(c);
    if (value & 0x2ff || value >= PHYSICAL_LIMIT || (x2 && !enable) || (before == APIC_MODE_X2 && enable && !x2) ||
        (before == APIC_MODE_OFF && x2)) {
        return false;
    }
    a->base_msr = value;
    if (apic_mode(c) == APIC_MODE_OFF && before != APIC_MODE_OFF) {
        reset_registers(c);
        apic_timer_clear(c);
    } else if (apic_mode(c) == APIC_MODE_X2 && before != APIC_MODE_X2) {
        a->ldr = a->id >> 4 << 16 | 1u << (a->id & 15);
        a->icr_high = 0;
    }
    apic_publish(c);
    return true;
}

bool apic_msr_read(struct cpu *c, uint32_t msr, uint64_t *value)
{
    if (msr == MSR_APIC_BASE) {
        *value = c->s.arch.apic.base_msr;
        return true;
    }
    if (msr == MSR_TSC_DEADLINE) {
        *value = c->s.arch.apic.tsc_deadline;
        return true;
    }
    seg_count(&c->s.accesses[SEG_DEVICE_LAPIC][ACCESS_MEMORY]);
    return apic_mode(c) == APIC_MODE_X2 && msr - MSR_X2APIC < 0x100 && x2_read(c, msr - MSR_X2APIC, value);
}

bool apic_msr_write(struct cpu *c, uint32_t msr, uint64_t value)
{
    if (msr == MSR_APIC_BASE) {
        return write_base(c, value);
    }
    if (msr == MSR_TSC_DEADLINE) {
        apic_timer_deadline(c, value);
        return true;
    }
    seg_count(&c->s.accesses[SEG_DEVICE_LAPIC][ACCESS_MEMORY]);
    return apic_mode(c) == APIC_MODE_X2 && msr - MSR_X2APIC < 0x100 && x2_write(c, msr - MSR_X2APIC, value);
}

uint64_t apic_get_cr8(const struct cpu *c) { return c->s.arch.apic.tpr >> 4; }

void apic_set_cr8(struct cpu *c, uint64_t value)
{
    c->s.arch.apic.tpr = (uint32_t)(value & 15) << 4;
    apic_update(c);
}
