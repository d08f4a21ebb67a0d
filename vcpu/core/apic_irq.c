/*
 * Interrupt acceptance and priorities (SDM vol. 3 section 11.8): posted words -> IRR -> ISR -> EOI,
 * and the PIC's INTR at LINT0.
 */
#include "apic_private.h"
#include "io.h"
#include "system.h"

static int highest(const uint64_t bits[4])
{
    for (int word = 3; word >= 0; word--) {
        if (bits[word]) {
            return word * 64 + 63 - __builtin_clzll(bits[word]);
        }
    }
    return -1;
}

static uint64_t bit_of(unsigned vector) { return UINT64_C(1) << (vector & 63); }

/* section 11.8.3.1: the higher class of TPR and of the vector in service */
static uint32_t processor_priority(const struct apic_state *a)
{
    int isr = highest(a->isr);
    uint32_t serving = isr < 0 ? 0 : (uint32_t)isr & 0xf0;
    return a->tpr >> 4 >= serving >> 4 ? a->tpr : serving;
}

/* Does the PIC's request reach the processor? */
static bool extint_accepted(const struct cpu *c)
{
    uint32_t level = seg_load(&c->s.extint_level);
    if (level == 0) {
        return false;
    }
    if (apic_mode(c) == APIC_MODE_OFF) {
        return level & EXTINT_WIRE; /* LINT0 is INTR then */
    }
    uint32_t lint0 = c->s.arch.apic.lvt_lint0;
    return level & EXTINT_MESSAGE || (LVT_MODE(lint0) == DELIVER_EXTINT && !(lint0 & LVT_MASKED));
}

static int deliverable(const struct cpu *c)
{
    const struct apic_state *a = &c->s.arch.apic;
    int vector = apic_mode(c) == APIC_MODE_OFF ? -1 : highest(a->irr);
    return vector >= 0 && (uint32_t)vector >> 4 > processor_priority(a) >> 4 ? vector : -1;
}

void apic_update(struct cpu *c)
{
    if (c->sys.eoi_offered) {
        kvm_eoi_settle(c);
    }
    __atomic_store_n(&c->s.apic_ppr, processor_priority(&c->s.arch.apic), __ATOMIC_RELAXED);
    c->intr_ready = extint_accepted(c) || deliverable(c) >= 0;
}

void apic_publish(struct cpu *c)
{
    const struct apic_state *a = &c->s.arch.apic;
    seg_store(&c->s.apic_id, a->id);
    seg_store(&c->s.apic_ldr, a->ldr);
    seg_store(&c->s.apic_dfr, a->dfr);
    seg_store(&c->s.apic_sw_enabled, (a->svr & SVR_ENABLE) != 0);
    seg_store(&c->s.apic_mode, apic_mode(c));
    apic_update(c);
}

void apic_local(struct cpu *c, uint32_t lvt)
{
    struct apic_state *a = &c->s.arch.apic;
    uint32_t vector = LVT_VECTOR(lvt);
    if (lvt & LVT_MASKED || apic_mode(c) == APIC_MODE_OFF) {
        return;
    }
    switch (LVT_MODE(lvt)) {
    case DELIVER_FIXED:
        if (vector < 16) {
            apic_error(c, ESR_RECEIVE_ILLEGAL);
            return;
        }
        a->irr[vector >> 6] |= bit_of(vector);
        a->tmr[vector >> 6] &= ~bit_of(vector);
        apic_update(c);
        break;
    case DELIVER_NMI: seg_store_sc(&c->s.posted_nmi, 1); break;
    default: break; /* SMI: none here; ExtINT: extint_accepted(); INIT is not valid for a local source */
    }
}

void apic_error(struct cpu *c, uint32_t bits)
{
    struct apic_state *a = &c->s.arch.apic;
    bool fresh = bits & ~a->esr_pending;
    a->esr_pending |= bits;
    /* An illegal vector in the error entry itself must not call for another error interrupt. */
    if (fresh && LVT_VECTOR(a->lvt_error) >= 16) {
        apic_local(c, a->lvt_error & ~0x700u);
    }
}

void apic_drain(struct cpu *c)
{
    struct apic_state *a = &c->s.arch.apic;
    for (unsigned word = 0; word < 4; word++) {
        if (!seg_load(&c->s.posted_irr[word])) {
            continue;
        }
        uint64_t irr = seg_swap(&c->s.posted_irr[word], 0);
        uint64_t tmr = seg_load_sc(&c->s.posted_tmr[word]); /* was written before the vector */
        a->irr[word] |= irr;
        a->tmr[word] = (a->tmr[word] & ~irr) | (tmr & irr);
    }
    /* LINT0 programmed as anything but ExtINT takes the PIC's INTR as an edge. */
    bool wire = seg_load(&c->s.extint_level) & EXTINT_WIRE;
    if (wire && !c->lint0_seen && LVT_MODE(a->lvt_lint0) != DELIVER_EXTINT) {
        apic_local(c, a->lvt_lint0);
    }
    c->lint0_seen = wire;
    apic_update(c);
}

int apic_ack(struct cpu *c)
{
    struct apic_state *a = &c->s.arch.apic;
    if (extint_accepted(c)) { /* not subject to priorities: section 11.8.1 */
        int vector = io_inta(c);
        seg_and(&c->s.extint_level, ~(uint32_t)EXTINT_MESSAGE);
        apic_update(c);
        return vector;
    }
    int vector = deliverable(c);
    if (vector >= 0) {
        a->irr[vector >> 6] &= ~bit_of((unsigned)vector);
        a->isr[vector >> 6] |= bit_of((unsigned)vector);
    }
    apic_update(c);
    return vector;
}

void apic_eoi(struct cpu *c)
{
    struct apic_state *a = &c->s.arch.apic;
    int vector = highest(a->isr);
    if (vector < 0) {
        return;
    }
    a->isr[vector >> 6] &= ~bit_of((unsigned)vector);
    if (a->tmr[vector >> 6] & bit_of((unsigned)vector)) {
        fabric_eoi(c->seg, (uint32_t)vector);
    }
    apic_update(c);
}

bool apic_take_init(struct cpu *c) { return seg_load(&c->s.posted_init) && seg_swap(&c->s.posted_init, 0); }

bool apic_take_sipi(struct cpu *c, uint32_t *vector)
{
    uint32_t word = seg_load(&c->s.posted_sipi) ? seg_swap(&c->s.posted_sipi, 0) : 0;
    *vector = word & 0xff;
    return word & 0x100;
}

bool apic_take_nmi(struct cpu *c)
{
    return seg_load(&c->s.posted_nmi) && !c->s.arch.nmi_blocked && seg_swap(&c->s.posted_nmi, 0);
}

bool apic_wakes(const struct cpu *c)
{
    const struct cpu_arch *a = &c->s.arch;
    return (c->intr_ready && a->rflags & FLAG_IF) || (seg_load(&c->s.posted_nmi) && !a->nmi_blocked) || seg_load(&c->s.posted_init);
}

bool apic_pv_eoi_fits(const struct cpu *c)
{
    const struct apic_state *a = &c->s.arch.apic;
    int vector = highest(a->isr);
    return vector >= 0 && highest(a->irr) < 0 && !(a->tmr[vector >> 6] & bit_of((unsigned)vector));
}
