/*
 * Guest memory for devices, and writes into translated code.
 *
 * Why no stale translation survives. A translator sets the line bits of a page under the page lock,
 * issues an expedited membarrier if any bit is new, unlocks, and only then reads the bytes. A writer
 * stores, then reads the bits. At the moment of the barrier on the writer's CPU the writer's load
 *   (a) is still to come: then it sees the bit, takes the page lock, pushes a code event, raises
 *       ATTN_CODE at all vCPUs and clears the page's bits; the translator drops the block when it next
 *       looks at `attention`, before it enters a block;
 *   (b) is done: then its store, earlier in program order, is drained by the barrier, and the
 *       translator reads the new bytes.
 * If in (a) the writer finds the bit cleared again, another writer has done so under the page lock,
 * after the bit was set: its event is in the log and its ATTN_CODE at the translator already. The
 * barrier stands in for a fence in every store of the guest; processes register for it
 * (seg_process_init). DMA has a fence of its own as well, once a call.
 */
#include <errno.h>
#include <linux/membarrier.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "seg.h"

#define LINE_BITS 6

int seg_process_init(void)
{
    return syscall(SYS_membarrier, MEMBARRIER_CMD_REGISTER_GLOBAL_EXPEDITED, 0, 0) < 0 ? -errno : 0;
}

uint32_t seg_allocate(uint32_t *next, uint32_t limit)
{
    uint32_t index = seg_load(next);
    while (index < limit && !__atomic_compare_exchange_n(next, &index, index + 1, true, __ATOMIC_SEQ_CST, __ATOMIC_ACQUIRE)) {
    }
    return index < limit ? index : limit;
}

void seg_shadow_set(struct seg_header *seg, uint32_t index, uint64_t value)
{
    if (index < SEG_MAX_SHADOWS) {
        seg_store(&seg_shadows(seg)[index], value);
    }
}

static void barrier(void)
{
    if (syscall(SYS_membarrier, MEMBARRIER_CMD_GLOBAL_EXPEDITED, 0, 0) < 0) {
        syscall(SYS_membarrier, MEMBARRIER_CMD_GLOBAL, 0, 0); /* slow, but there since Linux 4.3 */
    }
}

static uint32_t *page_lock(const struct seg_header *seg, uint64_t page)
{
    return &seg_code(seg)->page_lock[(page ^ page >> 10) % SEG_PAGE_LOCKS];
}

/* n > 0 bytes from an offset within a page */
static uint64_t lines_of(uint64_t offset, uint64_t n)
{
    unsigned first = offset % SEG_PAGE >> LINE_BITS, last = (offset % SEG_PAGE + n - 1) >> LINE_BITS;
    return (~UINT64_C(0) >> (63 - (last - first))) << first;
}

int seg_code_written(struct seg_header *seg, uint64_t guest_offset, uint32_t n)
{
    uint64_t page = guest_offset / SEG_PAGE;
    uint64_t *mask = &seg_code_masks(seg)[page];
    uint64_t lines = lines_of(guest_offset, n);
    if (!(seg_load(mask) & lines)) {
        return 0;
    }
    struct code_log *log = seg_code(seg);
    seg_lock(page_lock(seg, page));
    bool hit = *mask & lines;
    if (hit) {
        uint64_t ticket = seg_add(&log->head, 1);
        struct code_event *event = &log->slot[ticket % SEG_CODE_SLOTS];
        seg_store(&event->page, page);
        seg_store(&event->stamp, ticket + 1);
        vcpu_attend_all(seg, ATTN_CODE);
        seg_store_sc(mask, 0);
    }
    seg_unlock(page_lock(seg, page));
    return hit;
}

void seg_code_mark(struct seg_header *seg, uint64_t page, uint64_t lines)
{
    uint64_t *mask = &seg_code_masks(seg)[page];
    seg_lock(page_lock(seg, page));
    if (lines & ~*mask) {
        seg_store_sc(mask, *mask | lines);
        barrier();
    }
    seg_unlock(page_lock(seg, page));
}

int seg_code_next(struct seg_header *seg, uint64_t *cursor, uint64_t *page)
{
    struct code_log *log = seg_code(seg);
    uint64_t head = seg_load_sc(&log->head);
    if (*cursor == head) {
        return 0;
    }
    const struct code_event *event = &log->slot[*cursor % SEG_CODE_SLOTS];
    uint64_t stamp;
    while ((stamp = seg_load(&event->stamp)) <= *cursor && head - *cursor <= SEG_CODE_SLOTS) {
        seg_pause(); /* its ticket is drawn: filled within some instructions */
        head = seg_load_sc(&log->head);
    }
    *page = seg_load(&event->page);
    /* A writer a whole log ahead may be refilling the slot while it is read. */
    if (stamp != *cursor + 1 || seg_load_sc(&log->head) - *cursor > SEG_CODE_SLOTS) {
        *cursor = seg_load_sc(&log->head);
        return -1;
    }
    ++*cursor;
    return 1;
}

void seg_written(struct seg_header *seg, uint64_t offset, uint64_t n)
{
    uint8_t *dirty = seg_dirty(seg);
    uint64_t at = offset - seg->guest, limit = seg->guest_pages * SEG_PAGE;
    if (n == 0 || at >= limit) {
        return;
    }
    uint64_t end = n < limit - at ? at + n : limit;
    for (uint64_t page = at / SEG_PAGE; page <= (end - 1) / SEG_PAGE; page++) {
        seg_store(&dirty[page], 1);
    }
    atomic_thread_fence(memory_order_seq_cst);
    while (at < end) {
        uint64_t next = (at / SEG_PAGE + 1) * SEG_PAGE;
        uint64_t piece = (next < end ? next : end) - at;
        seg_code_written(seg, at, (uint32_t)piece);
        at += piece;
    }
}

uint64_t seg_dma_span(const struct seg_header *seg, uint64_t gpa, uint64_t n, int write, uint64_t *length)
{
    struct map_region r;
    if (!seg_map_find(seg, gpa, &r) || !(r.flags & (write ? REGION_WRITE : REGION_READ))) {
        uint64_t rest = SEG_PAGE - gpa % SEG_PAGE;
        *length = n < rest ? n : rest;
        return SEG_NO_OFFSET;
    }
    uint64_t into = gpa - r.gpa, rest = r.size - into;
    *length = n < rest ? n : rest;
    return (write ? r.write_offset : r.read_offset) + into;
}

uint64_t seg_dma_read(const struct seg_header *seg, uint64_t gpa, void *to, uint64_t n)
{
    uint64_t landed = 0, piece;
    for (uint8_t *p = to; n; n -= piece, gpa += piece, p += piece) {
        uint64_t offset = seg_dma_span(seg, gpa, n, 0, &piece);
        if (offset == SEG_NO_OFFSET) {
            memset(p, 0xff, piece);
        } else {
            memcpy(p, seg_at(seg, offset), piece);
            landed += piece;
        }
    }
    return landed;
}

uint64_t seg_dma_write(struct seg_header *seg, uint64_t gpa, const void *from, uint64_t n)
{
    uint64_t landed = 0, piece;
    for (const uint8_t *p = from; n; n -= piece, gpa += piece, p += piece) {
        uint64_t offset = seg_dma_span(seg, gpa, n, 1, &piece);
        if (offset != SEG_NO_OFFSET) {
            memcpy(seg_at(seg, offset), p, piece);
            seg_written(seg, offset, piece);
            landed += piece;
        }
    }
    return landed;
}
