/*
 * Atomic operations and memory order on four processors: exact counts after many rounds, at every alignment there is,
 * and the litmus tests of SDM vol. 3 section 9.2.3 (what TSO forbids is never seen; fences forbid the rest).
 */
#include "guest.h"

#define CPUS 4
#define ROUNDS 250000u
#define STRADDLE_ROUNDS 2000u
#define SPLIT_ROUNDS 1000u /* hosts punish locks across lines */

static u8 arena[3 * PAGE] __attribute__((aligned(4096)));
static volatile u32 gate;

/* All start at once. */
static void meet(u32 cpus)
{
    u32 target = (__atomic_fetch_add(&gate, 1, __ATOMIC_SEQ_CST) / cpus + 1) * cpus;
    while ((int)(__atomic_load_n(&gate, __ATOMIC_ACQUIRE) - target) < 0) {
        pause();
    }
}

/* ---- counters ---- */
static volatile u8 *cell;
static u32 rounds;

static void do_xadd8(void) { u64 one = 1; asm volatile("lock xaddq %0, (%1)" : "+r"(one) : "r"(cell) : "memory", "cc"); }
static void do_inc4(void) { asm volatile("lock incl (%0)" : : "r"(cell) : "memory", "cc"); }
static void do_add2(void) { asm volatile("lock addw $1, (%0)" : : "r"(cell) : "memory", "cc"); }
static void do_cmpxchg8(void)
{
    u64 old = *(volatile u64 *)cell;
    bool done;
    do {
        asm volatile("lock cmpxchgq %3, (%2)" : "=@cce"(done), "+a"(old) : "r"(cell), "r"(old + 1) : "memory");
    } while (!done);
}
static void do_cmpxchg8b(void)
{
    u32 low = *(volatile u32 *)cell, high = *(volatile u32 *)(cell + 4);
    bool done;
    do {
        u64 next = ((u64)high << 32 | low) + 1;
        asm volatile("lock cmpxchg8b (%3)" : "=@cce"(done), "+a"(low), "+d"(high)
                     : "r"(cell), "b"((u32)next), "c"((u32)(next >> 32)) : "memory");
    } while (!done);
}
static void do_cmpxchg16b(void) /* both halves count */
{
    u64 low = *(volatile u64 *)cell, high = *(volatile u64 *)(cell + 8);
    bool done;
    do {
        asm volatile("lock cmpxchg16b (%3)" : "=@cce"(done), "+a"(low), "+d"(high)
                     : "r"(cell), "b"(low + 1), "c"(high + 1) : "memory");
    } while (!done);
}
static void do_xchg(void) /* a lock made of XCHG, around a plain increment */
{
    u32 one = 1;
    for (;;) {
        asm volatile("xchgl %0, 8(%1)" : "+r"(one) : "r"(cell) : "memory");
        if (!one) {
            break;
        }
        pause();
    }
    (*(volatile u64 *)cell)++;
    barrier();
    *(volatile u32 *)(cell + 8) = 0;
}
static void do_bits(void) /* each bit is set once and cleared once; both carry the count */
{
    bool was;
    do {
        asm volatile("lock btsl $5, 8(%1)" : "=@ccc"(was) : "r"(cell) : "memory");
        if (was) {
            pause();
        }
    } while (was);
    (*(volatile u64 *)cell)++;
    asm volatile("lock btrl $5, 8(%0)" : : "r"(cell) : "memory", "cc");
}

static void (*step)(void);
static void hammer(int cpu)
{
    (void)cpu;
    void (*one)(void) = step;
    meet(CPUS);
    for (u32 i = 0; i < rounds; i++) {
        one();
    }
}

static void count(const char *name, void (*one)(void), unsigned bytes, unsigned offset, u32 times)
{
    memset(arena, 0, sizeof arena);
    cell = arena + offset;
    step = one;
    rounds = times;
    bool back = cpus_run(CPUS, hammer);
    u64 got = 0, high = 0;
    memcpy(&got, (void *)cell, bytes < 8 ? bytes : 8);
    if (bytes == 16) {
        memcpy(&high, (void *)(cell + 8), 8);
    }
    u64 want = (u64)CPUS * times & (bytes < 8 ? (1ul << 8 * bytes) - 1 : ~0ul);
    check(name, back && got == want && (bytes < 16 || high == want), "%lu and %lu, not %lu", got, high, want);
}

static void counters(void)
{
    count("xadd", do_xadd8, 8, 64, ROUNDS);
    count("inc", do_inc4, 4, 64, ROUNDS);
    count("cmpxchg", do_cmpxchg8, 8, 64, ROUNDS);
    count("cmpxchg8b", do_cmpxchg8b, 8, 64, ROUNDS);
    count("cmpxchg16b", do_cmpxchg16b, 16, 64, ROUNDS);
    count("xchg_lock", do_xchg, 8, 64, ROUNDS / 16);
    count("bit_lock", do_bits, 8, 64, ROUNDS / 16);
    count("xadd_misaligned", do_xadd8, 8, 67, ROUNDS);
    count("inc_misaligned", do_inc4, 4, 65, ROUNDS);
    count("cmpxchg8b_misaligned", do_cmpxchg8b, 8, 69, ROUNDS);
    count("xadd_two_lines", do_xadd8, 8, 124, SPLIT_ROUNDS);
    count("inc_two_lines", do_inc4, 4, 127, SPLIT_ROUNDS);
    count("add_two_lines", do_add2, 2, 127, SPLIT_ROUNDS);
    count("cmpxchg_two_lines", do_cmpxchg8, 8, 121, SPLIT_ROUNDS);
    count("xadd_two_pages", do_xadd8, 8, PAGE - 3, STRADDLE_ROUNDS);
    count("inc_two_pages", do_inc4, 4, PAGE - 1, STRADDLE_ROUNDS);
    count("cmpxchg8b_two_pages", do_cmpxchg8b, 8, PAGE - 4, STRADDLE_ROUNDS);
    count("xchg_lock_two_pages", do_xchg, 8, PAGE - 10, STRADDLE_ROUNDS);
}

/* ---- aligned and misaligned stores are not torn where hardware promises it (SDM vol. 3 section 9.1.1) ---- */
static volatile u32 torn, stop;
static volatile u64 *word;
static void tear(int cpu)
{
    meet(2);
    if (cpu == 0) {
        for (u32 i = 0; i < 200000; i++) {
            *word = i & 1 ? ~0ul : 0;
        }
        stop = 1;
    } else {
        while (!stop) {
            u64 v = *word;
            torn += v != 0 && v != ~0ul;
        }
    }
}

static void tearing(void)
{
    word = (volatile u64 *)(arena + 64);
    bool back = cpus_run(2, tear);
    stop = 0;
    u32 aligned = torn;
    word = (volatile u64 *)(arena + 67); /* within a line */
    *word = 0; /* the reader may be first, and half of what lies here was written above */
    back = back && cpus_run(2, tear);
    check("store_not_torn", back && !torn, "%u and %u torn", aligned, torn - aligned);
}

/* ---- litmus tests: one cell a round, all processors meet before it ---- */
#define LITMUS 20000u
#define QUADS 10000u
struct litmus { volatile u64 x, pad[7], y, pad2[7]; u64 r[4]; u64 pad3[4]; };
static struct litmus cells[LITMUS] __attribute__((aligned(64)));
enum { PLAIN, WITH_MFENCE, WITH_LOCK, WITH_XCHG, WITH_CPUID };
static int fence;

static inline void store_then_fence(volatile u64 *to)
{
    static u64 spare[MAX_CPUS * 8];
    u64 one = 1;
    if (fence == WITH_XCHG) {
        asm volatile("xchgq %0, (%1)" : "+r"(one) : "r"(to) : "memory");
        return;
    }
    *to = 1;
    if (fence == WITH_MFENCE) {
        asm volatile("mfence" : : : "memory");
    } else if (fence == WITH_LOCK) {
        asm volatile("lock orq $0, (%0)" : : "r"(&spare[cpu_index() * 8]) : "memory", "cc");
    } else if (fence == WITH_CPUID) {
        serialize();
    }
}

static void store_buffering(int cpu)
{
    for (u32 i = 0; i < LITMUS; i++) {
        struct litmus *c = &cells[i];
        meet(2);
        store_then_fence(cpu ? &c->y : &c->x);
        c->r[cpu] = cpu ? c->x : c->y;
    }
}

static void message_passing(int cpu)
{
    for (u32 i = 0; i < LITMUS; i++) {
        struct litmus *c = &cells[i];
        meet(2);
        if (cpu) {
            c->x = 1;
            c->y = 1;
        } else {
            c->r[0] = c->y;
            c->r[1] = c->x;
        }
    }
}

static void load_buffering(int cpu)
{
    for (u32 i = 0; i < LITMUS; i++) {
        struct litmus *c = &cells[i];
        meet(2);
        c->r[cpu] = cpu ? c->x : c->y;
        barrier();
        *(cpu ? &c->y : &c->x) = 1;
    }
}

/* Two write, two read in opposite order: all see the writes in one order. */
static void independent_reads(int cpu)
{
    for (u32 i = 0; i < QUADS; i++) {
        struct litmus *c = &cells[i];
        meet(4);
        switch (cpu) {
        case 0: c->x = 1; break;
        case 1: c->y = 1; break;
        case 2: c->r[0] = c->x; c->r[1] = c->y; break;
        default: c->r[2] = c->y; c->r[3] = c->x;
        }
    }
}

/* Stores reach another processor in order, also through a third (transitivity). */
static void causality(int cpu)
{
    for (u32 i = 0; i < QUADS; i++) {
        struct litmus *c = &cells[i];
        meet(3);
        switch (cpu) {
        case 0: c->x = 1; break;
        case 1:
            c->r[0] = c->x;
            c->y = 1;
            break;
        default: c->r[1] = c->y; c->r[2] = c->x;
        }
    }
}

static void litmus(const char *name, int cpus, u32 rounds_of_it, void (*work)(int cpu), bool (*forbidden)(const struct litmus *))
{
    memset(cells, 0, sizeof cells);
    gate = 0;
    bool back = cpus_run(cpus, work);
    u32 seen = 0;
    for (u32 i = 0; i < rounds_of_it; i++) {
        seen += forbidden(&cells[i]);
    }
    check(name, back && !seen, "seen %u times", seen);
}

static bool both_zero(const struct litmus *c) { return !c->r[0] && !c->r[1]; }
static bool both_one(const struct litmus *c) { return c->r[0] && c->r[1]; }
static bool flag_without_data(const struct litmus *c) { return c->r[0] && !c->r[1]; }
static bool two_orders(const struct litmus *c) { return c->r[0] && !c->r[1] && c->r[2] && !c->r[3]; }
static bool no_cause(const struct litmus *c) { return c->r[0] && c->r[1] && !c->r[2]; }
static bool never(const struct litmus *c) { (void)c; return false; }

static void order(void)
{
    static const char *const names[] = {"", "sb_mfence", "sb_lock", "sb_xchg", "sb_cpuid"};
    fence = PLAIN;
    litmus("sb_runs", 2, LITMUS, store_buffering, never);
    u32 relaxed = 0;
    for (u32 i = 0; i < LITMUS; i++) {
        relaxed += both_zero(&cells[i]);
    }
    print("store buffering without a fence: %u of %u\n", relaxed, LITMUS); /* allowed, not demanded */
    for (fence = WITH_MFENCE; fence <= WITH_CPUID; fence++) {
        litmus(names[fence], 2, LITMUS, store_buffering, both_zero);
    }
    litmus("mp", 2, LITMUS, message_passing, flag_without_data);
    litmus("lb", 2, LITMUS, load_buffering, both_one);
    litmus("iriw", 4, QUADS, independent_reads, two_orders);
    litmus("causality", 3, QUADS, causality, no_cause);
}

int main(void)
{
    if (cpus_start(CPUS) != CPUS) {
        die("a processor does not start");
    }
    sti();
    counters();
    tearing();
    order();
    return 0;
}
