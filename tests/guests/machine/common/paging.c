/* A window of 4 KiB pages apart from the identity map. */
#include "guest.h"

static u64 window_pdpt[512] __attribute__((aligned(4096)));
static u64 window_pd[512] __attribute__((aligned(4096)));
static volatile u64 window_pt[WINDOW_PAGES] __attribute__((aligned(4096)));

void window_map(unsigned page, u64 physical, u64 flags)
{
    u64 *slot = &pml4[WINDOW >> 39 & 511];
    if (!*slot) {
        window_pd[0] = (u64)window_pt | PTE_PRESENT | PTE_WRITE;
        window_pdpt[0] = (u64)window_pd | PTE_PRESENT | PTE_WRITE;
        *slot = (u64)window_pdpt | PTE_PRESENT | PTE_WRITE;
    }
    window_pt[page] = flags ? physical | flags : 0;
}

u64 window_entry(unsigned page) { return window_pt[page]; }
