/*
 * Guest time as a pure function of CLOCK_MONOTONIC, and the counters that are a pure function of it.
 * Both are read under sequence locks: an odd number means a writer is inside.
 */
#include <time.h>

#include "seg.h"

#define NS_PER_MS 1000000u

static uint64_t host_now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static uint32_t read_begin(const uint32_t *seq)
{
    uint32_t s;
    while ((s = seg_load(seq)) & 1) {
        seg_pause();
    }
    return s;
}

static bool read_again(const uint32_t *seq, uint32_t s)
{
    atomic_thread_fence(memory_order_acquire);
    return __atomic_load_n(seq, __ATOMIC_RELAXED) != s;
}

/* Odd as well where another writer has died inside. */
static void write_begin(uint32_t *seq)
{
    __atomic_store_n(seq, (*seq + 1) | 1, __ATOMIC_RELAXED);
    atomic_thread_fence(memory_order_seq_cst);
}

static void write_end(uint32_t *seq) { seg_store(seq, *seq + 1); }

static struct timebase timebase(const struct seg_header *seg)
{
    const volatile struct timebase *t = &seg->time;
    struct timebase out;
    uint32_t s;
    do {
        s = read_begin(&seg->time.seq);
        out = *t;
    } while (read_again(&seg->time.seq, s));
    return out;
}

uint64_t guest_now(const struct seg_header *seg)
{
    struct timebase t = timebase(seg);
    return t.running ? t.guest_ns + (host_now() - t.host_ns) : t.guest_ns;
}

/* floor(ns * khz / 10^6) without overflow: khz is at most some 10^7 */
static uint64_t scale(uint64_t ns, uint64_t khz) { return ns / NS_PER_MS * khz + ns % NS_PER_MS * khz / NS_PER_MS; }

uint64_t tsc_from_ns(const struct seg_header *seg, uint64_t guest_ns) { return scale(guest_ns, seg->time.tsc_khz); }
uint64_t guest_tsc(const struct seg_header *seg) { return scale(guest_now(seg), seg->time.tsc_khz); }

uint64_t ns_from_tsc(const struct seg_header *seg, uint64_t tsc)
{
    uint64_t khz = seg->time.tsc_khz ? seg->time.tsc_khz : 1;
    uint64_t ms = tsc / khz;
    if (ms >= UINT64_MAX / NS_PER_MS) {
        return SEG_NO_OFFSET - 1; /* centuries away: never, but armed */
    }
    return ms * NS_PER_MS + (tsc % khz * NS_PER_MS + khz - 1) / khz;
}

uint64_t guest_host_deadline(const struct seg_header *seg, uint64_t guest_ns)
{
    struct timebase t = timebase(seg);
    if (!t.running || guest_ns == SEG_NO_OFFSET) {
        return SEG_NO_OFFSET;
    }
    if (guest_ns <= t.guest_ns) {
        return t.host_ns;
    }
    uint64_t ahead = guest_ns - t.guest_ns;
    return ahead < SEG_NO_OFFSET - 1 - t.host_ns ? t.host_ns + ahead : SEG_NO_OFFSET - 1;
}

uint64_t time_source_at(const struct seg_header *seg, uint32_t source, uint64_t guest_ns)
{
    if (source >= SEG_MAX_TIME_SOURCES) {
        return SEG_NO_OFFSET;
    }
    const struct time_source *p = &seg->time_source[source];
    struct time_source t;
    uint32_t s;
    do {
        s = read_begin(&p->seq);
        t = *(const volatile struct time_source *)p;
    } while (read_again(&p->seq, s));
    if (!t.running) {
        return t.frozen & t.mask;
    }
    /* the difference wraps: a counter started at a value lies before guest time 0 */
    return (uint64_t)((unsigned __int128)(guest_ns - t.offset_ns) * t.mul / (t.div ? t.div : 1)) & t.mask;
}

uint64_t time_source_read(const struct seg_header *seg, uint32_t source)
{
    return time_source_at(seg, source, guest_now(seg));
}

void time_source_set(struct seg_header *seg, uint32_t source, uint32_t running, uint64_t offset_ns, uint64_t frozen)
{
    struct time_source *t = &seg->time_source[source % SEG_MAX_TIME_SOURCES];
    if (t->running == running && t->offset_ns == offset_ns && t->frozen == frozen && !(t->seq & 1)) {
        return;
    }
    write_begin(&t->seq);
    t->running = running;
    t->offset_ns = offset_ns;
    t->frozen = frozen;
    write_end(&t->seq);
}

void time_source_shape(struct seg_header *seg, uint32_t source, uint64_t mul, uint64_t div, uint64_t mask)
{
    struct time_source *t = &seg->time_source[source % SEG_MAX_TIME_SOURCES];
    write_begin(&t->seq);
    t->mul = mul;
    t->div = div;
    t->mask = mask;
    write_end(&t->seq);
}

void guest_time_start(struct seg_header *seg)
{
    struct timebase *t = &seg->time;
    if (t->running) {
        return;
    }
    write_begin(&t->seq);
    t->host_ns = host_now();
    t->running = 1;
    write_end(&t->seq);
    vcpu_attend_all(seg, ATTN_TIMER); /* who sleeps without a deadline computes one now */
}

void guest_time_stop(struct seg_header *seg)
{
    struct timebase *t = &seg->time;
    if (!t->running) {
        return;
    }
    write_begin(&t->seq);
    t->guest_ns += host_now() - t->host_ns;
    t->running = 0;
    write_end(&t->seq);
}

void guest_time_set(struct seg_header *seg, uint64_t guest_ns, uint64_t wall_ns, uint64_t tsc_khz)
{
    struct timebase *t = &seg->time;
    write_begin(&t->seq);
    t->guest_ns = guest_ns;
    t->wall_ns = wall_ns;
    t->tsc_khz = tsc_khz;
    write_end(&t->seq);
}
