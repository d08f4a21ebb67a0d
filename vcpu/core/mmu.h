/*
 * Linear to guest-physical: TLB fill and the slow path of every access (mmu.c), page walks (walk.c).
 * mem.h holds the inline fast paths; what misses c->tlb comes here.
 *
 * All functions that take a uop raise #PF, #GP/#SS (not canonical; #SS where u->seg is SS) or #AC for it, and
 * then nothing has been written; u may be NULL: rip is exact and the segment is not SS.
 * `mode` is the index of a TLB (TLB_SUPER, TLB_SUPER_AC, TLB_USER): the privilege of the access.
 */
#ifndef ATOLL_MMU_H
#define ATOLL_MMU_H

#include "cpu.h"

enum mmu_access { MMU_READ, MMU_WRITE, MMU_EXEC };

/* ---- slow paths of mem.h, privilege of c->tlb. size 1, 2, 4 or 8. */
uint64_t mmu_read_slow(struct cpu *c, const struct uop *u, uint64_t lin, unsigned size);
void mmu_write_slow(struct cpu *c, const struct uop *u, uint64_t lin, uint64_t value, unsigned size);
/* Any size up to a page; all or nothing. */
void mmu_read_bytes(struct cpu *c, const struct uop *u, uint64_t lin, void *to, unsigned n);
void mmu_write_bytes(struct cpu *c, const struct uop *u, uint64_t lin, const void *from, unsigned n);
/* Faults now if a write of n bytes (up to a page) would. */
void mmu_probe_write(struct cpu *c, const struct uop *u, uint64_t lin, unsigned n);
void mmu_probe_read(struct cpu *c, const struct uop *u, uint64_t lin, unsigned n);
/* Host pointer for a host atomic on RAM within one page, written to (marked dirty; test code_mask afterwards with
 * mmu_wrote); NULL where the operand crosses a page or is not RAM, or a data breakpoint watches it. */
void *mmu_rmw(struct cpu *c, const struct uop *u, uint64_t lin, unsigned size);
/* After a store through a host pointer: code lines and the like. */
void mmu_wrote(struct cpu *c, const void *host, unsigned size);

/* ---- accesses with a privilege of their own: descriptor tables, TSS, stacks of another ring. size 1, 2, 4, 8. */
uint64_t mmu_read_as(struct cpu *c, const struct uop *u, uint64_t lin, unsigned size, unsigned mode);
void mmu_write_as(struct cpu *c, const struct uop *u, uint64_t lin, uint64_t value, unsigned size, unsigned mode);
/* The TLB for code of a given CPL; explicit accesses (RFLAGS.AC counts). */
unsigned mmu_mode_for_cpl(struct cpu *c, unsigned cpl);

/* ---- execution: offset in the segment of the byte at linear address lin (RAM or ROM), for the block lookup. Raises
 * #PF for a fetch; code in MMIO gives SEG_NO_OFFSET. */
uint64_t mmu_exec(struct cpu *c, uint64_t lin);

/* ---- physical accesses as the CPU makes them itself (page tables, kvmclock). Host pointer to n bytes within one page of
 * RAM or ROM, NULL for anything else. phys_dirty() after a write. */
void *phys_ptr(struct cpu *c, uint64_t gpa, bool write);
void phys_dirty(struct cpu *c, const void *host, unsigned n);

/* ---- maintenance */
void mmu_flush_all(struct cpu *c);                /* global pages too; also drops the jump cache */
void mmu_flush_nonglobal(struct cpu *c);          /* CR3 */
void mmu_flush_page(struct cpu *c, uint64_t lin); /* INVLPG */
void mmu_set_mode(struct cpu *c);                 /* c->tlb after a change of CPL, CR4.SMAP or RFLAGS.AC */
bool mmu_load_pdptes(struct cpu *c, uint64_t cr3); /* PAE; false: reserved bits set, #GP */

/* ---- for a debugger: no side effects, privilege ignored. SEG_NO_OFFSET where nothing is mapped. */
uint64_t walk_debug(struct cpu *c, uint64_t lin);

/* ---- walk.c */
struct walk {
    uint64_t gpa;     /* of the byte */
    uint64_t page;    /* size in bytes */
    bool writable, user, nx, global, dirty; /* dirty: D is set at the leaf (or paging is off) */
};
/* Walks for one access; sets A and D as the access does. Returns 0, or the error code of the #PF with bit 31 set. */
uint32_t walk_linear(struct cpu *c, uint64_t lin, enum mmu_access access, bool user, struct walk *w);
#define WALK_FAULT 0x80000000u

static inline bool is_canonical(uint64_t lin)
{
    return (uint64_t)((int64_t)(lin << 16) >> 16) == lin; /* 48 bits: no LA57 in the model */
}

#endif
