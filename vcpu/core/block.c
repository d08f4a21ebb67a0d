/*
 * Translated blocks: found by (offset in guest memory, rip, mode), chained, dropped when their bytes change.
 *
 * A block lies within a page, except that an instruction which straddles two is a block of its own. A direct
 * branch leads to a block: at first to a stub of 0 instructions, whose one uop finds the real target and, where
 * that lies in the same linear page and does not straddle, puts it in the stub's place. Everything else goes through
 * the jump cache, which is void after any change of translation. So a chain never outlives the mapping it relies on:
 * both ends are in one page, and whoever changes that page's mapping leaves by the run loop.
 *
 * Stores into code. A store tests the code mask of its page after it has landed. The translator marks the lines it is
 * going to read (seg_code_mark: under the page lock, with a global membarrier where a mark is new) and only then reads
 * the bytes. Either the writer sees the mark, then the code log has the page and the block is dropped at the next
 * look at attention; or its store was before the translator's barrier, and the bytes read are the new ones; or another
 * writer has cleared the mark in between, and with that put the page in the log after the translator's mark.
 * A vCPU's own blocks are dropped at once: their uops turn into op_stale, so the next instruction already is the new one.
 */
#include "block.h"
#include "decode.h"
#include "ea.h"
#include "mem.h"
#include "sized.h"

#include <stdlib.h>
#include <sys/mman.h>

#define ARENA_BYTES (64u << 20)
#define HASH_BITS 16
#define MAX_UOPS 64          /* a block */
#define ROOM (MAX_UOPS + 4)  /* the last instruction's privilege check, a goto */
#define MARK_AHEAD 256       /* bytes marked before it is known how long the block is */

struct block_cache {
    uint8_t *arena;
    size_t used;
    uint64_t generation;                  /* counts drops of everything */
    struct block *hash[1 << HASH_BITS];
    struct block **page;                  /* by guest page: blocks that begin in it */
    struct block **straddle;              /* ... whose instruction ends in it */
    struct uop uops[ROOM];
    struct decoded decoded[ROOM];
};

static void op_stale(struct cpu *c, const struct uop *u) { leave_at(c, u); }
static void op_fault_ud(struct cpu *c, const struct uop *u) { raise_fault(c, u, VEC_UD); }
static void op_fault_gp(struct cpu *c, const struct uop *u) { raise_fault_code(c, u, VEC_GP, 0); }

static void op_check_cpl0(struct cpu *c, const struct uop *u)
{
    if (unlikely(ARCH(c)->cpl != 0)) {
        raise_fault_code(c, u, VEC_GP, 0);
    }
    NEXT(c, u);
}

/* The block's end, to the run loop: rip is behind the last instruction */
static void op_leave(struct cpu *c, const struct uop *u) { ARCH(c)->rip = uop_next_rip(c, u); }

/* The block's end, to the block that follows */
void op_goto(struct cpu *c, const struct uop *u) { BRANCH(c, u); }

/* In a stub when single-stepping */
static void op_stop(struct cpu *c, const struct uop *u) {}

/* Instructions of the block that come before u */
static unsigned instructions_before(const struct block *b, const struct uop *u)
{
    unsigned n = 0;
    for (const struct uop *v = b->u; v != u; v++) {
        n += v->len != 0;
    }
    return n;
}

static void uncount(struct cpu *c, const struct uop *u, unsigned executed)
{
    c->budget += c->block->count - instructions_before(c->block, u) - executed;
}

void leave_at(struct cpu *c, const struct uop *u)
{
    uncount(c, u, 0);
    ARCH(c)->rip = uop_rip(c, u);
}

_Noreturn void cpu_unwind(struct cpu *c, const struct uop *u, int how)
{
    if (u) {
        uncount(c, u, how == UNWIND_TRAP);
        ARCH(c)->rip = how == UNWIND_TRAP ? uop_next_rip(c, u) : uop_rip(c, u);
    }
    longjmp(c->unwind, how);
}

/* ---- lookup ---- */

static unsigned hash(uint64_t offset, uint64_t rip, unsigned mode)
{
    uint64_t h = (offset ^ (rip >> 12) * 0x9e3779b97f4a7c15u ^ mode * 0x51ed27u);
    return (unsigned)(h ^ h >> HASH_BITS) & ((1u << HASH_BITS) - 1);
}

/* Linear address of an instruction; outside 64-bit mode it wraps at 4 GiB */
static uint64_t code_linear(const struct cpu *c, uint64_t rip)
{
    return c->mode & MODE_64 ? rip : (uint32_t)(ARCH(c)->seg[CS].base + rip);
}

/* Host address of the page and its offset in guest memory; NULL: no memory */
static const uint8_t *code_page(struct cpu *c, uint64_t lin, uint64_t *offset)
{
    const struct tlb_entry *e = tlb_slot(c, lin);
    if (likely((lin & PAGE_BASE) == e->exec)) {
        const uint8_t *host = (const uint8_t *)((lin & PAGE_BASE) + e->addend);
        *offset = (uint64_t)(host - c->guest);
        return host;
    }
    return mem_fetch_page(c, lin, offset);
}

static bool segmented(unsigned mode) { return !(mode & (MODE_64 | MODE_FLAT)); }

static struct block *translate(struct cpu *c, uint64_t rip, uint64_t lin, const uint8_t *page, uint64_t offset);

struct block *block_lookup(struct cpu *c, uint64_t rip)
{
    uint64_t lin = code_linear(c, rip), offset;
    const uint8_t *page = code_page(c, lin, &offset);
    if (unlikely(!page)) {
        raise_fault(c, NULL, VEC_UD); /* FF FF is no instruction */
    }
    offset += lin & (SEG_PAGE - 1);
    unsigned mode = c->mode;
    for (struct block *b = c->blocks->hash[hash(offset, rip, mode)]; b; b = b->hash_next) {
        if (b->offset != offset || b->rip != rip || b->mode != mode) {
            continue;
        }
        if (segmented(mode) && b->limit != ARCH(c)->seg[CS].limit) {
            continue;
        }
        if (unlikely(b->offset2 != SEG_NO_OFFSET)) {
            uint64_t offset2 = 0;
            if (!code_page(c, code_linear(c, rip + (SEG_PAGE - (lin & (SEG_PAGE - 1)))), &offset2) || b->offset2 != offset2) {
                continue;
            }
        }
        return b;
    }
    return translate(c, rip, lin, page, offset);
}

void block_go(struct cpu *c, const struct uop *u)
{
    if (c->mode & MODE_SINGLE) {
        return;
    }
    uint64_t rip = ARCH(c)->rip;
    struct block *b = block_lookup(c, rip);
    *jump_slot(c, rip) = (struct jump_entry){b, c->jump_key};
    ENTER(c, b);
}

/* The uop of a stub; imm = the branch whose imm leads here, in block stub->hash_next */
static void op_resolve(struct cpu *c, const struct uop *u)
{
    struct block *stub = c->block, *origin = stub->hash_next, *b;
    struct uop *branch = (struct uop *)(uintptr_t)u->imm;
    uint64_t rip = stub->rip;
    if (segmented(c->mode) && rip > ARCH(c)->seg[CS].limit) {
        c->block = origin;
        raise_fault_code(c, branch, VEC_GP, 0);
    }
    struct jump_entry *e = jump_slot(c, rip);
    if (likely(e->key == c->jump_key && e->block->rip == rip)) {
        b = e->block;
    } else {
        uint64_t generation = c->blocks->generation;
        b = block_lookup(c, rip);
        *e = (struct jump_entry){b, c->jump_key};
        if (generation != c->blocks->generation) {
            ENTER(c, b); /* the branch is gone */
        }
    }
    if (!((rip ^ origin->rip) & PAGE_BASE) && b->offset2 == SEG_NO_OFFSET && origin->offset2 == SEG_NO_OFFSET &&
        !segmented(c->mode)) {
        branch->imm = (uint64_t)(uintptr_t)b;
    }
    ENTER(c, b);
}

/* ---- translation ---- */

static void *allocate(struct cpu *c, size_t n)
{
    struct block_cache *k = c->blocks;
    n = (n + 31) & ~(size_t)31;
    void *p = k->arena + k->used;
    k->used += n;
    return p;
}

static struct block *make_stub(struct cpu *c, struct block *origin, struct uop *branch, uint64_t rip)
{
    struct block *b = allocate(c, sizeof *b + sizeof b->u[0]);
    *b = (struct block){.rip = rip, .mode = origin->mode, .hash_next = origin, .offset2 = SEG_NO_OFFSET, .uops = 1};
    b->u[0] = (struct uop){.fn = origin->mode & MODE_SINGLE ? op_stop : op_resolve, .imm = (uint64_t)(uintptr_t)branch,
                           .base = R_ZERO, .index = R_ZERO};
    return b;
}

struct source {
    const uint8_t *page, *page2; /* host addresses; page2: NULL until the first instruction needs it */
    uint64_t offset2;
    unsigned start;              /* in page */
    uint64_t room;               /* bytes up to the CS limit */
};

/* Up to 15 bytes of the instruction at `at` (from the block's start); those of the second page only when it is there */
static unsigned fetch(const struct source *s, unsigned at, uint8_t *to)
{
    unsigned from = s->start + at, in_page = SEG_PAGE - from, n = 15;
    if (s->room - at < n) {
        n = (unsigned)(s->room - at);
    }
    if (n <= in_page) {
        memcpy(to, s->page + from, n);
        return n;
    }
    memcpy(to, s->page + from, in_page);
    if (!s->page2) {
        return in_page;
    }
    memcpy(to + in_page, s->page2, n - in_page);
    return n;
}

static struct uop *add_uop(struct block_cache *k, unsigned *n, uop_fn fn, unsigned ioff, uint64_t imm)
{
    struct uop *u = &k->uops[*n];
    *u = (struct uop){.fn = fn, .ioff = (uint16_t)ioff, .imm = imm, .base = R_ZERO, .index = R_ZERO};
    k->decoded[*n] = (struct decoded){0};
    ++*n;
    return u;
}

/* Decodes into k->uops. Returns how many; *bytes, *count: of the instructions. May fetch the second page (#PF) first thing. */
static unsigned decode_block(struct cpu *c, struct source *s, uint64_t rip, unsigned *bytes, unsigned *count)
{
    struct block_cache *k = c->blocks;
    unsigned n = 0, at = 0, instructions = 0;
    for (;;) {
        uint8_t buffer[16];
        struct decoded d;
        struct uop u;
        unsigned avail = s->room > at ? fetch(s, at, buffer) : 0;
        unsigned len = decode(buffer, avail, rip + at, at, c->mode, &u, &d);
        if (!len && avail < 15 && s->room - at > avail) { /* the page ends */
            if (at) {
                add_uop(k, &n, op_goto, at, rip + at);
                break;
            }
            uint64_t next = code_linear(c, rip + (SEG_PAGE - s->start));
            static const uint8_t nothing[SEG_PAGE] = {[0 ... SEG_PAGE - 1] = 0xff};
            s->page2 = code_page(c, next, &s->offset2);
            if (!s->page2) {
                s->page2 = nothing;
                s->offset2 = SEG_NO_OFFSET - 1;
            }
            continue;
        }
        instructions++;
        if (!len || !d.row) {
            add_uop(k, &n, len ? op_fault_ud : op_fault_gp, at, 0)->len = 1;
            at += len ? len : avail;
            break;
        }
        if (d.row->bits & OPF_CPL0) {
            add_uop(k, &n, op_check_cpl0, at, 0);
        }
        k->uops[n] = u;
        k->decoded[n++] = d;
        at += len;
        bool last = n >= MAX_UOPS || s->page2 || s->start + at >= SEG_PAGE;
        if (c->mode & MODE_SINGLE || d.row->bits & OPF_END) {
            if (!(d.row->bits & OPF_JUMP) || d.row->imm == IMM_JB || d.row->imm == IMM_JZ) {
                add_uop(k, &n, op_leave, at, 0);
            }
            break;
        }
        if (d.row->bits & OPF_JUMP || last) {
            add_uop(k, &n, op_goto, at, rip + at);
            break;
        }
    }
    *bytes = at;
    *count = instructions;
    return n;
}

static uint64_t lines_of(unsigned start, unsigned bytes)
{
    unsigned first = start / 64, last = (start + bytes - 1) / 64;
    return (~(uint64_t)0 << first) & (~(uint64_t)0 >> (63 - last));
}

static struct block *translate(struct cpu *c, uint64_t rip, uint64_t lin, const uint8_t *page, uint64_t offset)
{
    struct block_cache *k = c->blocks;
    size_t most = sizeof(struct block) + ROOM * sizeof(struct uop) + 4 * (sizeof(struct block) + sizeof(struct uop) + 32);
    if (k->used + most > ARENA_BYTES) {
        blocks_drop_all(c);
    }
    struct source s = {.page = page, .start = (unsigned)(lin & (SEG_PAGE - 1)), .offset2 = SEG_NO_OFFSET, .room = UINT64_MAX};
    if (segmented(c->mode)) {
        uint64_t limit = ARCH(c)->seg[CS].limit;
        s.room = rip <= limit ? limit - rip + 1 : 0;
    }
    unsigned bytes = MARK_AHEAD, count, n, marked = 0;
    do { /* until what was read lay within the lines marked before */
        unsigned in_page = s.start + bytes > SEG_PAGE ? SEG_PAGE - s.start : bytes;
        marked = s.page2 ? bytes : in_page;
        seg_code_mark(c->seg, offset / SEG_PAGE, lines_of(s.start, in_page));
        if (s.offset2 < SEG_NO_OFFSET - 1) {
            seg_code_mark(c->seg, s.offset2 / SEG_PAGE, 1);
        }
        n = decode_block(c, &s, rip, &bytes, &count);
    } while (bytes > marked);
    struct block *b = allocate(c, sizeof *b + n * sizeof b->u[0]);
    *b = (struct block){.rip = rip, .count = count, .mode = c->mode, .offset = offset, .offset2 = s.offset2,
                        .limit = ARCH(c)->seg[CS].limit, .bytes = (uint16_t)bytes, .uops = (uint16_t)n};
    if (!(c->mode & MODE_SINGLE)) {
        block_optimise(k->uops, n, k->decoded);
    }
    memcpy(b->u, k->uops, n * sizeof b->u[0]);
    for (unsigned i = 0; i < n; i++) {
        const struct oprow *row = k->decoded[i].row;
        if (b->u[i].fn == op_goto || (row && (row->imm == IMM_JB || row->imm == IMM_JZ))) {
            uint64_t target = b->u[i].imm;
            if (!row && !(c->mode & MODE_64)) {
                target = c->mode & MODE_D ? (uint32_t)target : (uint16_t)target;
            }
            b->u[i].imm = (uint64_t)(uintptr_t)make_stub(c, b, &b->u[i], target);
        }
    }
    unsigned slot = hash(offset, rip, c->mode);
    b->hash_next = k->hash[slot];
    k->hash[slot] = b;
    b->page_next = k->page[offset / SEG_PAGE];
    k->page[offset / SEG_PAGE] = b;
    if (s.offset2 < SEG_NO_OFFSET - 1) {
        b->straddle_next = k->straddle[s.offset2 / SEG_PAGE];
        k->straddle[s.offset2 / SEG_PAGE] = b;
    }
    c->s.blocks_translated++;
    return b;
}

/* ---- dropping ---- */

static void drop(struct cpu *c, struct block *b)
{
    struct block **at = &c->blocks->hash[hash(b->offset, b->rip, b->mode)];
    while (*at && *at != b) {
        at = &(*at)->hash_next;
    }
    if (*at) {
        *at = b->hash_next;
    }
    struct jump_entry *e = jump_slot(c, b->rip);
    if (e->block == b) {
        e->key = 0;
    }
    for (unsigned i = 0; i < b->uops; i++) {
        b->u[i].fn = op_stale;
    }
    c->s.blocks_dropped++;
}

void blocks_drop_page(struct cpu *c, uint64_t page)
{
    struct block_cache *k = c->blocks;
    if (page >= c->seg->guest_pages) {
        return;
    }
    struct block *b = k->page[page], *s = k->straddle[page];
    k->page[page] = k->straddle[page] = NULL;
    for (; b; b = b->page_next) {
        drop(c, b);
    }
    for (; s; s = s->straddle_next) {
        drop(c, s);
    }
}

void blocks_drop_all(struct cpu *c)
{
    struct block_cache *k = c->blocks;
    k->used = 0;
    k->generation++;
    memset(k->hash, 0, sizeof k->hash);
    madvise(k->page, c->seg->guest_pages * sizeof k->page[0], MADV_DONTNEED);
    madvise(k->straddle, c->seg->guest_pages * sizeof k->straddle[0], MADV_DONTNEED);
    memset(c->jump, 0, sizeof c->jump);
}

static void jump_key_update(struct cpu *c)
{
    unsigned low = c->jump_key & 0xff;
    c->jump_key = c->jump_generation[low & MODE_USER ? 1 : 0] << 8 | low;
}

void jump_cache_flush_user(struct cpu *c)
{
    c->jump_generation[1]++;
    jump_key_update(c);
}

void jump_cache_flush(struct cpu *c)
{
    c->jump_generation[0]++;
    jump_cache_flush_user(c);
}

void code_written(struct cpu *c, uint64_t offset, unsigned n)
{
    if (seg_code_written(c->seg, offset, n)) {
        blocks_drop_page(c, offset / SEG_PAGE);
    }
}

/* A handler's last step where its store has hit a page with code: code_check() and NEXT() */
COLD void stored_into_code(struct cpu *c, const struct uop *u, uint64_t offset, unsigned n)
{
    code_written(c, offset, n);
    NEXT(c, u);
}

/* ---- life ---- */

static void *zero_pages(size_t n)
{
    void *p = mmap(NULL, n, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    return p == MAP_FAILED ? NULL : p;
}

int blocks_create(struct cpu *c)
{
    struct block_cache *k = zero_pages(sizeof *k);
    if (!k) {
        return -1;
    }
    c->blocks = k;
    k->arena = zero_pages(ARENA_BYTES);
    k->page = zero_pages(c->seg->guest_pages * sizeof k->page[0]);
    k->straddle = zero_pages(c->seg->guest_pages * sizeof k->straddle[0]);
    jump_cache_flush(c); /* generation 0 is that of empty slots */
    return k->arena && k->page && k->straddle ? 0 : -1;
}

void blocks_destroy(struct cpu *c)
{
    struct block_cache *k = c->blocks;
    if (k) {
        munmap(k->arena, ARENA_BYTES);
        munmap(k->page, c->seg->guest_pages * sizeof k->page[0]);
        munmap(k->straddle, c->seg->guest_pages * sizeof k->straddle[0]);
        munmap(k, sizeof *k);
        c->blocks = NULL;
    }
}
