/*
 * The local APIC (SDM vol. 3 chapter 11): registers, timer, what is pending. State: arch.apic, and
 * in vcpu_block the words that senders of interrupts read and write.
 *
 * What the run loop does at attention:
 *     bits = vcpu_take_attention(seg, index)
 *     ATTN_TIMER: apic_timer_check(c)      ATTN_IRQ: apic_drain(c)      ATTN_MAP: core_map_changed(c)
 *     ATTN_WORLD: core_world_wait(c)
 *     apic_take_init(c), apic_take_sipi(c, &vector), apic_take_nmi(c) say what was posted (NMI only when it can be taken)
 *     c->intr_ready: an interrupt waits that IF, and the interrupt shadow, alone can hold back
 *     vector = apic_ack(c): the vector to deliver, or -1 (the PIC withdrew it). May be a sync access to the PIC, from
 *     which it can leave by cpu_unwind(c, NULL, UNWIND_RETRY): nothing is acknowledged then
 * and after STI, POPF, IRET, MOV CR8, VM exits of any kind: c->intr_ready again (it is kept right by all functions here).
 */
#ifndef ATOLL_APIC_H
#define ATOLL_APIC_H

#include "cpu.h"

#define APIC_BASE_DEFAULT 0xfee00000u
#define APIC_BASE_BSP 0x100u
#define APIC_BASE_X2 0x400u
#define APIC_BASE_ENABLE 0x800u
#define APIC_MODE_OFF 0
#define APIC_MODE_X 1
#define APIC_MODE_X2 2

/* Power-on, or INIT (keeps IA32_APIC_BASE and the ID). Posted words are emptied. */
void apic_reset(struct cpu *c, bool init);

void apic_drain(struct cpu *c);        /* posted words -> IRR; sets intr_ready */
void apic_timer_check(struct cpu *c);  /* fires what is due, arms for the next */
int apic_ack(struct cpu *c);           /* IRR -> ISR, or INTA of the PIC */
bool apic_take_init(struct cpu *c);
bool apic_take_sipi(struct cpu *c, uint32_t *vector);
bool apic_take_nmi(struct cpu *c);
/* Does anything wait that ends HLT now (IF as it is, NMI, INIT)? */
bool apic_wakes(const struct cpu *c);
/* Guest time at which the timer is due, SEG_NO_OFFSET when it is not armed: for vcpu_sleep(). */
uint64_t apic_timer_due(const struct cpu *c);

/* Is gpa in the register window of this vCPU? Looked at before the memory map. */
static inline bool apic_hit(const struct cpu *c, uint64_t gpa)
{
    uint64_t base = c->s.arch.apic.base_msr;
    return (base & (APIC_BASE_ENABLE | APIC_BASE_X2)) == APIC_BASE_ENABLE && ((gpa ^ base) & 0xfffffff000u) == 0;
}
uint64_t apic_mmio_read(struct cpu *c, uint64_t gpa, unsigned width);
void apic_mmio_write(struct cpu *c, uint64_t gpa, unsigned width, uint64_t value);

/* IA32_APIC_BASE (1Bh), IA32_TSC_DEADLINE (6E0h), x2APIC (800h-8FFh). false: #GP(0) */
bool apic_msr_read(struct cpu *c, uint32_t msr, uint64_t *value);
bool apic_msr_write(struct cpu *c, uint32_t msr, uint64_t value);
uint64_t apic_get_cr8(const struct cpu *c);
void apic_set_cr8(struct cpu *c, uint64_t value); /* bits 3-0 */
void apic_eoi(struct cpu *c);                     /* as a write to EOI */

/* An EOI of the vector in service would do nothing else: it is edge triggered and nothing waits. */
bool apic_pv_eoi_fits(const struct cpu *c);

/* TSC as the guest reads it */
static inline uint64_t cpu_tsc(const struct cpu *c) { return guest_tsc(c->seg) + c->s.arch.tsc_adjust; }
void apic_tsc_changed(struct cpu *c);             /* IA32_TSC or IA32_TSC_ADJUST was written: the deadline moved */

/* The timer thread of this process: sleeps until the deadline, then raises ATTN_TIMER. 0, or -errno */
int apic_timer_start(struct cpu *c);
void apic_timer_stop(struct cpu *c);

#endif
