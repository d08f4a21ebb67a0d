/* State after power-on, INIT and SIPI: SDM vol. 3 table 9-1 and section 8.4; APM vol. 2 section 14.1. */
#include "apic.h"
#include "api.h"
#include "desc.h"

#define DATA_ATTR (ATTR_P | ATTR_S | ATTR_WRITABLE | ATTR_ACCESSED)
#define CODE_ATTR (DATA_ATTR | ATTR_CODE)
#define RESET_VECTOR_BASE 0xffff0000u
#define PAT_RESET 0x0007040600070406u   /* SDM vol. 3 section 11.12.4 */
#define HWCR_TSC_FREQ_SEL (1ull << 24)  /* the TSC counts at the P0 frequency */

static void reset_registers(struct cpu *c)
{
    struct cpu_arch *a = ARCH(c);
    memset(a->gpr, 0, sizeof a->gpr);
    a->gpr[RDX] = CPUID_SIGNATURE;
    a->rip = 0xfff0;
    c->s.lazy = LAZY_NONE;
    a->rflags = 2;
    for (unsigned i = 0; i < 6; i++) {
        a->seg[i] = (struct seg_reg){0, 0xffff, 0, DATA_ATTR};
    }
    a->seg[CS] = (struct seg_reg){RESET_VECTOR_BASE, 0xffff, 0xf000, CODE_ATTR};
    a->gdtr = a->idtr = (struct seg_reg){0, 0xffff, 0, 0};
    a->ldtr = (struct seg_reg){0, 0xffff, 0, ATTR_P | DESC_LDT};
    a->tr = (struct seg_reg){0, 0xffff, 0, ATTR_P | DESC_TSS32_BUSY};
    a->cr2 = a->cr3 = a->cr4 = a->efer = 0;
    memset(a->dr, 0, sizeof a->dr);
    a->dr[6] = DR6_FIXED;
    a->dr[7] = DR7_FIXED;
    a->cpl = a->inhibit = a->nmi_blocked = 0;
}

/* What INIT leaves alone: FPU and vector registers, XCR0, MSRs but EFER, TSC. */
static void reset_power(struct cpu *c)
{
    struct cpu_arch *a = ARCH(c);
    memset(&a->fpu, 0, sizeof a->fpu);
    a->fpu.cw = 0x40;
    a->fpu.tag_valid = 0xff; /* tag word 5555h: eight zeros */
    a->fpu.mxcsr = 0x1f80;
    memset(a->opmask, 0, sizeof a->opmask);
    memset(a->vec, 0, sizeof a->vec);
    a->xcr0 = 1;
    a->star = a->lstar = a->cstar = a->fmask = a->kernel_gs_base = 0;
    a->sysenter_cs = a->sysenter_esp = a->sysenter_eip = 0;
    a->tsc_aux = a->tsc_adjust = a->misc_enable = a->mcg_status = a->mcg_ctl = a->debugctl = 0;
    a->pat = PAT_RESET;
    a->hwcr = HWCR_TSC_FREQ_SEL;
    a->mtrr_def_type = 0;
    memset(a->mtrr_fixed, 0, sizeof a->mtrr_fixed);
    memset(a->mtrr_base, 0, sizeof a->mtrr_base);
    memset(a->mtrr_mask, 0, sizeof a->mtrr_mask);
    memset(a->mc_bank, 0, sizeof a->mc_bank);
    a->kvm_wall_clock = a->kvm_system_time = a->kvm_steal_time = 0;
    a->kvm_pv_eoi = a->kvm_async_pf = a->kvm_poll_control = 0;
}

void core_reset(struct cpu *c, enum reset_kind kind)
{
    struct cpu_arch *a = ARCH(c);
    uint64_t cache = kind == RESET_INIT ? a->cr0 & (CR0_CD | CR0_NW) : CR0_CD | CR0_NW;
    reset_registers(c);
    a->cr0 = CR0_ET | cache;
    if (kind == RESET_POWER) {
        reset_power(c);
    }
    apic_reset(c, kind == RESET_INIT);
    a->activity = a->apic.base_msr & APIC_BASE_BSP ? ACT_RUNNING : ACT_WAIT_SIPI;
    seg_store_sc(&c->s.posted_kick, 0u);
    system_load(c);
}

void core_sipi(struct cpu *c, uint32_t vector)
{
    struct cpu_arch *a = ARCH(c);
    if (a->activity != ACT_WAIT_SIPI) {
        return;
    }
    a->seg[CS] = (struct seg_reg){(vector & 0xff) << 12, 0xffff, (uint16_t)((vector & 0xff) << 8), CODE_ATTR};
    a->rip = 0;
    a->activity = ACT_RUNNING;
}

void system_load(struct cpu *c)
{
    struct cpu_arch *a = ARCH(c);
    memset(&c->sys, 0, sizeof c->sys);
    mmu_reset(c);
    if (a->cr0 & CR0_PG && a->cr4 & CR4_PAE && !mode_long(c)) {
        mmu_load_pdptes(c, a->cr3);
    }
    debug_update(c);
}

void core_power_on(struct cpu *c)
{
    core_reset(c, RESET_POWER);
    core_state_changed(c);
}

uint64_t core_translate(struct cpu *c, uint64_t linear) { return walk_debug(c, linear); }
