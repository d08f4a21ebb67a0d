/*
 * TLB fill and every access that misses the TLB: SDM vol. 3 chapter 4, alignment checks section 6.15 (#AC).
 *
 * A TLB entry stands for RAM or ROM only: the local APIC's page, the IOAPIC and device registers are never
 * in it. `write` is set only when the leaf's D bit is set and the page's byte in the dirty map is 1, so that a store
 * that hits has nothing to mark; who clears dirty bytes has every vCPU drop its TLB first (ATTN_TLB).
 */
#include "mmu.h"

#include "apic.h"
#include "io.h"
#include "seg.h"
#include "system.h"

#define PAGE(lin) ((lin) & ~(uint64_t)(SEG_PAGE - 1))

/* Where an access goes */
struct place {
    uint8_t *host; /* of the byte; NULL: MMIO or nothing at gpa */
    uint64_t gpa;
    bool discard; /* a write to ROM */
};

/* ---- physical ---- */

static uint8_t *region_host(struct cpu *c, const struct map_region *r, uint64_t gpa, bool write)
{
    if (!r || !(r->flags & (write ? REGION_WRITE : REGION_READ))) {
        return NULL;
    }
    return c->base + (write ? r->write_offset : r->read_offset) + (gpa - r->gpa);
}

/* The region that holds gpa. The last one found is remembered; mmu_flush(c, true) forgets it, and a new map means that. */
static const struct map_region *region_of(struct cpu *c, uint64_t gpa)
{
    struct map_region *r = &c->sys.region;
    if (gpa - r->gpa < r->size) {
        return r;
    }
    if (!seg_map_find(c->seg, gpa, r)) {
        r->size = 0;
        return NULL;
    }
    return r;
}

void *phys_ptr(struct cpu *c, uint64_t gpa, bool write)
{
    return region_host(c, region_of(c, gpa), gpa, write);
}

void phys_written(struct cpu *c, const void *host, unsigned n)
{
    c->dirty[((const uint8_t *)host - c->guest) >> 12] = 1;
    code_check(c, host, n);
}

/* ---- TLB ---- */

unsigned mmu_mode_for_cpl(const struct cpu *c, unsigned cpl)
{
    if (cpl == 3) {
        return TLB_USER;
    }
    return ARCH(c)->cr4 & CR4_SMAP && ARCH(c)->rflags & FLAG_AC ? TLB_SUPER_AC : TLB_SUPER;
}

static inline unsigned mode_now(const struct cpu *c) { return mmu_mode_for_cpl(c, ARCH(c)->cpl); }

static bool alignment_checked(const struct cpu *c)
{
    return ARCH(c)->cpl == 3 && ARCH(c)->rflags & FLAG_AC && ARCH(c)->cr0 & CR0_AM;
}

void mmu_set_mode(struct cpu *c)
{
    bool checked = c->sys.debug_data || alignment_checked(c);
    c->tlb = c->tlbs[checked ? TLB_CHECKED : mode_now(c)];
}

/* ---- Bloom filters over pages: see system_state.h */

static unsigned filter_bit(uint64_t number, unsigned bits) { return (unsigned)(number * 0x9e3779b97f4a7c15u >> (64 - bits)); }

static void filter_add(uint64_t *filter, uint64_t number, unsigned bits)
{
    unsigned bit = filter_bit(number, bits);
    filter[bit / 64] |= 1ull << bit % 64;
}

static bool filter_has(const uint64_t *filter, uint64_t number, unsigned bits)
{
    unsigned bit = filter_bit(number, bits);
    return filter[bit / 64] >> bit % 64 & 1;
}

#define LARGE_BITS 12
#define EXEC_BITS 14

static void filters_clear(struct cpu *c)
{
    memset(c->sys.large_filter, 0, sizeof c->sys.large_filter);
    memset(c->sys.exec_filter, 0, sizeof c->sys.exec_filter);
    c->sys.large_pages = c->sys.exec_local = false;
}

static void entry_clear(struct tlb_entry *e) { e->read = e->write = e->exec = TLB_INVALID; }

_Static_assert(TLB_SIZE == 64 * 64 && TLB_CHECKED == 3, "bitmaps in system_state.h");

/* Clears the entries of the slots in a bitmap of a TLB. */
static void clear_slots(struct tlb_entry *tlb, const uint64_t bits[64])
{
    for (unsigned word = 0; word < TLB_SIZE / 64; word++) {
        for (uint64_t rest = bits[word]; rest; rest &= rest - 1) {
            entry_clear(&tlb[word * 64 + (unsigned)__builtin_ctzll(rest)]);
        }
    }
}

void mmu_flush(struct cpu *c, bool global)
{
    for (unsigned m = 0; m < TLB_CHECKED; m++) {
        clear_slots(c->tlbs[m], global ? c->sys.tlb_filled[m] : c->sys.tlb_local[m]);
    }
    memset(c->sys.tlb_local, 0, sizeof c->sys.tlb_local);
    if (global) {
        memset(c->sys.tlb_filled, 0, sizeof c->sys.tlb_filled);
    }
    if (global || c->sys.exec_local) {
        jump_cache_flush(c);
        c->sys.exec_local = false;
    } else {
        jump_cache_flush_user(c); /* a kernel whose pages are global runs on */
    }
    if (global) {
        filters_clear(c);
        c->sys.region.size = 0;
    }
}

void mmu_reset(struct cpu *c)
{
    memset(c->sys.tlb_filled, 0xff, sizeof c->sys.tlb_filled);
    mmu_flush(c, true);
    for (unsigned i = 0; i < TLB_SIZE; i++) {
        entry_clear(&c->tlbs[TLB_CHECKED][i]);
    }
}

/* INVLPG drops all of a large page, of which the slots hold parts (SDM vol. 3 section 4.10.4.1). */
void mmu_flush_page(struct cpu *c, uint64_t lin)
{
    bool pse = !mode_long(c) && !(ARCH(c)->cr4 & CR4_PAE);
    if (pse && c->sys.large_pages) {
        mmu_flush(c, true);
        return;
    }
    bool large = filter_has(c->sys.large_filter, lin >> 21, LARGE_BITS);
    unsigned first = (lin >> 12) & (TLB_SIZE - 1), count = 1;
    if (large) { /* the slots of its 512 parts follow one another */
        first &= ~511u;
        count = 512;
    }
    for (unsigned m = 0; m < TLB_CHECKED; m++) {
        for (unsigned i = first; i < first + count; i++) {
            entry_clear(&c->tlbs[m][i]);
        }
    }
    if (large || filter_has(c->sys.exec_filter, lin >> 12, EXEC_BITS)) {
        jump_cache_flush(c);
    }
}

static void fill(struct cpu *c, unsigned mode, uint64_t lin, enum mmu_access access, const struct walk *w,
                 const struct map_region *r, uint8_t *host)
{
    unsigned slot = (lin >> 12) & (TLB_SIZE - 1);
    struct tlb_entry *e = &c->tlbs[mode][slot];
    uint64_t page = PAGE(lin), addend = (uint64_t)host - lin;
    if (e->addend != addend || (e->read != page && e->write != page && e->exec != page)) {
        entry_clear(e);
        e->addend = addend;
    }
    uint64_t bit = 1ull << slot % 64, *local = &c->sys.tlb_local[mode][slot / 64];
    *local = w->global ? *local & ~bit : *local | bit;
    c->sys.tlb_filled[mode][slot / 64] |= bit;
    bool same = r->flags & REGION_WRITE && r->flags & REGION_READ && r->read_offset == r->write_offset;
    if (access == MMU_EXEC) {
        e->exec = page;
        filter_add(c->sys.exec_filter, lin >> 12, EXEC_BITS);
        c->sys.exec_local |= mode != TLB_USER && !w->global;
    } else if (r->flags & REGION_READ && (same || access == MMU_READ)) {
        e->read = page;
        uint8_t *dirty = &c->dirty[(host - c->guest) >> 12];
        if (same && access == MMU_WRITE) {
            *dirty = 1;
        }
        if (same && w->writable && *dirty) {
            e->write = page;
        }
    }
    if (w->large) {
        filter_add(c->sys.large_filter, lin >> 21, LARGE_BITS);
        c->sys.large_pages = true;
    }
    c->s.tlb_fills++;
}

static COLD _Noreturn void raise_noncanonical(struct cpu *c, const struct uop *u)
{
    raise_fault_code(c, u, u && u->seg == SS ? VEC_SS : VEC_GP, 0);
}

/* Translates lin for an access, through the TLB of that mode where it can. */
static struct place locate(struct cpu *c, const struct uop *u, uint64_t lin, enum mmu_access access, unsigned mode)
{
    struct tlb_entry *e = &c->tlbs[mode][(lin >> 12) & (TLB_SIZE - 1)];
    uint64_t tag = access == MMU_READ ? e->read : access == MMU_WRITE ? e->write : e->exec;
    if (tag == PAGE(lin)) {
        return (struct place){(uint8_t *)(lin + e->addend), 0, false};
    }
    if (!is_canonical(lin)) {
        raise_noncanonical(c, u);
    }
    struct walk w;
    uint32_t fault = walk_linear(c, lin, access, mode, &w);
    if (fault) {
        raise_page_fault(c, u, lin, fault & ~WALK_FAULT);
    }
    struct place at = {NULL, w.gpa, false};
    if (apic_hit(c, w.gpa)) {
        return at;
    }
    const struct map_region *r = region_of(c, w.gpa);
    at.host = region_host(c, r, w.gpa, access == MMU_WRITE);
    if (at.host) {
        fill(c, mode, lin, access, &w, r, at.host);
    } else {
        at.discard = r && !(r->flags & (REGION_MMIO | REGION_IOAPIC));
    }
    return at;
}

/* ---- accesses within a page ---- */

static uint64_t mmio_in(struct cpu *c, const struct uop *u, uint64_t gpa, unsigned n)
{
    return apic_hit(c, gpa) ? apic_mmio_read(c, gpa, n) : mmio_read(c, u, gpa, n);
}

static void mmio_out(struct cpu *c, const struct uop *u, uint64_t gpa, unsigned n, uint64_t value)
{
    if (apic_hit(c, gpa)) {
        apic_mmio_write(c, gpa, n, value);
    } else {
        mmio_write(c, u, gpa, n, value);
    }
}

/* Largest power of two up to 8 that fits n */
static unsigned piece(unsigned n) { return n >= 8 ? 8 : n >= 4 ? 4 : n >= 2 ? 2 : 1; }

static void place_read(struct cpu *c, const struct uop *u, const struct place *at, uint8_t *to, unsigned n)
{
    if (at->host) {
        memcpy(to, at->host, n);
        return;
    }
    for (unsigned done = 0, step; done < n; done += step) {
        step = piece(n - done);
        uint64_t value = mmio_in(c, u, at->gpa + done, step);
        memcpy(to + done, &value, step);
    }
}

/* Stores of 1, 2, 4 and 8 bytes must not be torn where hardware does not tear them. */
static void store(uint8_t *host, const uint8_t *from, unsigned n)
{
    switch (n) {
    case 1: *(volatile any8 *)host = *from; break;
    case 2: *(volatile any16 *)host = *(const any16 *)from; break;
    case 4: *(volatile any32 *)host = *(const any32 *)from; break;
    case 8: *(volatile any64 *)host = *(const any64 *)from; break;
    default: memcpy(host, from, n);
    }
}

static void place_write(struct cpu *c, const struct uop *u, const struct place *at, const uint8_t *from, unsigned n)
{
    if (at->host) {
        store(at->host, from, n);
        phys_written(c, at->host, n);
        return;
    }
    if (at->discard) {
        return;
    }
    for (unsigned done = 0, step; done < n; done += step) {
        step = piece(n - done);
        uint64_t value = 0;
        memcpy(&value, from + done, step);
        mmio_out(c, u, at->gpa + done, step, value);
    }
}

/* ---- accesses of any place ---- */

/* Bytes of n that lie in the page of lin */
static unsigned in_page(uint64_t lin, unsigned n)
{
    unsigned room = SEG_PAGE - (unsigned)(lin & (SEG_PAGE - 1));
    return n < room ? n : room;
}

/* The first byte of the following page; linear addresses have 32 bits outside 64-bit mode. */
static uint64_t next_page(const struct cpu *c, uint64_t lin)
{
    uint64_t next = PAGE(lin) + SEG_PAGE;
    return mode_64(c) ? next : (uint32_t)next;
}

/* #GP or #SS unless all bytes lie in canonical form: goes before what their pages have to say. */
static void check_canonical(struct cpu *c, const struct uop *u, uint64_t lin, unsigned n)
{
    if (mode_64(c) && !(is_canonical(lin) && is_canonical(lin + (n - 1)))) {
        raise_noncanonical(c, u);
    }
}

/* With alignment, at the place where the hosts seen look at it; the manuals leave the order of #AC and #PF open. */
static void check_address(struct cpu *c, const struct uop *u, uint64_t lin, unsigned n)
{
    check_canonical(c, u, lin, 1);
    if (alignment_checked(c) && n <= 8 && lin & (n - 1)) {
        raise_fault_code(c, u, VEC_AC, 0);
    }
    check_canonical(c, u, lin, n);
}

static void note_access(struct cpu *c, uint64_t lin, unsigned n, bool write)
{
    if (c->sys.debug_data) {
        debug_access(c, lin, n, write);
    }
}

static void read_as(struct cpu *c, const struct uop *u, uint64_t lin, void *to, unsigned n, unsigned mode, bool explicit)
{
    unsigned first = in_page(lin, n);
    if (explicit) {
        check_address(c, u, lin, n);
    }
    struct place a = locate(c, u, lin, MMU_READ, mode), b = {0};
    if (first < n) {
        b = locate(c, u, next_page(c, lin), MMU_READ, mode);
    }
    if (explicit) {
        note_access(c, lin, n, false);
    }
    place_read(c, u, &a, to, first);
    if (first < n) {
        if (!a.host) {
            b = locate(c, u, next_page(c, lin), MMU_READ, mode); /* the map may be another since: see io.h */
        }
        place_read(c, u, &b, (uint8_t *)to + first, n - first);
    }
}

static void write_as(struct cpu *c, const struct uop *u, uint64_t lin, const void *from, unsigned n, unsigned mode,
                     bool explicit)
{
    unsigned first = in_page(lin, n);
    if (explicit) {
        check_address(c, u, lin, n);
    }
    struct place a = locate(c, u, lin, MMU_WRITE, mode), b = {0};
    if (first < n) {
        b = locate(c, u, next_page(c, lin), MMU_WRITE, mode);
    }
    if (explicit) {
        note_access(c, lin, n, true);
    }
    place_write(c, u, &a, from, first);
    if (first < n) {
        if (!a.host) {
            b = locate(c, u, next_page(c, lin), MMU_WRITE, mode); /* the map may be another since: see io.h */
        }
        place_write(c, u, &b, (const uint8_t *)from + first, n - first);
    }
}

COLD uint64_t mem_read_slow(struct cpu *c, const struct uop *u, uint64_t lin, unsigned n)
{
    uint64_t value = 0;
    read_as(c, u, lin, &value, n, mode_now(c), true);
    return value;
}

COLD void mem_write_slow(struct cpu *c, const struct uop *u, uint64_t lin, uint64_t value, unsigned n)
{
    write_as(c, u, lin, &value, n, mode_now(c), true);
}

void mem_read_bytes(struct cpu *c, const struct uop *u, uint64_t lin, void *to, unsigned n)
{
    read_as(c, u, lin, to, n, mode_now(c), true);
}

void mem_write_bytes(struct cpu *c, const struct uop *u, uint64_t lin, const void *from, unsigned n)
{
    write_as(c, u, lin, from, n, mode_now(c), true);
}

uint64_t mmu_read_as(struct cpu *c, const struct uop *u, uint64_t lin, unsigned n, unsigned mode)
{
    uint64_t value = 0;
    read_as(c, u, lin, &value, n, mode, false);
    return value;
}

void mmu_write_as(struct cpu *c, const struct uop *u, uint64_t lin, uint64_t value, unsigned n, unsigned mode)
{
    write_as(c, u, lin, &value, n, mode, false);
}

uint64_t mem_read_super(struct cpu *c, const struct uop *u, uint64_t lin, unsigned n)
{
    return mmu_read_as(c, u, lin, n, TLB_SUPER);
}

void mem_write_super(struct cpu *c, const struct uop *u, uint64_t lin, uint64_t value, unsigned n)
{
    mmu_write_as(c, u, lin, value, n, TLB_SUPER);
}

void mmu_or_super(struct cpu *c, const struct uop *u, uint64_t lin, uint8_t bits)
{
    struct place at = locate(c, u, lin, MMU_WRITE, TLB_SUPER);
    if (at.host) {
        __atomic_fetch_or(at.host, bits, __ATOMIC_SEQ_CST);
        phys_written(c, at.host, 1);
    }
}

static void probe(struct cpu *c, const struct uop *u, uint64_t lin, unsigned n, enum mmu_access access)
{
    check_canonical(c, u, lin, n);
    locate(c, u, lin, access, mode_now(c));
    if (in_page(lin, n) < n) {
        locate(c, u, next_page(c, lin), access, mode_now(c));
    }
}

void mem_probe_write(struct cpu *c, const struct uop *u, uint64_t lin, unsigned n) { probe(c, u, lin, n, MMU_WRITE); }

void mem_probe_read(struct cpu *c, const struct uop *u, uint64_t lin, unsigned n) { probe(c, u, lin, n, MMU_READ); }

COLD void *mem_rmw_slow(struct cpu *c, const struct uop *u, uint64_t lin, unsigned n)
{
    check_address(c, u, lin, n);
    probe(c, u, lin, n, MMU_WRITE);
    note_access(c, lin, n, true);
    const struct tlb_entry *e = &c->tlbs[mode_now(c)][(lin >> 12) & (TLB_SIZE - 1)];
    return in_page(lin, n) == n && e->write == PAGE(lin) ? (void *)(lin + e->addend) : NULL;
}

const uint8_t *mem_fetch_page(struct cpu *c, uint64_t lin, uint64_t *offset)
{
    struct place at = locate(c, NULL, lin, MMU_EXEC, mode_now(c));
    if (!at.host) {
        return NULL;
    }
    const uint8_t *page = at.host - (lin & (SEG_PAGE - 1));
    *offset = (uint64_t)(page - c->guest);
    return page;
}
