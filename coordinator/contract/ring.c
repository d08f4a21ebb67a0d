/*
 * The posted ring of a device host: filled by all vCPUs in the order of tickets from one counter,
 * applied by the host in that order. Ticket t lives in slot t % SEG_RING_SLOTS; its stamp is t + 1
 * once it is whole, so the host sees a hole (a ticket drawn, not filled yet) as "not there yet".
 *
 * Doorbell. vCPU: stamps, then reads host.sleeping. Host: writes sleeping = 1, then looks at the
 * stamp of its next ticket, then polls. As in attention.c one of them sees the other. Who swaps
 * sleeping from 1 to 0 writes the eventfd, so a burst rings once.
 *
 * Hazard. A posted write raises hazard[h] to ticket + 1 before the instruction ends, so whoever is
 * told of the write by memory sees it as well. The host stores shadows before `applied` (release),
 * so a reader that finds applied >= hazard[h] (acquire) reads a shadow of after the write.
 *
 * All shadows of an event at once. A guest that polls one register and then reads another (bus-master status, then the
 * drive's) must not find the first of after an event and the second of before. The host writes storing = 1, the shadows,
 * storing = 0; a vCPU reads storing, and only where it is 0 a shadow. Who has read a shadow that was stored in an
 * event reads, for the next one, storing after that: still 1, so it asks the host, or 0 again, when all are there.
 *
 * A writer that dies between drawing a ticket and stamping it would leave a hole that the host waits at for ever. So a
 * vCPU says first that it is about to draw (posting), then which ticket it has (posting_ticket), and takes both back once the
 * stamp is there. Whoever mends looks, for a ticket that has been drawn and has no stamp, whether a living vCPU claims it, and
 * then at the stamp again. One that has drawn it claims it, or is about to (posting without a ticket: look again later), or has
 * stamped it before it took the claim back, which the second look sees. Else its writer is dead, and a write that goes nowhere
 * takes the place of one that was never made.
 */
#include <sched.h>
#include <time.h>
#include <unistd.h>

#include "seg.h"

#define YIELDS 100
#define NAP_NS 20000

uint64_t ring_ticket(struct seg_header *seg, uint32_t host) { return seg_add(&seg_host(seg, host)->next_ticket, 1); }

uint64_t ring_claim(struct seg_header *seg, uint32_t vcpu, uint32_t host)
{
    struct vcpu_block *v = seg_vcpu(seg, vcpu);
    seg_store(&v->posting, host + 1);
    uint64_t ticket = ring_ticket(seg, host);
    seg_store(&v->posting_ticket, ticket + 1);
    return ticket;
}

void ring_claimed(struct seg_header *seg, uint32_t vcpu)
{
    struct vcpu_block *v = seg_vcpu(seg, vcpu);
    seg_store(&v->posting_ticket, (uint64_t)0);
    seg_store(&v->posting, 0u);
}

int ring_full(const struct seg_header *seg, uint32_t host, uint64_t ticket)
{
    return ticket - seg_load(&seg_host(seg, host)->applied) >= SEG_RING_SLOTS;
}

void ring_wait(const struct seg_header *seg, uint32_t host, uint64_t ticket)
{
    for (int looks = 0; ring_full(seg, host, ticket); looks++) {
        if (looks < YIELDS) {
            sched_yield();
        } else {
            nanosleep(&(struct timespec){0, NAP_NS}, NULL);
        }
    }
}

static void raise_to(uint64_t *word, uint64_t value)
{
    uint64_t seen = seg_load(word);
    while (seen < value && !__atomic_compare_exchange_n(word, &seen, value, true, __ATOMIC_SEQ_CST, __ATOMIC_RELAXED)) {
    }
}

void ring_put(struct seg_header *seg, uint32_t host, uint64_t ticket, const struct posted_entry *entry, uint32_t hazard, int doorbell)
{
    struct host_block *h = seg_host(seg, host);
    struct posted_entry *slot = &h->ring[ticket % SEG_RING_SLOTS];
    slot->guest_ns = entry->guest_ns;
    slot->addr = entry->addr;
    slot->value = entry->value;
    slot->space = entry->space;
    slot->width = entry->width;
    slot->vcpu = entry->vcpu;
    slot->device = entry->device;
    if (hazard && hazard < SEG_MAX_HAZARDS) {
        raise_to(&h->hazard[hazard], ticket + 1);
    }
    seg_store_sc(&slot->stamp, ticket + 1);
    if (doorbell >= 0 && seg_load_sc(&h->sleeping) && seg_swap(&h->sleeping, 0)) {
        uint64_t one = 1;
        ssize_t written = write(doorbell, &one, sizeof one);
        (void)written; /* fails only where the counter is full: then it rings already */
    }
}

void ring_post(struct seg_header *seg, uint32_t host, const struct posted_entry *entry, uint32_t hazard, int doorbell)
{
    uint64_t ticket = ring_ticket(seg, host);
    ring_wait(seg, host, ticket);
    ring_put(seg, host, ticket, entry, hazard, doorbell);
}

int ring_hazard(const struct seg_header *seg, uint32_t host, uint32_t hazard)
{
    const struct host_block *h = seg_host(seg, host);
    return hazard && hazard < SEG_MAX_HAZARDS && seg_load(&h->hazard[hazard]) > seg_load(&h->applied);
}

uint64_t ring_next_ticket(const struct seg_header *seg, uint32_t host) { return seg_load_sc(&seg_host(seg, host)->next_ticket); }

int ring_take(const struct seg_header *seg, uint32_t host, uint64_t ticket, struct posted_entry *out)
{
    const struct posted_entry *slot = &seg_host(seg, host)->ring[ticket % SEG_RING_SLOTS];
    if (seg_load_sc(&slot->stamp) != ticket + 1) {
        return 0;
    }
    *out = *slot;
    return 1;
}

void ring_applied(struct seg_header *seg, uint32_t host, uint64_t ticket) { seg_store(&seg_host(seg, host)->applied, ticket); }

int ring_sleep(struct seg_header *seg, uint32_t host, uint64_t ticket)
{
    struct host_block *h = seg_host(seg, host);
    seg_store_sc(&h->sleeping, 1);
    return seg_load_sc(&h->ring[ticket % SEG_RING_SLOTS].stamp) == ticket + 1;
}

void ring_awake(struct seg_header *seg, uint32_t host) { seg_store_sc(&seg_host(seg, host)->sleeping, 0); }

void ring_storing(struct seg_header *seg, uint32_t host, int storing) { seg_store_sc(&seg_host(seg, host)->storing, (uint32_t)storing); }

int ring_stores(const struct seg_header *seg, uint32_t host) { return seg_load(&seg_host(seg, host)->storing) != 0; }

#define NOWHERE SEG_PORTS /* a port that no device can have */

static bool stamped(const struct host_block *h, uint64_t ticket)
{
    return seg_load_sc(&h->ring[ticket % SEG_RING_SLOTS].stamp) == ticket + 1;
}

/* Whether a living vCPU has drawn this ticket, or may have and has not said so yet */
static bool is_claimed(struct seg_header *seg, uint32_t host, uint64_t ticket, uint32_t dead)
{
    for (uint32_t i = 0; i < seg->vcpus; i++) {
        const struct vcpu_block *v = seg_vcpu(seg, i);
        if (!(dead >> i & 1) && seg_load_sc(&v->posting) == host + 1) {
            uint64_t drawn = seg_load_sc(&v->posting_ticket);
            if (drawn == 0 || drawn == ticket + 1) {
                return true;
            }
        }
    }
    return false;
}

int ring_mend(struct seg_header *seg, uint32_t host, uint32_t dead, int doorbell)
{
    const struct host_block *h = seg_host(seg, host);
    const struct posted_entry nothing = {.guest_ns = guest_now(seg), .addr = NOWHERE, .width = 1};
    uint64_t end = ring_next_ticket(seg, host);
    int open = 0;
    for (uint64_t ticket = seg_load_sc(&h->applied); ticket != end; ticket++) {
        if (ring_full(seg, host, ticket)) {
            return 1;
        }
        if (stamped(h, ticket)) {
            continue;
        }
        if (is_claimed(seg, host, ticket, dead)) {
            open = 1;
        } else if (!stamped(h, ticket)) {
            ring_put(seg, host, ticket, &nothing, 0, doorbell);
        }
    }
    return open;
}
