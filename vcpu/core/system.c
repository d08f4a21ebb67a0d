/*
 * Control registers, time stamp, cache and TLB instructions, HLT: SDM vol. 2 (MOV CR, LMSW, INVLPG, INVPCID, RDTSC,
 * RDRAND, XSETBV...), vol. 3 section 2.5; APM vol. 2 chapters 3 and 14.
 */
#include <sys/random.h>

#include "apic.h"
#include "desc.h"
#include "ea.h"

#define CR0_WRITABLE (CR0_PE | CR0_MP | CR0_EM | CR0_TS | CR0_NE | CR0_WP | CR0_AM | CR0_NW | CR0_CD | CR0_PG)
#define CR4_ALLOWED                                                                                                    \
    (CR4_TSD | CR4_DE | CR4_PSE | CR4_PAE | CR4_MCE | CR4_PGE | CR4_PCE | CR4_OSFXSR | CR4_OSXMMEXCPT | CR4_UMIP |      \
     CR4_FSGSBASE | CR4_PCIDE | CR4_OSXSAVE | CR4_SMEP | CR4_SMAP)
#define CR4_FLUSHES (CR4_PSE | CR4_PAE | CR4_PGE | CR4_PCIDE | CR4_SMEP | CR4_SMAP)
#define CR4_PDPTES (CR4_PSE | CR4_PAE | CR4_PGE | CR4_SMEP)
#define CR3_NO_FLUSH 0x8000000000000000u

static _Noreturn void gp(struct cpu *c, const struct uop *u) { raise_fault_code(c, u, VEC_GP, 0); }

/* ---- control registers ---- */

static void write_cr0(struct cpu *c, const struct uop *u, uint64_t value)
{
    struct cpu_arch *a = ARCH(c);
    if (value >> 32 || (value & CR0_PG && !(value & CR0_PE)) || (value & CR0_NW && !(value & CR0_CD))) {
        gp(c, u);
    }
    value = (value & CR0_WRITABLE) | CR0_ET;
    uint64_t changed = value ^ a->cr0;
    if (changed & value & CR0_PG) {
        if (a->efer & EFER_LME && (!(a->cr4 & CR4_PAE) || a->seg[CS].attr & ATTR_L)) {
            gp(c, u);
        }
    } else if (changed & CR0_PG && (mode_64(c) || a->cr4 & CR4_PCIDE)) {
        gp(c, u);
    }
    if (value & CR0_PG && a->cr4 & CR4_PAE && !(a->efer & EFER_LME) && changed & (CR0_PG | CR0_CD | CR0_NW) &&
        !mmu_load_pdptes(c, a->cr3)) {
        gp(c, u);
    }
    a->cr0 = value;
    if (a->efer & EFER_LME) {
        a->efer = value & CR0_PG ? a->efer | EFER_LMA : a->efer & ~(uint64_t)EFER_LMA;
    }
    if (changed & (CR0_PG | CR0_PE | CR0_WP)) {
        mmu_flush(c, true);
    }
    mmu_set_mode(c);
}

static void write_cr3(struct cpu *c, const struct uop *u, uint64_t value)
{
    struct cpu_arch *a = ARCH(c);
    if (a->cr4 & CR4_PCIDE) {
        value &= ~CR3_NO_FLUSH; /* the TLB has no tags: entries of another PCID must go in any case */
    }
    if (mode_long(c) ? value >> PHYS_BITS != 0 : value >> 32 != 0) {
        gp(c, u);
    }
    if (a->cr0 & CR0_PG && a->cr4 & CR4_PAE && !mode_long(c) && !mmu_load_pdptes(c, value)) {
        gp(c, u);
    }
    a->cr3 = value;
    mmu_flush(c, false);
}

static void write_cr4(struct cpu *c, const struct uop *u, uint64_t value)
{
    struct cpu_arch *a = ARCH(c);
    uint64_t changed = value ^ a->cr4;
    if (value & ~(uint64_t)CR4_ALLOWED || (mode_long(c) && !(value & CR4_PAE)) ||
        (changed & value & CR4_PCIDE && (!mode_long(c) || a->cr3 & 0xfff))) {
        gp(c, u);
    }
    if (value & CR4_PAE && a->cr0 & CR0_PG && !mode_long(c) && changed & CR4_PDPTES && !mmu_load_pdptes(c, a->cr3)) {
        gp(c, u);
    }
    a->cr4 = value;
    if (changed & CR4_FLUSHES) {
        mmu_flush(c, true);
    }
    mmu_set_mode(c);
}

void op_mov_from_cr(struct cpu *c, const struct uop *u)
{
    const struct cpu_arch *a = ARCH(c);
    uint64_t value;
    switch (u->reg) {
    case 0: value = a->cr0; break;
    case 2: value = a->cr2; break;
    case 3: value = a->cr3; break;
    case 4: value = a->cr4; break;
    case 8: value = apic_get_cr8(c); break;
    default: raise_fault(c, u, VEC_UD);
    }
    GPR(c, u->rm) = mode_64(c) ? value : (uint32_t)value;
    NEXT(c, u);
}

void op_mov_to_cr(struct cpu *c, const struct uop *u)
{
    uint64_t value = mode_64(c) ? GPR(c, u->rm) : (uint32_t)GPR(c, u->rm);
    switch (u->reg) {
    case 0: write_cr0(c, u, value); break;
    case 2: ARCH(c)->cr2 = value; break;
    case 3: write_cr3(c, u, value); break;
    case 4: write_cr4(c, u, value); break;
    case 8:
        if (value > 15) {
            gp(c, u);
        }
        apic_set_cr8(c, value);
        break;
    default: raise_fault(c, u, VEC_UD);
    }
    NEXT(c, u);
}

void op_clts(struct cpu *c, const struct uop *u)
{
    ARCH(c)->cr0 &= ~(uint64_t)CR0_TS;
    NEXT(c, u);
}

void op_smsw(struct cpu *c, const struct uop *u)
{
    uint64_t cr0 = ARCH(c)->cr0;
    if (ARCH(c)->cr4 & CR4_UMIP && ARCH(c)->cpl) {
        gp(c, u);
    }
    if (uop_mem(u)) {
        mem_write16(c, u, ea_linear(c, u, 2, true), (uint16_t)cr0);
    } else if (uop_size(u) == 2) {
        GPR(c, u->rm) = (GPR(c, u->rm) & ~(uint64_t)0xffff) | (uint16_t)cr0;
    } else {
        GPR(c, u->rm) = cr0;
    }
    NEXT(c, u);
}

void op_lmsw(struct cpu *c, const struct uop *u)
{
    uint64_t value = uop_mem(u) ? mem_read16(c, u, ea_linear(c, u, 2, false)) : GPR(c, u->rm);
    uint64_t low = CR0_PE | CR0_MP | CR0_EM | CR0_TS;
    write_cr0(c, u, (ARCH(c)->cr0 & ~(low & ~(uint64_t)CR0_PE)) | (value & low)); /* PE is never cleared */
    NEXT(c, u);
}

/* ---- XCR0 ---- */

void op_xgetbv(struct cpu *c, const struct uop *u)
{
    if (!(ARCH(c)->cr4 & CR4_OSXSAVE)) {
        raise_fault(c, u, VEC_UD);
    }
    if ((uint32_t)GPR(c, RCX)) {
        gp(c, u);
    }
    GPR(c, RAX) = (uint32_t)ARCH(c)->xcr0;
    GPR(c, RDX) = ARCH(c)->xcr0 >> 32;
    NEXT(c, u);
}

void op_xsetbv(struct cpu *c, const struct uop *u)
{
    if (!(ARCH(c)->cr4 & CR4_OSXSAVE)) {
        raise_fault(c, u, VEC_UD);
    }
    uint64_t value = GPR(c, RDX) << 32 | (uint32_t)GPR(c, RAX);
    if (ARCH(c)->cpl || (uint32_t)GPR(c, RCX) || !(value & 1) || value & ~3ull) {
        gp(c, u); /* x87 always, SSE; nothing else in the model */
    }
    ARCH(c)->xcr0 = value;
    NEXT(c, u);
}

/* ---- caches and TLB ---- */

/* INVD, WBINVD: memory is always coherent */
void op_cache(struct cpu *c, const struct uop *u) { NEXT(c, u); }

/* CLFLUSH: faults as a byte read does */
void op_clflush(struct cpu *c, const struct uop *u)
{
    mem_probe_read(c, u, ea_linear(c, u, 1, false), 1);
    NEXT(c, u);
}

void op_invlpg(struct cpu *c, const struct uop *u)
{
    uint64_t base = !mode_64(c) || u->seg >= FS ? ARCH(c)->seg[u->seg].base : 0, lin = base + ea_offset(c, u);
    mmu_flush_page(c, mode_64(c) ? lin : (uint32_t)lin);
    NEXT(c, u);
}

enum { INVPCID_ADDRESS, INVPCID_CONTEXT, INVPCID_ALL_GLOBAL, INVPCID_ALL };

static void invpcid(struct cpu *c, const struct uop *u)
{
    uint64_t type = mode_64(c) ? GPR(c, u->reg) : (uint32_t)GPR(c, u->reg), descriptor[2];
    if (ARCH(c)->cpl || type > INVPCID_ALL) {
        gp(c, u);
    }
    mem_read_bytes(c, u, ea_linear(c, u, 16, false), descriptor, 16);
    uint64_t pcid = descriptor[0], lin = descriptor[1];
    bool pcide = ARCH(c)->cr4 & CR4_PCIDE;
    if (pcid >> 12 || (type <= INVPCID_CONTEXT && !pcide && pcid) || (type == INVPCID_ADDRESS && !is_canonical(lin))) {
        gp(c, u);
    }
    bool current = pcid == (pcide ? ARCH(c)->cr3 & 0xfff : 0); /* the TLB holds no other PCID's entries */
    if (type == INVPCID_ADDRESS && current) {
        mmu_flush_page(c, lin);
    } else if (type >= INVPCID_ALL_GLOBAL || (type == INVPCID_CONTEXT && current)) {
        mmu_flush(c, type == INVPCID_ALL_GLOBAL);
    }
}

void op_invpcid(struct cpu *c, const struct uop *u)
{
    invpcid(c, u);
    NEXT(c, u);
}

/* ---- time, counters, random numbers, HLT ---- */

static void check_tsd(struct cpu *c, const struct uop *u)
{
    if (ARCH(c)->cr4 & CR4_TSD && ARCH(c)->cpl) {
        gp(c, u);
    }
}

static void load_edx_eax(struct cpu *c, uint64_t value)
{
    GPR(c, RAX) = (uint32_t)value;
    GPR(c, RDX) = value >> 32;
}

void op_rdtsc(struct cpu *c, const struct uop *u)
{
    check_tsd(c, u);
    load_edx_eax(c, cpu_tsc(c));
    NEXT(c, u);
}

void op_rdtscp(struct cpu *c, const struct uop *u)
{
    check_tsd(c, u);
    load_edx_eax(c, cpu_tsc(c));
    GPR(c, RCX) = (uint32_t)ARCH(c)->tsc_aux;
    NEXT(c, u);
}

/* The model's four counters never count: see the MSR table. */
void op_rdpmc(struct cpu *c, const struct uop *u)
{
    if ((ARCH(c)->cpl && !(ARCH(c)->cr4 & CR4_PCE)) || (uint32_t)GPR(c, RCX) >= 4) {
        gp(c, u);
    }
    load_edx_eax(c, 0);
    NEXT(c, u);
}

static void set_if(struct cpu *c, const struct uop *u, bool on)
{
    uint64_t *flags = &ARCH(c)->rflags;
    if (mode_protected(c) && ARCH(c)->cpl > (*flags & FLAG_IOPL) >> 12) {
        gp(c, u); /* CR4.VME and PVI are not in the model */
    }
    if (on && !(*flags & FLAG_IF)) {
        ARCH(c)->inhibit |= INHIBIT_STI;
    }
    *flags = on ? *flags | FLAG_IF : *flags & ~(uint64_t)FLAG_IF;
}

void op_cli(struct cpu *c, const struct uop *u)
{
    set_if(c, u, false);
    NEXT(c, u);
}

void op_sti(struct cpu *c, const struct uop *u)
{
    set_if(c, u, true);
    NEXT(c, u);
}

static uint64_t random_word(bool *ok)
{
    uint64_t value = 0;
    *ok = getrandom(&value, sizeof value, GRND_NONBLOCK) == sizeof value;
    return *ok ? value : 0;
}

static void rdrand(struct cpu *c, const struct uop *u)
{
    bool ok;
    uint64_t value = random_word(&ok);
    unsigned n = uop_size(u);
    GPR(c, u->rm) = n == 8 ? value : n == 4 ? (uint32_t)value : (GPR(c, u->rm) & ~(uint64_t)0xffff) | (uint16_t)value;
    flags_set_status(c, ok ? FLAG_CF : 0);
}

void op_rdrand(struct cpu *c, const struct uop *u)
{
    rdrand(c, u);
    NEXT(c, u);
}

void op_hlt(struct cpu *c, const struct uop *u)
{
    ARCH(c)->activity = ACT_HALTED;
    NEXT(c, u);
}

void op_cpuid(struct cpu *c, const struct uop *u)
{
    struct cpuid_leaf l = cpuid_query(c, (uint32_t)GPR(c, RAX), (uint32_t)GPR(c, RCX));
    GPR(c, RAX) = l.eax;
    GPR(c, RBX) = l.ebx;
    GPR(c, RCX) = l.ecx;
    GPR(c, RDX) = l.edx;
    NEXT(c, u);
}

/* ---- model-specific registers ---- */

static void rdmsr(struct cpu *c, const struct uop *u)
{
    uint64_t value = 0;
    if (!msr_read(c, (uint32_t)GPR(c, RCX), &value)) {
        gp(c, u);
    }
    load_edx_eax(c, value);
}

void op_rdmsr(struct cpu *c, const struct uop *u)
{
    rdmsr(c, u);
    NEXT(c, u);
}

void op_wrmsr(struct cpu *c, const struct uop *u)
{
    if (!msr_write(c, (uint32_t)GPR(c, RCX), GPR(c, RDX) << 32 | (uint32_t)GPR(c, RAX))) {
        gp(c, u);
    }
    NEXT(c, u);
}

/* CLAC and STAC (aux: the bit's new value). They need no block end: what follows uses the TLB that is in force by then. */
void op_set_ac(struct cpu *c, const struct uop *u)
{
    struct cpu_arch *a = ARCH(c);
    if (a->cpl != 0) {
        raise_fault(c, u, VEC_UD);
    }
    a->rflags = (a->rflags & ~(uint64_t)FLAG_AC) | (u->aux ? FLAG_AC : 0);
    mmu_set_mode(c);
    NEXT(c, u);
}
