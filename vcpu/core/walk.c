/*
 * Page walks: SDM vol. 3 chapter 4 (32-bit, PAE and 4-level paging), APM vol. 2 chapter 5.
 *
 * The model has no 1 GiB pages (CPUID 8000_0001h EDX bit 26 clear), no LA57, no protection keys.
 */
#include "mmu.h"
#include "system.h"

#define PTE_P 0x1u
#define PTE_W 0x2u
#define PTE_U 0x4u
#define PTE_A 0x20u
#define PTE_D 0x40u
#define PTE_PS 0x80u
#define PTE_G 0x100u
#define PTE_NX 0x8000000000000000u
#define PTE_ADDRESS 0x000ffffffffff000u
#define PHYS_MASK ((1ull << PHYS_BITS) - 1)
#define ABOVE_PHYS (PTE_ADDRESS & ~PHYS_MASK)

/* Error code bits of #PF, SDM vol. 3 figure 4-12 */
#define PF_P 0x1u
#define PF_W 0x2u
#define PF_U 0x4u
#define PF_RSVD 0x8u
#define PF_I 0x10u

struct level { uint64_t gpa; void *entry; uint64_t value; };

struct tables {
    uint64_t table;    /* gpa of the first table */
    unsigned levels;   /* tables to go through */
    unsigned width;    /* bytes an entry */
    unsigned bits;     /* of the linear address, a level */
    uint64_t reserved; /* bits that must be 0 in every present entry */
};

static void tables_of(struct cpu *c, uint64_t lin, struct tables *t)
{
    const struct cpu_arch *a = ARCH(c);
    uint64_t nx = a->efer & EFER_NXE ? 0 : PTE_NX;
    if (mode_long(c)) {
        *t = (struct tables){a->cr3 & PTE_ADDRESS, 4, 8, 9, ABOVE_PHYS | nx};
    } else if (a->cr4 & CR4_PAE) {
        uint64_t pdpte = c->sys.pdpte[(lin >> 30) & 3];
        *t = (struct tables){pdpte & PTE_P ? pdpte & PTE_ADDRESS : SEG_NO_OFFSET, 2, 8, 9,
                             ABOVE_PHYS | nx | 0x7ff0000000000000u};
    } else {
        *t = (struct tables){a->cr3 & 0xfffff000u, 2, 4, 10, 0};
    }
}

static uint64_t entry_load(const void *entry, unsigned width)
{
    return width == 8 ? __atomic_load_n((const uint64_t *)entry, __ATOMIC_RELAXED)
                      : __atomic_load_n((const uint32_t *)entry, __ATOMIC_RELAXED);
}

static bool entry_swap(const struct level *l, unsigned width, uint64_t to)
{
    if (width == 8) {
        uint64_t expected = l->value;
        return __atomic_compare_exchange_n((uint64_t *)l->entry, &expected, to, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);
    }
    uint32_t expected = (uint32_t)l->value;
    return __atomic_compare_exchange_n((uint32_t *)l->entry, &expected, (uint32_t)to, false, __ATOMIC_SEQ_CST,
                                       __ATOMIC_SEQ_CST);
}

/* Sets A (and D at the leaf) in the entries used; false if one of them changed meanwhile. */
static bool mark_accessed(struct cpu *c, const struct level *l, unsigned n, unsigned width, bool dirty)
{
    for (unsigned i = 0; i < n; i++) {
        uint64_t want = PTE_A | (dirty && i == n - 1 ? PTE_D : 0);
        if ((l[i].value & want) == want) {
            continue;
        }
        if (!l[i].entry || phys_ptr(c, l[i].gpa, true) != l[i].entry) {
            continue; /* tables in ROM or nowhere: hardware's write is lost as well */
        }
        if (!entry_swap(&l[i], width, l[i].value | want)) {
            return false;
        }
        phys_written(c, l[i].entry, width);
    }
    return true;
}

/* Reserved bits of a leaf that maps more than 4 KiB */
static bool large_reserved(const struct tables *t, uint64_t e)
{
    return t->width == 8 ? e & 0x1fe000u : e & 0x200000u; /* bits 20-13; PSE-36 with 40 bits: bit 21 */
}

/* Physical address bits of the leaf, for any page size */
static uint64_t leaf_address(const struct tables *t, uint64_t e, unsigned shift, uint64_t lin)
{
    uint64_t offset = lin & ((1ull << shift) - 1);
    uint64_t base = e & PHYS_MASK & ~((1ull << shift) - 1);
    if (t->width == 4) {
        base = e & 0xffffffffu & ~((1ull << shift) - 1);
        if (shift == 22) {
            base |= (e & 0x1fe000u) << 19; /* PSE-36: bits 20-13 are address bits 39-32 */
        }
    }
    return base | offset;
}

uint32_t walk_linear(struct cpu *c, uint64_t lin, enum mmu_access access, unsigned mode, struct walk *w)
{
    const struct cpu_arch *a = ARCH(c);
    if (!(a->cr0 & CR0_PG)) {
        *w = (struct walk){(uint32_t)lin, true, false, false};
        return 0;
    }
    struct tables t;
    tables_of(c, lin, &t);
    bool user = mode == TLB_USER;
    bool nx_on = a->efer & EFER_NXE && t.width == 8;
    uint32_t code = WALK_FAULT | (access == MMU_WRITE ? PF_W : 0) | (user ? PF_U : 0) |
                    (access == MMU_EXEC && (nx_on || a->cr4 & CR4_SMEP) ? PF_I : 0);
    for (;;) {
        struct level l[4];
        uint64_t table = t.table, rights = PTE_W | PTE_U, nx = 0;
        unsigned n = 0, shift = 12 + (t.levels - 1) * t.bits;
        bool large = false;
        for (;; shift -= t.bits) {
            if (table == SEG_NO_OFFSET) {
                return code;
            }
            l[n].gpa = table + ((lin >> shift) & ((1u << t.bits) - 1)) * t.width;
            l[n].entry = phys_ptr(c, l[n].gpa, false);
            l[n].value = l[n].entry ? entry_load(l[n].entry, t.width) : UINT64_MAX; /* nobody answers: all ones */
            uint64_t e = l[n++].value;
            if (!(e & PTE_P)) {
                return code;
            }
            bool ps = shift != 12 && e & PTE_PS && (t.width == 8 || a->cr4 & CR4_PSE);
            large = ps && shift <= 22;
            if (e & t.reserved || (ps && !large) || (large && large_reserved(&t, e))) {
                return code | PF_P | PF_RSVD;
            }
            rights &= e;
            nx |= nx_on ? e & PTE_NX : 0;
            if (shift == 12 || large) {
                break;
            }
            table = t.width == 8 ? e & PTE_ADDRESS : e & 0xfffff000u;
        }
        bool user_page = rights & PTE_U;
        bool may_write = rights & PTE_W || (!user && !(a->cr0 & CR0_WP));
        bool smap = !user && user_page && mode == TLB_SUPER && a->cr4 & CR4_SMAP && access != MMU_EXEC;
        bool smep = !user && user_page && a->cr4 & CR4_SMEP && access == MMU_EXEC;
        if ((user && !user_page) || smap || smep || (access == MMU_WRITE && !may_write) ||
            (access == MMU_EXEC && nx)) {
            return code | PF_P;
        }
        if (mark_accessed(c, l, n, t.width, access == MMU_WRITE)) {
            uint64_t leaf = l[n - 1].value;
            w->gpa = leaf_address(&t, leaf, shift, lin);
            w->writable = may_write && (access == MMU_WRITE || leaf & PTE_D);
            w->global = leaf & PTE_G && a->cr4 & CR4_PGE;
            w->large = large;
            return 0;
        }
    }
}

uint64_t walk_debug(struct cpu *c, uint64_t lin)
{
    const struct cpu_arch *a = ARCH(c);
    if (!(a->cr0 & CR0_PG)) {
        return (uint32_t)lin;
    }
    struct tables t;
    tables_of(c, lin, &t);
    uint64_t table = t.table;
    for (unsigned shift = 12 + (t.levels - 1) * t.bits; table != SEG_NO_OFFSET; shift -= t.bits) {
        const void *entry = phys_ptr(c, table + ((lin >> shift) & ((1u << t.bits) - 1)) * t.width, false);
        uint64_t e = entry ? entry_load(entry, t.width) : 0;
        if (!(e & PTE_P)) {
            break;
        }
        bool large = shift != 12 && shift <= 22 && e & PTE_PS && (t.width == 8 || a->cr4 & CR4_PSE);
        if (shift == 12 || large) {
            return leaf_address(&t, e, shift, lin);
        }
        table = t.width == 8 ? e & PTE_ADDRESS : e & 0xfffff000u;
    }
    return SEG_NO_OFFSET;
}

bool mmu_load_pdptes(struct cpu *c, uint64_t cr3)
{
    uint64_t loaded[4];
    for (unsigned i = 0; i < 4; i++) {
        const void *entry = phys_ptr(c, (cr3 & 0xffffffe0u) + i * 8, false);
        loaded[i] = entry ? entry_load(entry, 8) : UINT64_MAX;
        if (loaded[i] & PTE_P && loaded[i] & (~PHYS_MASK | 0x1e6u)) { /* SDM vol. 3 table 4-8 */
            return false;
        }
    }
    memcpy(c->sys.pdpte, loaded, sizeof loaded);
    return true;
}
