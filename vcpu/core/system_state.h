/*
 * Private state of the system side (mmu.c fault.c debug.c); a member of struct cpu, so that cpu.h
 * need not know its parts. Of these only struct core_hidden (api.h) survives a save: system_load() derives the rest again.
 */
#ifndef ATOLL_SYSTEM_STATE_H
#define ATOLL_SYSTEM_STATE_H

#include <stdbool.h>
#include <stdint.h>

#include "segment.h"

/* What kind of event is delivered: decides the pushed RF, the EXT bit and the checks of a gate's DPL. */
enum event_kind {
    EVENT_FAULT,    /* rip at the instruction, RF pushed as 1 */
    EVENT_TRAP,     /* rip behind it */
    EVENT_SOFT,     /* INT n, INT3, INTO: the gate's DPL is checked, EXT is 0 */
    EVENT_ICEBP,    /* INT1: as a trap, no DPL check */
    EVENT_EXTERNAL, /* interrupt from the APIC or PIC */
    EVENT_NMI
};

struct system_state {
    /* -- mmu.c -- */
    /* By TLB, a bit a slot (TLB_CHECKED, TLB_SIZE / 64): holds an entry; holds one of a page that is not global. So a flush
     * costs what there is to flush. */
    uint64_t tlb_filled[3][64], tlb_local[3][64];
    /* Which pages may be in there, as Bloom filters that a full flush empties (filter_bit() of the page's number): */
    uint64_t large_filter[64];   /* 2 MiB of which slots hold parts of a large page */
    bool large_pages;            /* some are in large_filter */
    uint64_t exec_filter[256];   /* 4 KiB whose code the jump cache may know */
    bool exec_local;             /* supervisor code may be in a page that is not global */
    struct map_region region;    /* the last found for a physical address; size 0: none */
    uint64_t pdpte[4];           /* PAE: loaded with CR3 (SDM vol. 3 section 4.4.1) */
    /* -- fault.c -- */
    uint8_t event_kind;          /* of the event that raise_*() found, enum event_kind */
    bool delivering;             /* an event is half-way: a further fault combines with it */
    uint8_t delivering_vector;
    uint8_t delivering_kind;
    /* -- kvm.c -- */
    bool eoi_offered;            /* the guest may end the interrupt in service by a bit in its memory */
    /* -- debug.c -- */
    uint32_t debug_enabled;      /* bit i: DRi enabled by DR7 */
    uint32_t debug_data;         /* bit i: ... as a data or I/O breakpoint */
    uint32_t debug_hit;          /* DR6 bits collected by the instruction under way, or by MOV SS before it */
};

#endif
