/*
 * What mmu.c and walk.c offer the system side, beyond the accesses that mem.h declares.
 *
 * `mode` is the index of a TLB (TLB_SUPER, TLB_SUPER_AC, TLB_USER): the privilege of the access.
 */
#ifndef ATOLL_MMU_H
#define ATOLL_MMU_H

#include "cpu.h"
#include "mem.h"

#define PHYS_BITS 40 /* MAXPHYADDR: CPUID 8000_0008h says the same */

enum mmu_access { MMU_READ, MMU_WRITE, MMU_EXEC };

/* ---- accesses with a privilege of their own: stacks of another ring. n 1, 2, 4, 8 */
uint64_t mmu_read_as(struct cpu *c, const struct uop *u, uint64_t lin, unsigned n, unsigned mode);
void mmu_write_as(struct cpu *c, const struct uop *u, uint64_t lin, uint64_t value, unsigned n, unsigned mode);
/* Sets bits of a byte of a descriptor table atomically (accessed, busy). */
void mmu_or_super(struct cpu *c, const struct uop *u, uint64_t lin, uint8_t bits);
/* The TLB for explicit accesses of code at a CPL. */
unsigned mmu_mode_for_cpl(const struct cpu *c, unsigned cpl);

/* ---- physical accesses that the CPU makes itself (page tables, kvmclock). Host pointer to bytes of one page of
 * RAM (write) or RAM and ROM (read); NULL for anything else. phys_written() after a store through it. */
void *phys_ptr(struct cpu *c, uint64_t gpa, bool write);
void phys_written(struct cpu *c, const void *host, unsigned n);

void mmu_reset(struct cpu *c); /* a new process or new state: nothing in any TLB */
bool mmu_load_pdptes(struct cpu *c, uint64_t cr3); /* PAE; false: reserved bits set, #GP */

/* ---- for a debugger: no side effects, privilege ignored. gpa, or SEG_NO_OFFSET where nothing is mapped. */
uint64_t walk_debug(struct cpu *c, uint64_t lin);

/* ---- walk.c */
struct walk {
    uint64_t gpa;  /* of the byte */
    bool writable; /* the mode may write, and D is set already (or there is no paging) */
    bool global;
    bool large;    /* a page of more than 4 KiB */
};
/* Walks for one access; sets A and D as the access does. Returns 0, or WALK_FAULT and the error code of the #PF. */
uint32_t walk_linear(struct cpu *c, uint64_t lin, enum mmu_access access, unsigned mode, struct walk *w);
#define WALK_FAULT 0x80000000u

static inline bool is_canonical(uint64_t lin)
{
    return (uint64_t)((int64_t)(lin << 16) >> 16) == lin; /* 48 bits: no LA57 in the model */
}

#endif
