/*
 * The CPU model as CPUID shows it: AMD CPUID specification (25481), SDM vol. 2 CPUID, KVM's cpuid.rst for 4000_0000h.
 *
 * Family 12h is chosen because Linux and other guests apply next to no errata and no speculation work-arounds that
 * complain to it, and because its topology needs only leaves 1 and 8000_0008h.
 */
#include "apic.h"
#include "mmu.h"
#include "system.h"

/* A row: registers for a leaf. Leaves with parts that depend on state have a function. */
struct row {
    uint32_t leaf;
    struct cpuid_leaf value;
    void (*adjust)(const struct cpu *c, uint32_t subleaf, struct cpuid_leaf *l);
};

#define BIT(n) (1u << (n))
#define APIC_BUS_KHZ 1000000u /* apic_timer.c: a count is a nanosecond */

#define LEAF1_EDX                                                                                                     \
    (BIT(0) /* FPU */ | BIT(2) /* DE */ | BIT(3) /* PSE */ | BIT(4) /* TSC */ | BIT(5) /* MSR */ | BIT(6) /* PAE */ | \
     BIT(7) /* MCE */ | BIT(8) /* CX8 */ | BIT(9) /* APIC */ | BIT(11) /* SEP */ | BIT(12) /* MTRR */ |               \
     BIT(13) /* PGE */ | BIT(14) /* MCA */ | BIT(15) /* CMOV */ | BIT(16) /* PAT */ | BIT(17) /* PSE36 */ |           \
     BIT(19) /* CLFSH */ | BIT(23) /* MMX */ | BIT(24) /* FXSR */ | BIT(25) /* SSE */ | BIT(26) /* SSE2 */)
#define LEAF1_ECX                                                                                                     \
    (BIT(0) /* SSE3 */ | BIT(1) /* PCLMULQDQ */ | BIT(9) /* SSSE3 */ | BIT(13) /* CX16 */ | BIT(17) /* PCID */ |      \
     BIT(19) /* SSE4.1 */ | BIT(20) /* SSE4.2 */ | BIT(21) /* x2APIC */ | BIT(22) /* MOVBE */ | BIT(23) /* POPCNT */ | \
     BIT(24) /* TSC deadline */ | BIT(25) /* AES */ | BIT(26) /* XSAVE */ | BIT(30) /* RDRAND */ |                    \
     BIT(31) /* hypervisor */)
#define LEAF7_EBX                                                                                                     \
    (BIT(0) /* FSGSBASE */ | BIT(1) /* TSC_ADJUST */ | BIT(7) /* SMEP */ | BIT(9) /* ERMS */ | BIT(10) /* INVPCID */ | \
     BIT(20) /* SMAP */)
#define EXT1_EDX                                                                                                      \
    ((LEAF1_EDX & 0x0183f3ffu & ~BIT(11)) | BIT(11) /* SYSCALL */ | BIT(20) /* NX */ | BIT(22) /* MMXEXT */ |         \
     BIT(27) /* RDTSCP */ | BIT(29) /* LM */)

#define KVM_FEATURES                                                                                                  \
    (BIT(1) /* NOP_IO_DELAY */ | BIT(3) /* CLOCKSOURCE2 */ | BIT(5) /* STEAL_TIME */ | BIT(6) /* PV_EOI */ |          \
     BIT(7) /* PV_UNHALT */ | BIT(9) /* PV_TLB_FLUSH */ | BIT(11) /* PV_SEND_IPI */ |                                 \
     BIT(24) /* CLOCKSOURCE_STABLE */)

/* Bits of an APIC ID that number the cores of the one socket */
static uint32_t core_bits(const struct cpu *c)
{
    uint32_t bits = 0;
    while (1u << bits < c->seg->vcpus) {
        bits++;
    }
    return bits;
}

static void leaf_features(const struct cpu *c, uint32_t subleaf, struct cpuid_leaf *l)
{
    (void)subleaf;
    l->ebx |= c->seg->vcpus << 16 | (c->s.arch.apic.id & 0xff) << 24;
    l->edx |= c->seg->vcpus > 1 ? BIT(28) /* HTT: several logical processors */ : 0;
    l->edx &= c->s.arch.apic.base_msr & APIC_BASE_ENABLE ? ~0u : ~BIT(9);
    l->ecx |= c->s.arch.cr4 & CR4_OSXSAVE ? BIT(27) : 0;
}

static void leaf_extended_features(const struct cpu *c, uint32_t subleaf, struct cpuid_leaf *l)
{
    (void)c;
    if (subleaf) {
        *l = (struct cpuid_leaf){0};
    }
}

static void leaf_topology(const struct cpu *c, uint32_t subleaf, struct cpuid_leaf *l)
{
    enum { TYPE_SMT = 1, TYPE_CORE = 2 };
    l->ecx = subleaf & 0xff;
    l->edx = c->s.arch.apic.id;
    if (subleaf == 0) {
        *l = (struct cpuid_leaf){0, 1, TYPE_SMT << 8, l->edx};
    } else if (subleaf == 1) {
        *l = (struct cpuid_leaf){core_bits(c), c->seg->vcpus, TYPE_CORE << 8 | 1, l->edx};
    }
}

static void leaf_xsave(const struct cpu *c, uint32_t subleaf, struct cpuid_leaf *l)
{
    (void)c;
    if (subleaf == 0) {
        *l = (struct cpuid_leaf){3, 576, 576, 0}; /* x87 and SSE; legacy region and header */
    } else if (subleaf == 1) {
        *l = (struct cpuid_leaf){BIT(0) /* XSAVEOPT */, 0, 0, 0};
    }
}

static void leaf_frequencies(const struct cpu *c, uint32_t subleaf, struct cpuid_leaf *l)
{
    (void)subleaf;
    l->eax = (uint32_t)c->seg->time.tsc_khz;
}

/* The instructions this CPU has run, for a benchmark inside the guest (tests/guests/bench); to within a block. */
static void leaf_instructions(const struct cpu *c, uint32_t subleaf, struct cpuid_leaf *l)
{
    uint64_t count = c->s.instructions + (uint64_t)(c->budget_noted - c->budget);
    (void)subleaf;
    l->ecx = (uint32_t)count;
    l->edx = (uint32_t)(count >> 32);
}

static void leaf_extended(const struct cpu *c, uint32_t subleaf, struct cpuid_leaf *l)
{
    (void)subleaf;
    l->ecx |= c->seg->vcpus > 1 ? BIT(1) /* CmpLegacy */ : 0;
    l->edx &= c->s.arch.apic.base_msr & APIC_BASE_ENABLE ? ~0u : ~BIT(9);
}

static void leaf_sizes(const struct cpu *c, uint32_t subleaf, struct cpuid_leaf *l)
{
    (void)subleaf;
    l->ecx = core_bits(c) << 12 | (c->seg->vcpus - 1);
}

#define TEXT4(a, b, c, d) ((uint32_t)(a) | (uint32_t)(b) << 8 | (uint32_t)(c) << 16 | (uint32_t)(d) << 24)
#define VENDOR_EBX TEXT4('A', 'u', 't', 'h')
#define VENDOR_EDX TEXT4('e', 'n', 't', 'i')
#define VENDOR_ECX TEXT4('c', 'A', 'M', 'D')
#define BASIC_MAX 0x0du
#define KVM_MAX 0x40000010u
#define EXTENDED_MAX 0x80000021u

static const struct row rows[] = {
    {0x00000000, {BASIC_MAX, VENDOR_EBX, VENDOR_ECX, VENDOR_EDX}, NULL},
    {0x00000001, {CPUID_SIGNATURE, 8 << 8 /* CLFLUSH of 64 bytes */, LEAF1_ECX, LEAF1_EDX}, leaf_features},
    {0x00000006, {BIT(2) /* ARAT: the APIC timer always runs */, 0, 0, 0}, NULL},
    {0x00000007, {0, LEAF7_EBX, BIT(2) /* UMIP */, BIT(4) /* FSRM */}, leaf_extended_features},
    {0x0000000b, {0}, leaf_topology},
    {0x0000000d, {0}, leaf_xsave},
    {0x40000000, {KVM_MAX, TEXT4('K', 'V', 'M', 'K'), TEXT4('V', 'M', 'K', 'V'), TEXT4('M', 0, 0, 0)}, NULL},
    {0x40000001, {KVM_FEATURES, 0, 0, 0}, NULL},
    {0x40000010, {0, APIC_BUS_KHZ, 0, 0}, leaf_frequencies},
    {0x40000080, {TEXT4('A', 'T', 'O', 'L'), 0, 0, 0}, leaf_instructions}, /* our own, above KVM's */
    {0x80000000, {EXTENDED_MAX, VENDOR_EBX, VENDOR_ECX, VENDOR_EDX}, NULL},
    {0x80000001, {CPUID_SIGNATURE, 0, BIT(0) /* LAHF in 64-bit mode */ | BIT(8) /* PREFETCHW */, EXT1_EDX}, leaf_extended},
    {0x80000002, {TEXT4('A', 't', 'o', 'l'), TEXT4('l', ' ', 'V', 'i'), TEXT4('r', 't', 'u', 'a'), TEXT4('l', ' ', 'C', 'P')}, NULL},
    {0x80000003, {TEXT4('U', 0, 0, 0), 0, 0, 0}, NULL},
    {0x80000004, {0}, NULL},
    {0x80000005, {0xff20ff20, 0xff20ff20, 0x40020140, 0x40020140}, NULL}, /* 64 KiB, 2-way L1 each */
    {0x80000006, {0, 0x42004200, 0x02008140, 0}, NULL},                  /* 512 KiB, 16-way L2 */
    {0x80000007, {0, 0, 0, BIT(8) /* invariant TSC */}, NULL},
    {0x80000008, {48 << 8 | PHYS_BITS, BIT(2) /* XSAVE keeps the error pointers */ | BIT(26) /* SSB_NO */, 0, 0}, leaf_sizes},
    /* LFENCE serialises; a null selector clears the base; automatic IBRS (no retpolines: nothing here predicts); SRSO_NO */
    {0x80000021, {BIT(2) | BIT(6) | BIT(8) | BIT(29), 0, 0, 0}, NULL},
};

struct cpuid_leaf cpuid_query(const struct cpu *c, uint32_t leaf, uint32_t subleaf)
{
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        if (rows[i].leaf == leaf) {
            struct cpuid_leaf l = rows[i].value;
            if (rows[i].adjust) {
                rows[i].adjust(c, subleaf, &l);
            }
            return l;
        }
    }
    return (struct cpuid_leaf){0}; /* AMD: leaves that do not exist are zero */
}
