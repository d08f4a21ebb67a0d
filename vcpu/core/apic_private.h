/* What the files of the local APIC share: apic.c (registers), apic_irq.c (priorities), apic_timer.c. */
#ifndef ATOLL_APIC_PRIVATE_H
#define ATOLL_APIC_PRIVATE_H

#include "apic.h"

/* register numbers: MMIO offset >> 4, x2APIC MSR - 800h (SDM vol. 3 tables 11-1 and 11-6) */
enum apic_register {
    REG_ID = 0x02, REG_VERSION = 0x03, REG_TPR = 0x08, REG_APR = 0x09, REG_PPR = 0x0a, REG_EOI = 0x0b, REG_RRD = 0x0c,
    REG_LDR = 0x0d, REG_DFR = 0x0e, REG_SVR = 0x0f, REG_ISR = 0x10, REG_TMR = 0x18, REG_IRR = 0x20, REG_ESR = 0x28,
    REG_LVT_CMCI = 0x2f, REG_ICR_LOW = 0x30, REG_ICR_HIGH = 0x31, REG_LVT_TIMER = 0x32, REG_LVT_THERMAL = 0x33,
    REG_LVT_PMC = 0x34, REG_LVT_LINT0 = 0x35, REG_LVT_LINT1 = 0x36, REG_LVT_ERROR = 0x37, REG_TIMER_INITIAL = 0x38,
    REG_TIMER_CURRENT = 0x39, REG_TIMER_DIVIDE = 0x3e, REG_SELF_IPI = 0x3f
};

#define SVR_ENABLE 0x100u
#define LVT_MASKED 0x10000u
#define LVT_VECTOR(lvt) ((lvt) & 0xff)
#define LVT_MODE(lvt) ((lvt) >> 8 & 7)
#define TIMER_MODE(lvt) ((lvt) >> 17 & 3)
enum { TIMER_ONE_SHOT, TIMER_PERIODIC, TIMER_TSC_DEADLINE };

/* Error status register, SDM vol. 3 section 11.5.3 */
#define ESR_SEND_ILLEGAL 0x20u
#define ESR_RECEIVE_ILLEGAL 0x40u
#define ESR_REGISTER_ILLEGAL 0x80u

static inline unsigned apic_mode(const struct cpu *c)
{
    uint64_t base = c->s.arch.apic.base_msr;
    return !(base & APIC_BASE_ENABLE) ? APIC_MODE_OFF : base & APIC_BASE_X2 ? APIC_MODE_X2 : APIC_MODE_X;
}

/* apic_irq.c */
void apic_publish(struct cpu *c);                 /* what senders read of us */
void apic_update(struct cpu *c);                  /* PPR and intr_ready, after any change of IRR, ISR, TPR, LVT, mode */
void apic_local(struct cpu *c, uint32_t lvt);     /* a local interrupt source fires */
void apic_error(struct cpu *c, uint32_t bits);

/* apic_timer.c */
uint32_t apic_timer_count(const struct cpu *c);
void apic_timer_load(struct cpu *c, uint32_t initial);
void apic_timer_divide(struct cpu *c, uint32_t divide);
void apic_timer_mode(struct cpu *c, uint32_t lvt); /* before lvt_timer changes to it */
void apic_timer_deadline(struct cpu *c, uint64_t tsc);
void apic_timer_clear(struct cpu *c);
void apic_timer_arm(struct cpu *c);

#endif
