/*
 * The committed state of a device host, and its output to the coordinator.
 *
 * Why a commit is all or nothing. A record has two halves. One is valid: that with the greatest stamp <= seq. The host
 * writes only the other one, stamps it seq + 1, does so for each record that an event has changed, and then stores seq + 1
 * (release). Before that store every valid half is what it was before the event; after it every record that was
 * written is valid in its new half, and the others in their old one: their stamps are at most seq. So the one store of an
 * aligned word is the commit.
 *
 * Who reads. Nobody but a successor, and only once the host is dead. All stores that a dead process has executed are
 * there, in program order as far as release demands it: SIGKILL takes effect between two instructions, and the coordinator,
 * which starts the successor, has learned of the death from the kernel. So a reader sees no half-written word, and if it sees
 * seq, it sees the halves with it.
 *
 * What was stamped seq + 1 by a host that died before its commit would become valid by the first commit of its
 * successor, which need not write the same records. state_recover() takes such stamps away first. It may
 * itself die anywhere and be done again.
 *
 * Output. Frames (length, bytes) are written behind output_head, where nobody reads, before the commit; the commit holds the new
 * head; output_show() stores it after. A successor shows the committed head again. So a frame is seen once, if and
 * only if its event is committed. The bell: the host stores head, then reads tail; the coordinator stores tail, then reads head
 * again (both seq_cst, as in attention.c): either it finds the new frames, or the host finds that it had read all.
 */
#include <string.h>

#include "seg.h"

static struct state_area *area_of(const struct seg_header *seg, uint32_t host)
{
    return seg_at(seg, seg->state_offset + seg->state_stride * (host % SEG_MAX_HOSTS));
}

/* The half that is valid, or the one that is not when it is to be written; -1: none is valid. */
static int valid_half(const struct state_area *a, const struct state_slot *s)
{
    int best = -1;
    for (int half = 0; half < 2; half++) {
        if (s->stamp[half] && s->stamp[half] <= a->seq && (best < 0 || s->stamp[half] > s->stamp[best])) {
            best = half;
        }
    }
    return best;
}

static uint8_t *half_at(struct state_area *a, const struct state_slot *s, int half)
{
    return (uint8_t *)a + s->offset + s->room * (uint64_t)half;
}

int state_slot(struct seg_header *seg, uint32_t host, const char *name, uint64_t room)
{
    struct state_area *a = area_of(seg, host);
    for (uint32_t i = 0; i < a->slots; i++) {
        if (!strncmp((const char *)a->slot[i].name, name, SEG_NAME_LEN)) {
            return a->slot[i].room >= room ? (int)i : -1;
        }
    }
    if (!a->used) {
        a->used = sizeof *a;
    }
    room = (room + 63) & ~UINT64_C(63);
    if (a->slots >= SEG_STATE_SLOTS || room > SEG_STATE_ROOM || a->used + 2 * room > SEG_STATE_ROOM || strlen(name) >= SEG_NAME_LEN) {
        return -1;
    }
    struct state_slot *s = &a->slot[a->slots];
    memset(s, 0, sizeof *s);
    strcpy((char *)s->name, name);
    s->offset = a->used;
    s->room = room;
    a->used += 2 * room;
    seg_store(&a->slots, a->slots + 1);
    return (int)a->slots - 1;
}

int state_put(struct seg_header *seg, uint32_t host, int slot, const void *data, uint64_t n)
{
    struct state_area *a = area_of(seg, host);
    if (slot < 0 || (uint32_t)slot >= a->slots || n > a->slot[slot].room) {
        return -1;
    }
    struct state_slot *s = &a->slot[slot];
    int half = valid_half(a, s) == 0 ? 1 : 0;
    memcpy(half_at(a, s, half), data, n);
    s->length[half] = n;
    s->stamp[half] = a->seq + 1;
    return 0;
}

void state_commit(struct seg_header *seg, uint32_t host)
{
    struct state_area *a = area_of(seg, host);
    seg_store(&a->seq, a->seq + 1);
}

uint64_t state_recover(struct seg_header *seg, uint32_t host)
{
    struct state_area *a = area_of(seg, host);
    for (uint32_t i = 0; i < a->slots; i++) {
        for (int half = 0; half < 2; half++) {
            if (a->slot[i].stamp[half] > a->seq) {
                a->slot[i].stamp[half] = 0;
            }
        }
    }
    return a->seq;
}

const void *state_get(const struct seg_header *seg, uint32_t host, int slot, uint64_t *n)
{
    struct state_area *a = area_of(seg, host);
    if (slot < 0 || (uint32_t)slot >= a->slots) {
        return NULL;
    }
    const struct state_slot *s = &a->slot[slot];
    int half = valid_half(a, s);
    if (half < 0) {
        return NULL;
    }
    *n = s->length[half];
    return half_at(a, s, half);
}

/* ---- output ---- */
static uint8_t *output_of(const struct seg_header *seg, uint32_t host) { return (uint8_t *)area_of(seg, host) + SEG_STATE_ROOM; }

static void ring_copy_in(uint8_t *ring, uint64_t at, const void *from, uint64_t n)
{
    uint64_t begin = at % SEG_OUTPUT_ROOM, first = n < SEG_OUTPUT_ROOM - begin ? n : SEG_OUTPUT_ROOM - begin;
    memcpy(ring + begin, from, first);
    memcpy(ring, (const uint8_t *)from + first, n - first);
}

static void ring_copy_out(const uint8_t *ring, uint64_t at, void *to, uint64_t n)
{
    uint64_t begin = at % SEG_OUTPUT_ROOM, first = n < SEG_OUTPUT_ROOM - begin ? n : SEG_OUTPUT_ROOM - begin;
    memcpy(to, ring + begin, first);
    memcpy((uint8_t *)to + first, ring, n - first);
}

int output_put(struct seg_header *seg, uint32_t host, uint64_t at, const void *frame, uint32_t n)
{
    uint64_t whole = sizeof n + (uint64_t)n;
    if (at + whole - seg_load_sc(&seg_host(seg, host)->output_tail) > SEG_OUTPUT_ROOM) {
        return 0;
    }
    ring_copy_in(output_of(seg, host), at, &n, sizeof n);
    ring_copy_in(output_of(seg, host), at + sizeof n, frame, n);
    return 1;
}

int output_show(struct seg_header *seg, uint32_t host, uint64_t head)
{
    struct host_block *h = seg_host(seg, host);
    uint64_t before = h->output_head;
    seg_store_sc(&h->output_head, head);
    return before != head && seg_load_sc(&h->output_tail) >= before;
}

int64_t output_take(struct seg_header *seg, uint32_t host, void *frame)
{
    struct host_block *h = seg_host(seg, host);
    uint64_t tail = h->output_tail, left = seg_load_sc(&h->output_head) - tail;
    uint32_t n;
    if (left < sizeof n || left > SEG_OUTPUT_ROOM) {
        return -1;
    }
    ring_copy_out(output_of(seg, host), tail, &n, sizeof n);
    if (n > left - sizeof n) {
        return -1; /* a host that has gone mad: nothing of it is believed */
    }
    ring_copy_out(output_of(seg, host), tail + sizeof n, frame, n);
    seg_store_sc(&h->output_tail, tail + sizeof n + n);
    return n;
}
