/*
 * The system side of the core as the run loop and the other files call it. Handlers named op_* are
 * declared by the generated table, not here.
 */
#ifndef ATOLL_SYSTEM_H
#define ATOLL_SYSTEM_H

#include "cpu.h"

/* Control registers, SDM vol. 3 section 2.5 */
#define CR0_PE 0x1u
#define CR0_MP 0x2u
#define CR0_EM 0x4u
#define CR0_TS 0x8u
#define CR0_ET 0x10u
#define CR0_NE 0x20u
#define CR0_WP 0x10000u
#define CR0_AM 0x40000u
#define CR0_NW 0x20000000u
#define CR0_CD 0x40000000u
#define CR0_PG 0x80000000u
#define CR4_TSD 0x4u
#define CR4_DE 0x8u
#define CR4_PSE 0x10u
#define CR4_PAE 0x20u
#define CR4_MCE 0x40u
#define CR4_PGE 0x80u
#define CR4_PCE 0x100u
#define CR4_OSFXSR 0x200u
#define CR4_OSXMMEXCPT 0x400u
#define CR4_UMIP 0x800u
#define CR4_FSGSBASE 0x10000u
#define CR4_PCIDE 0x20000u
#define CR4_OSXSAVE 0x40000u
#define CR4_SMEP 0x100000u
#define CR4_SMAP 0x200000u
#define EFER_SCE 0x1u
#define EFER_LME 0x100u
#define EFER_LMA 0x400u
#define EFER_NXE 0x800u
#define EFER_AIBRSE 0x200000u /* automatic IBRS */

/* Debug registers, SDM vol. 3 section 17.2 */
#define DR6_BD 0x2000u
#define DR6_BS 0x4000u
#define DR6_BT 0x8000u
#define DR6_FIXED 0xffff0ff0u
#define DR7_GD 0x2000u
#define DR7_FIXED 0x400u
#define DR7_LOCAL 0x55u /* L0-L3 */

static inline bool mode_protected(const struct cpu *c) { return c->s.arch.cr0 & CR0_PE; }
static inline bool mode_vm86(const struct cpu *c) { return c->s.arch.rflags & FLAG_VM; }
static inline bool mode_real_or_vm86(const struct cpu *c) { return !mode_protected(c) || mode_vm86(c); }
static inline bool mode_long(const struct cpu *c) { return c->s.arch.efer & EFER_LMA; } /* 64-bit or compatibility */
static inline bool mode_64(const struct cpu *c) { return mode_long(c) && (c->s.arch.seg[CS].attr & 0x2000); }

/* ---- fault.c: events. raise_*() and fault_deliver() are in cpu.h. On a triple fault activity is ACT_SHUTDOWN and exit_reason
 * EXIT_SHUTDOWN. */
/* An interrupt at an instruction boundary; rip is exact. EVENT_NMI sets nmi_blocked. May raise. The caller ends the HLT. */
void deliver_interrupt(struct cpu *c, unsigned vector, enum event_kind kind);

/* ---- debug.c; debug_before() and debug_after() are in cpu.h */
void debug_io(struct cpu *c, unsigned port, unsigned width); /* I/O breakpoints, CR4.DE: by IN and OUT */
void debug_access(struct cpu *c, uint64_t lin, unsigned size, bool write); /* data breakpoints: from the slow path */
void debug_update(struct cpu *c);            /* after a change of DR7: c->single and the TLB in force */
_Noreturn void debug_trap(struct cpu *c, uint32_t dr6); /* #DB at once, rip is exact */

/* ---- state as a whole */
enum reset_kind { RESET_POWER, RESET_INIT };
void core_reset(struct cpu *c, enum reset_kind kind); /* SDM vol. 3 table 9-1; INIT keeps FPU, MSRs, CR0.CD/NW; an AP waits for SIPI */
void core_sipi(struct cpu *c, uint32_t vector);       /* starts at vector << 12, if it waits */
void system_load(struct cpu *c);                      /* after arch was written from outside: TLBs, mode, caches */

/* ---- time and paravirtualisation, kvm.c */
void kvm_sleeping(struct cpu *c);  /* HLT wait begins: steal time page says preempted */
void kvm_running(struct cpu *c);   /* ... ends: a flush asked for meanwhile is done */
/* A hypercall of another vCPU ends this HLT, whatever IF is; clears the mark. */
bool kvm_kicked(struct cpu *c);
/* Behind the delivery of an interrupt: the guest may end it without an EOI. And the end of that (when sys.eoi_offered). */
void kvm_eoi_offer(struct cpu *c);
void kvm_eoi_settle(struct cpu *c);
/* The pvclock page is written again: after a change of TSC_ADJUST or of the TSC's frequency. */
void kvm_refresh(struct cpu *c);

/* ---- I/O permission: IOPL and the TSS bitmap (SDM vol. 1 section 18.5). Raises #GP(0). */
void io_check(struct cpu *c, const struct uop *u, unsigned port, unsigned width);

/* ---- the model: cpuid.c, msr.c */
struct cpuid_leaf { uint32_t eax, ebx, ecx, edx; };
#define CPUID_SIGNATURE 0x00300f10u /* family 12h, model 1, stepping 0 */
struct cpuid_leaf cpuid_query(const struct cpu *c, uint32_t leaf, uint32_t subleaf);
/* false: #GP(0) */
bool msr_read(struct cpu *c, uint32_t index, uint64_t *value);
bool msr_write(struct cpu *c, uint32_t index, uint64_t value);

#endif
