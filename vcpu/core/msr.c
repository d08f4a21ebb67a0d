/*
 * Model-specific registers as one table: SDM vol. 4, AMD BKDG for family 12h (41131) section 3.12, APM vol. 2 appendix A.
 *
 * A row is a range of indices that are alike: constants, words of cpu_arch with rules for what may be written, or a pair of
 * functions. An index in no row does not exist: #GP(0).
 */
#include "apic.h"
#include "kvm.h"
#include "mmu.h"
#include "system.h"

enum rule {
    RULE_CONSTANT,    /* value; writes are ignored */
    RULE_READ_ONLY,   /* value; writes fault */
    RULE_MASK,        /* stored; bits outside value fault */
    RULE_CANONICAL,   /* stored; a linear address */
    RULE_TYPES,       /* stored; eight memory types (MTRR fixed ranges) */
    RULE_PAT,         /* ... of which WC and UC- too */
    RULE_FUNCTION
};

typedef bool (*msr_reader)(struct cpu *c, uint32_t index, uint64_t *value);
typedef bool (*msr_writer)(struct cpu *c, uint32_t index, uint64_t value);

struct msr_row {
    uint32_t first, last;
    uint8_t rule;
    uint8_t stride;  /* words from one index to the next */
    uint16_t offset; /* of the first word in cpu_arch */
    uint64_t value;
    msr_reader read;
    msr_writer write;
};

#define WORD(field) offsetof(struct cpu_arch, field)
#define BASE(s) (offsetof(struct cpu_arch, seg) + (s) * sizeof(struct seg_reg) + offsetof(struct seg_reg, base))
#define ANY UINT64_MAX
#define PHYS_MASK ((1ull << PHYS_BITS) - 1)
#define MTRR_RANGES 8u
#define MC_BANKS 6u

/* ---- registers that are more than a word ---- */

static bool tsc_read(struct cpu *c, uint32_t index, uint64_t *value)
{
    (void)index;
    *value = cpu_tsc(c);
    return true;
}

static bool tsc_write(struct cpu *c, uint32_t index, uint64_t value)
{
    (void)index;
    ARCH(c)->tsc_adjust += value - cpu_tsc(c); /* SDM vol. 3 section 17.17.3 */
    apic_tsc_changed(c);
    kvm_refresh(c);
    return true;
}

static bool tsc_adjust_read(struct cpu *c, uint32_t index, uint64_t *value)
{
    (void)index;
    *value = ARCH(c)->tsc_adjust;
    return true;
}

static bool tsc_adjust_write(struct cpu *c, uint32_t index, uint64_t value)
{
    (void)index;
    ARCH(c)->tsc_adjust = value;
    apic_tsc_changed(c);
    kvm_refresh(c);
    return true;
}

static bool efer_read(struct cpu *c, uint32_t index, uint64_t *value)
{
    (void)index;
    *value = ARCH(c)->efer;
    return true;
}

static bool efer_write(struct cpu *c, uint32_t index, uint64_t value)
{
    (void)index;
    struct cpu_arch *a = ARCH(c);
    uint64_t changed = value ^ a->efer;
    if (value & ~(uint64_t)(EFER_SCE | EFER_LME | EFER_LMA | EFER_NXE | EFER_AIBRSE) || (changed & EFER_LME && a->cr0 & CR0_PG)) {
        return false;
    }
    a->efer = (value & ~(uint64_t)EFER_LMA) | (a->efer & EFER_LMA);
    if (changed & EFER_NXE) {
        mmu_flush(c, true);
    }
    return true;
}

static bool memory_type(uint64_t type) { return type < 8 && 0x73 >> type & 1; /* UC WC WT WP WB: 0 1 4 5 6 */ }

static bool mtrr_range_read(struct cpu *c, uint32_t index, uint64_t *value)
{
    unsigned i = (index - 0x200) / 2;
    *value = index & 1 ? ARCH(c)->mtrr_mask[i] : ARCH(c)->mtrr_base[i];
    return true;
}

static bool mtrr_range_write(struct cpu *c, uint32_t index, uint64_t value)
{
    unsigned i = (index - 0x200) / 2;
    uint64_t reserved = ~PHYS_MASK | (index & 1 ? 0x7ff : 0xf00); /* SDM vol. 3 figure 11-7 */
    if (value & reserved || (!(index & 1) && !memory_type(value & 0xff))) {
        return false;
    }
    *(index & 1 ? &ARCH(c)->mtrr_mask[i] : &ARCH(c)->mtrr_base[i]) = value;
    return true;
}

static bool mtrr_default_read(struct cpu *c, uint32_t index, uint64_t *value)
{
    (void)index;
    *value = ARCH(c)->mtrr_def_type;
    return true;
}

static bool mtrr_default_write(struct cpu *c, uint32_t index, uint64_t value)
{
    (void)index;
    if (value & ~0xcffull || !memory_type(value & 0xff)) {
        return false;
    }
    ARCH(c)->mtrr_def_type = value;
    return true;
}

/* Machine check banks: CTL, STATUS, ADDR, MISC each. Only 0 may be written to STATUS (HWCR.McStatusWrEn is clear). */
static bool mc_read(struct cpu *c, uint32_t index, uint64_t *value)
{
    *value = ARCH(c)->mc_bank[index - 0x400];
    return true;
}

static bool mc_write(struct cpu *c, uint32_t index, uint64_t value)
{
    if ((index & 3) == 1 && value) {
        return false;
    }
    if ((index & 3) == 3) {
        return true; /* MISC has no threshold counters: reads as 0, so that nobody programs one */
    }
    ARCH(c)->mc_bank[index - 0x400] = value;
    return true;
}

/* ---- the table, by index ---- */

static const struct msr_row rows[] = {
    {0x00000010, 0x00000010, RULE_FUNCTION, 0, 0, 0, tsc_read, tsc_write},
    {0x0000001b, 0x0000001b, RULE_FUNCTION, 0, 0, 0, apic_msr_read, apic_msr_write},
    {0x0000003b, 0x0000003b, RULE_FUNCTION, 0, 0, 0, tsc_adjust_read, tsc_adjust_write},
    {0x0000008b, 0x0000008b, RULE_CONSTANT, 0, 0, 0x03000027, NULL, NULL},             /* PATCH_LEVEL */
    {0x000000fe, 0x000000fe, RULE_READ_ONLY, 0, 0, 0x500 | MTRR_RANGES, NULL, NULL},    /* MTRRCAP: WC, fixed ranges */
    {0x00000174, 0x00000174, RULE_MASK, 0, WORD(sysenter_cs), 0xffffffff, NULL, NULL},
    {0x00000175, 0x00000175, RULE_CANONICAL, 0, WORD(sysenter_esp), 0, NULL, NULL},
    {0x00000176, 0x00000176, RULE_CANONICAL, 0, WORD(sysenter_eip), 0, NULL, NULL},
    {0x00000179, 0x00000179, RULE_READ_ONLY, 0, 0, 0x100 | MC_BANKS, NULL, NULL},       /* MCG_CAP with MCG_CTL */
    {0x0000017a, 0x0000017a, RULE_MASK, 0, WORD(mcg_status), 7, NULL, NULL},
    {0x0000017b, 0x0000017b, RULE_MASK, 0, WORD(mcg_ctl), ANY, NULL, NULL},
    {0x000001a0, 0x000001a0, RULE_MASK, 0, WORD(misc_enable), ANY, NULL, NULL},
    {0x000001d9, 0x000001d9, RULE_MASK, 0, WORD(debugctl), 0x3f, NULL, NULL},
    {0x000001db, 0x000001de, RULE_READ_ONLY, 0, 0, 0, NULL, NULL},                      /* last branch records: none */
    {0x00000200, 0x00000200 + 2 * MTRR_RANGES - 1, RULE_FUNCTION, 0, 0, 0, mtrr_range_read, mtrr_range_write},
    {0x00000250, 0x00000250, RULE_TYPES, 1, WORD(mtrr_fixed[0]), 0, NULL, NULL},
    {0x00000258, 0x00000259, RULE_TYPES, 1, WORD(mtrr_fixed[1]), 0, NULL, NULL},
    {0x00000268, 0x0000026f, RULE_TYPES, 1, WORD(mtrr_fixed[3]), 0, NULL, NULL},
    {0x00000277, 0x00000277, RULE_PAT, 0, WORD(pat), 0, NULL, NULL},
    {0x000002ff, 0x000002ff, RULE_FUNCTION, 0, 0, 0, mtrr_default_read, mtrr_default_write},
    {0x00000400, 0x00000400 + 4 * MC_BANKS - 1, RULE_FUNCTION, 0, 0, 0, mc_read, mc_write},
    {0x000006e0, 0x000006e0, RULE_FUNCTION, 0, 0, 0, apic_msr_read, apic_msr_write},
    {0x00000800, 0x000008ff, RULE_FUNCTION, 0, 0, 0, apic_msr_read, apic_msr_write},
    {KVM_MSR_FIRST, KVM_MSR_LAST, RULE_FUNCTION, 0, 0, 0, kvm_msr_read, kvm_msr_write},
    {0xc0000080, 0xc0000080, RULE_FUNCTION, 0, 0, 0, efer_read, efer_write},
    {0xc0000081, 0xc0000081, RULE_MASK, 0, WORD(star), ANY, NULL, NULL},
    {0xc0000082, 0xc0000082, RULE_CANONICAL, 0, WORD(lstar), 0, NULL, NULL},
    {0xc0000083, 0xc0000083, RULE_CANONICAL, 0, WORD(cstar), 0, NULL, NULL},
    {0xc0000084, 0xc0000084, RULE_MASK, 0, WORD(fmask), 0xffffffff, NULL, NULL},
    {0xc0000100, 0xc0000100, RULE_CANONICAL, 0, BASE(FS), 0, NULL, NULL},
    {0xc0000101, 0xc0000101, RULE_CANONICAL, 0, BASE(GS), 0, NULL, NULL},
    {0xc0000102, 0xc0000102, RULE_CANONICAL, 0, WORD(kernel_gs_base), 0, NULL, NULL},
    {0xc0000103, 0xc0000103, RULE_MASK, 0, WORD(tsc_aux), 0xffffffff, NULL, NULL},
    {0xc0010000, 0xc0010007, RULE_CONSTANT, 0, 0, 0, NULL, NULL},                       /* PERF_CTL, PERF_CTR: never count */
    {0xc0010010, 0xc0010010, RULE_CONSTANT, 0, 0, 0, NULL, NULL},                       /* SYSCFG */
    {0xc0010015, 0xc0010015, RULE_MASK, 0, WORD(hwcr), ANY, NULL, NULL},
    {0xc0010016, 0xc001001a, RULE_CONSTANT, 0, 0, 0, NULL, NULL},                       /* IORR, TOP_MEM */
    {0xc001001d, 0xc001001d, RULE_CONSTANT, 0, 0, 0, NULL, NULL},                       /* TOP_MEM2 */
    {0xc001001f, 0xc001001f, RULE_CONSTANT, 0, 0, 1ull << 46, NULL, NULL},              /* NB_CFG1: EnableCf8ExtCfg */
    {0xc0010020, 0xc0010020, RULE_CONSTANT, 0, 0, 0, NULL, NULL},                       /* PATCH_LOADER */
    {0xc0010055, 0xc0010055, RULE_CONSTANT, 0, 0, 0, NULL, NULL},                       /* interrupt pending: no C1E */
    {0xc0010058, 0xc0010058, RULE_CONSTANT, 0, 0, 0, NULL, NULL},                       /* MMIO configuration: off */
    {0xc0011020, 0xc0011023, RULE_CONSTANT, 0, 0, 0, NULL, NULL},                       /* LS, IC, DC, BU_CFG */
    {0xc0011029, 0xc0011029, RULE_CONSTANT, 0, 0, 0x80000002, NULL, NULL}, /* DE_CFG: LFENCE serialises, erratum 665 cured */
    {0xc001102a, 0xc001102a, RULE_CONSTANT, 0, 0, 0, NULL, NULL},                       /* BU_CFG2 */
};

static const struct msr_row *find(uint32_t index)
{
    size_t low = 0, high = sizeof rows / sizeof *rows;
    while (low < high) {
        size_t middle = (low + high) / 2;
        if (index > rows[middle].last) {
            low = middle + 1;
        } else if (index < rows[middle].first) {
            high = middle;
        } else {
            return &rows[middle];
        }
    }
    return NULL;
}

static uint64_t *word(struct cpu *c, const struct msr_row *row, uint32_t index)
{
    return (uint64_t *)((uint8_t *)ARCH(c) + row->offset) + (size_t)(index - row->first) * row->stride;
}

bool msr_read(struct cpu *c, uint32_t index, uint64_t *value)
{
    const struct msr_row *row = find(index);
    if (!row) {
        return false;
    }
    switch (row->rule) {
    case RULE_CONSTANT:
    case RULE_READ_ONLY: *value = row->value; return true;
    case RULE_FUNCTION: return row->read(c, index, value);
    default: *value = *word(c, row, index); return true;
    }
}

/* Every byte one of the types in a bit mask */
static bool bytes_in(uint64_t value, unsigned types)
{
    for (unsigned i = 0; i < 8; i++, value >>= 8) {
        if ((value & 0xff) > 7 || !(types >> (value & 0xff) & 1)) {
            return false;
        }
    }
    return true;
}

bool msr_write(struct cpu *c, uint32_t index, uint64_t value)
{
    const struct msr_row *row = find(index);
    if (!row) {
        return false;
    }
    bool ok = true;
    switch (row->rule) {
    case RULE_CONSTANT: return true;
    case RULE_READ_ONLY: return false;
    case RULE_FUNCTION: return row->write(c, index, value);
    case RULE_MASK: ok = !(value & ~row->value); break;
    case RULE_CANONICAL: ok = is_canonical(value); break;
    case RULE_TYPES: ok = bytes_in(value, 0x73); break;
    case RULE_PAT: ok = bytes_in(value, 0xf3); break;
    default: break;
    }
    if (ok) {
        *word(c, row, index) = value;
    }
    return ok;
}
