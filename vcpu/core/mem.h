/*
 * Guest memory as instructions see it. Inline: TLB hits. mmu.c: everything else.
 *
 * An access of n bytes at lin hits when the page of its last byte has the tag of the slot its first
 * byte selects: an access across two pages cannot (the next page belongs to another slot).
 *
 * Every store tests the code mask of its page afterwards, never before: see block.c for the argument.
 */
#ifndef ATOLL_MEM_H
#define ATOLL_MEM_H

#include "cpu.h"

#define PAGE_BASE (~(uint64_t)(SEG_PAGE - 1))

typedef uint8_t any8 __attribute__((may_alias));
typedef uint16_t any16 __attribute__((may_alias, aligned(1)));
typedef uint32_t any32 __attribute__((may_alias, aligned(1)));
typedef uint64_t any64 __attribute__((may_alias, aligned(1)));

/* ---- slow paths (mmu.c). n = 1, 2, 4, 8. They raise #PF, #GP/#SS (non-canonical; #SS where u->seg is SS), #AC. MMIO is done here.
 * A crossing access checks both pages before it changes anything. The order of bytes in two pages: as hardware, unspecified. ---- */
uint64_t mem_read_slow(struct cpu *c, const struct uop *u, uint64_t lin, unsigned n);
void mem_write_slow(struct cpu *c, const struct uop *u, uint64_t lin, uint64_t value, unsigned n);
/* Fills the TLB for writing (faults as a write would); the host pointer, or NULL where there is no direct one: ROM, MMIO, two pages. n <= 64 */
void *mem_rmw_slow(struct cpu *c, const struct uop *u, uint64_t lin, unsigned n);
void mem_probe_write(struct cpu *c, const struct uop *u, uint64_t lin, unsigned n);
void mem_probe_read(struct cpu *c, const struct uop *u, uint64_t lin, unsigned n);
/* n <= 4096; all or nothing as far as faults go */
void mem_read_bytes(struct cpu *c, const struct uop *u, uint64_t lin, void *to, unsigned n);
void mem_write_bytes(struct cpu *c, const struct uop *u, uint64_t lin, const void *from, unsigned n);
/* CPL 0 whatever CPL is: descriptor tables, TSS, IDT, stacks of an inner level */
uint64_t mem_read_super(struct cpu *c, const struct uop *u, uint64_t lin, unsigned n);
void mem_write_super(struct cpu *c, const struct uop *u, uint64_t lin, uint64_t value, unsigned n);
/* Instruction fetch from the page of lin: host address of the page's first byte and its offset in guest memory (from the first byte
 * of RAM); NULL: no memory there (reads as FFh). Raises #PF (u = NULL: rip is arch.rip). */
const uint8_t *mem_fetch_page(struct cpu *c, uint64_t lin, uint64_t *offset);

/* ---- translation as a whole (mmu.c) ---- */
void mmu_set_mode(struct cpu *c);                   /* after CPL, CR0, CR4, EFER.NXE, RFLAGS.AC: picks c->tlb */
void mmu_flush(struct cpu *c, bool global);         /* all entries (global: also those with G) */
void mmu_flush_page(struct cpu *c, uint64_t lin);

/* ---- stores into code (block.c). offset: in guest memory ---- */
void code_written(struct cpu *c, uint64_t offset, unsigned n);

static inline struct tlb_entry *tlb_slot(const struct cpu *c, uint64_t lin) { return &c->tlb[(lin >> 12) & (TLB_SIZE - 1)]; }
static inline bool tlb_reads(const struct tlb_entry *e, uint64_t lin, unsigned n) { return ((lin + (n - 1)) & PAGE_BASE) == e->read; }
static inline bool tlb_writes(const struct tlb_entry *e, uint64_t lin, unsigned n) { return ((lin + (n - 1)) & PAGE_BASE) == e->write; }

/* After a store of n bytes at host address p (in guest memory, within a page) */
static inline void code_check(struct cpu *c, const void *p, unsigned n)
{
    atomic_signal_fence(memory_order_seq_cst);
    uint64_t offset = (uint64_t)((const uint8_t *)p - c->guest);
    if (unlikely(*(volatile uint64_t *)&c->code_mask[offset >> 12])) {
        code_written(c, offset, n);
    }
}

#define MEM_ACCESS(bits)                                                                                            \
    static inline uint##bits##_t mem_read##bits(struct cpu *c, const struct uop *u, uint64_t lin)                   \
    {                                                                                                               \
        const struct tlb_entry *e = tlb_slot(c, lin);                                                               \
        if (likely(tlb_reads(e, lin, bits / 8))) {                                                                  \
            return *(volatile any##bits *)(lin + e->addend);                                                        \
        }                                                                                                           \
        return (uint##bits##_t)mem_read_slow(c, u, lin, bits / 8);                                                  \
    }                                                                                                               \
    static inline void mem_write##bits(struct cpu *c, const struct uop *u, uint64_t lin, uint##bits##_t value)      \
    {                                                                                                               \
        const struct tlb_entry *e = tlb_slot(c, lin);                                                               \
        if (likely(tlb_writes(e, lin, bits / 8))) {                                                                 \
            any##bits *p = (any##bits *)(lin + e->addend);                                                          \
            *(volatile any##bits *)p = value;                                                                       \
            code_check(c, p, bits / 8);                                                                             \
        } else {                                                                                                    \
            mem_write_slow(c, u, lin, value, bits / 8);                                                             \
        }                                                                                                           \
    }
MEM_ACCESS(8)
MEM_ACCESS(16)
MEM_ACCESS(32)
MEM_ACCESS(64)

/* Pointer to n bytes that may be read and written, for plain or atomic read-modify-write; then code_check(c, p, n). NULL: the
 * bytes have no single host address; mem_read_slow() and mem_write_slow() work (mem_probe_write() has passed), atomically
 * between world_stop() and world_resume(). */
static inline void *mem_rmw(struct cpu *c, const struct uop *u, uint64_t lin, unsigned n)
{
    const struct tlb_entry *e = tlb_slot(c, lin);
    if (likely(tlb_writes(e, lin, n))) {
        return (void *)(lin + e->addend);
    }
    return mem_rmw_slow(c, u, lin, n);
}

static inline uint64_t mem_read(struct cpu *c, const struct uop *u, uint64_t lin, unsigned n)
{
    return n == 8 ? mem_read64(c, u, lin) : n == 4 ? mem_read32(c, u, lin) : n == 2 ? mem_read16(c, u, lin) : mem_read8(c, u, lin);
}

static inline void mem_write(struct cpu *c, const struct uop *u, uint64_t lin, uint64_t value, unsigned n)
{
    if (n == 8) {
        mem_write64(c, u, lin, value);
    } else if (n == 4) {
        mem_write32(c, u, lin, (uint32_t)value);
    } else if (n == 2) {
        mem_write16(c, u, lin, (uint16_t)value);
    } else {
        mem_write8(c, u, lin, (uint8_t)value);
    }
}

/* Host address for a direct access within the page of lin, or NULL (then go item by item); never faults. */
static inline uint8_t *mem_direct(const struct cpu *c, uint64_t lin, bool write)
{
    const struct tlb_entry *e = tlb_slot(c, lin);
    return (lin & PAGE_BASE) == (write ? e->write : e->read) ? (uint8_t *)(lin + e->addend) : NULL;
}

#endif
