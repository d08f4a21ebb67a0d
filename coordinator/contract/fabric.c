/*
 * Interrupt messages: who is addressed (SDM vol. 3 section 11.6.2), and posting into the words of
 * the vCPUs. A vector's trigger mode is written before the vector, so the vCPU that takes the vector
 * (exchange) reads the mode that came with it.
 *
 * Any process calls this; nothing here takes a lock. The IOAPIC (ioapic.c) adds one.
 */
#include "seg.h"

#define BROADCAST8 0xffu
#define BROADCAST32 0xffffffffu
#define APIC_MODE_X2 2

/* ICR, SDM vol. 3 section 11.6.1 */
#define ICR_VECTOR(icr) ((uint32_t)(icr) & 0xff)
#define ICR_MODE(icr) ((uint32_t)(icr) >> 8 & 7)
#define ICR_LOGICAL(icr) ((uint32_t)(icr) >> 11 & 1)
#define ICR_LEVEL(icr) ((uint32_t)(icr) >> 14 & 1)
#define ICR_TRIGGER(icr) ((uint32_t)(icr) >> 15 & 1)
#define ICR_SHORTHAND(icr) ((uint32_t)(icr) >> 18 & 3)
enum { SHORTHAND_NONE, SHORTHAND_SELF, SHORTHAND_ALL, SHORTHAND_OTHERS };

static bool physical_match(const struct vcpu_block *v, uint32_t dest, bool wide)
{
    /* An 8-bit FFh from the IOAPIC or an MSI reaches everybody, also in x2APIC mode. */
    return dest == (wide ? BROADCAST32 : BROADCAST8) || dest == seg_load(&v->apic_id);
}

static bool logical_match(const struct vcpu_block *v, uint32_t dest, bool wide)
{
    uint32_t ldr = seg_load(&v->apic_ldr);
    if (dest == (wide ? BROADCAST32 : BROADCAST8)) {
        return true;
    }
    if (seg_load(&v->apic_mode) == APIC_MODE_X2) { /* cluster ID in bits 31-16 */
        return dest >> 16 == ldr >> 16 && (dest & ldr & 0xffff);
    }
    if (wide) { /* an xAPIC compares the low byte of what an x2APIC sends */
        dest &= 0xff;
    }
    ldr >>= 24;
    if (seg_load(&v->apic_dfr) >> 28 == 0xf) {
        return dest & ldr; /* flat model */
    }
    return dest >> 4 == ldr >> 4 && (dest & ldr & 0xf); /* cluster model */
}

/* What the local APIC of v would accept of a message. */
static bool accepts(const struct vcpu_block *v, uint32_t mode)
{
    if (seg_load(&v->apic_mode) == 0) {
        return false;
    }
    return mode > DELIVER_LOWEST || seg_load(&v->apic_sw_enabled);
}

void fabric_post(struct seg_header *seg, uint32_t vcpu, uint32_t mode, uint32_t vector, int level)
{
    struct vcpu_block *v = seg_vcpu(seg, vcpu);
    uint64_t bit = UINT64_C(1) << (vector & 63);
    uint32_t word = vector >> 6 & 3;
    switch (mode) {
    case DELIVER_FIXED:
    case DELIVER_LOWEST:
        if (level) {
            seg_or(&v->posted_tmr[word], bit);
        } else if (seg_load(&v->posted_tmr[word]) & bit) {
            seg_and(&v->posted_tmr[word], ~bit);
        }
        seg_or(&v->posted_irr[word], bit);
        break;
    case DELIVER_NMI:
        seg_store_sc(&v->posted_nmi, 1);
        break;
    case DELIVER_INIT:
        seg_store_sc(&v->posted_sipi, 0); /* a SIPI of before the INIT is void */
        seg_store_sc(&v->posted_init, 1);
        break;
    case DELIVER_SIPI:
        seg_store_sc(&v->posted_sipi, 0x100 | vector);
        break;
    case DELIVER_EXTINT:
        seg_or(&v->extint_level, EXTINT_MESSAGE);
        break;
    default: /* SMI: there is no system management mode */
        return;
    }
    vcpu_attend(seg, vcpu, ATTN_IRQ);
}

int fabric_deliver(struct seg_header *seg, uint32_t mode, uint32_t vector, int logical, uint32_t dest, int wide, int level)
{
    uint32_t best = SEG_MAX_VCPUS, best_priority = 0x100, begin = 0, taken = 0;
    if (mode <= DELIVER_LOWEST && vector < 16) {
        return 0; /* illegal vector: no APIC accepts it */
    }
    if (mode == DELIVER_LOWEST) {
        begin = __atomic_fetch_add(&seg_fabric(seg)->turn, 1, __ATOMIC_RELAXED) % seg->vcpus;
    }
    for (uint32_t k = 0; k < seg->vcpus; k++) {
        uint32_t i = (begin + k) % seg->vcpus;
        const struct vcpu_block *v = seg_vcpu(seg, i);
        if (!accepts(v, mode) || !(logical ? logical_match(v, dest, wide) : physical_match(v, dest, wide))) {
            continue;
        }
        if (mode != DELIVER_LOWEST) {
            fabric_post(seg, i, mode, vector, level);
            taken++;
        } else if (seg_load(&v->apic_ppr) >> 4 < best_priority) {
            best = i;
            best_priority = v->apic_ppr >> 4;
        }
    }
    if (best < SEG_MAX_VCPUS) {
        fabric_post(seg, best, DELIVER_FIXED, vector, level);
        taken = 1;
    }
    return (int)taken;
}

int fabric_msi(struct seg_header *seg, uint64_t addr, uint32_t data)
{
    /* SDM vol. 3 section 11.11: FEEh in bits 31-20, destination 19-12, redirection hint 3, destination mode 2 */
    if (addr >> 20 != 0xfee) {
        return 0;
    }
    uint32_t mode = data >> 8 & 7;
    bool hint = addr & 8;
    bool level = data & 0x8000 && mode <= DELIVER_LOWEST;
    if (data & 0x8000 && !(data & 0x4000)) {
        return 0; /* de-assertion */
    }
    if (hint && mode == DELIVER_FIXED) {
        mode = DELIVER_LOWEST;
    }
    return fabric_deliver(seg, mode, data & 0xff, (addr & 4) != 0, addr >> 12 & 0xff, 0, level);
}

int fabric_ipi(struct seg_header *seg, uint32_t from, uint64_t icr)
{
    uint32_t mode = ICR_MODE(icr), vector = ICR_VECTOR(icr), taken = 0;
    bool wide = seg_load(&seg_vcpu(seg, from)->apic_mode) == APIC_MODE_X2;
    if (mode == DELIVER_INIT && ICR_TRIGGER(icr) && !ICR_LEVEL(icr)) {
        return 0; /* INIT level de-assert: no effect since the Pentium 4 */
    }
    if (ICR_SHORTHAND(icr) == SHORTHAND_NONE) {
        uint32_t dest = wide ? (uint32_t)(icr >> 32) : (uint32_t)(icr >> 56);
        return fabric_deliver(seg, mode, vector, ICR_LOGICAL(icr), dest, wide, 0);
    }
    if (mode <= DELIVER_LOWEST && vector < 16) {
        return 0;
    }
    for (uint32_t i = 0; i < seg->vcpus; i++) {
        bool self = i == from;
        if ((self && ICR_SHORTHAND(icr) == SHORTHAND_OTHERS) || (!self && ICR_SHORTHAND(icr) == SHORTHAND_SELF)) {
            continue;
        }
        if (accepts(seg_vcpu(seg, i), mode)) {
            fabric_post(seg, i, mode, vector, 0);
            taken++;
        }
    }
    return (int)taken;
}

void pic_intr_set(struct seg_header *seg, int level)
{
    for (uint32_t i = 0; i < seg->vcpus; i++) {
        struct vcpu_block *v = seg_vcpu(seg, i);
        uint32_t before = level ? seg_or(&v->extint_level, EXTINT_WIRE) : seg_and(&v->extint_level, ~EXTINT_WIRE);
        if (!(before & EXTINT_WIRE) == !!level) {
            vcpu_attend(seg, i, ATTN_IRQ);
        }
    }
}
