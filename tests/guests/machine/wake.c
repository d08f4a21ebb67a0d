/*
 * Lost wake-ups: processors that halt and wake one another, and timers that are due while they fall asleep. A lost
 * one shows as a round that never ends.
 */
#include "guest.h"

#define CPUS 4
#define ROUNDS 100000u
#define VECTOR_PING 0x41
#define VECTOR_TIMER 0x42
#define VECTOR_BURST 0x43
#define MSR_TSC_DEADLINE 0x6e0
#define MODE_DEADLINE (2u << 17)

static volatile u32 pings[MAX_CPUS], timers[MAX_CPUS], bursts[MAX_CPUS];
static volatile u32 rounds_done[MAX_CPUS];

static void on_ping(struct frame *f)
{
    (void)f;
    pings[cpu_index()]++;
    apic_eoi();
}

static void on_timer(struct frame *f)
{
    (void)f;
    timers[cpu_index()]++;
    apic_eoi();
}

static void on_burst(struct frame *f)
{
    (void)f;
    bursts[cpu_index()]++;
    apic_eoi();
}

static void sleep_until(volatile u32 *word, u32 value)
{
    for (;;) {
        cli();
        if (*word >= value) {
            sti();
            return;
        }
        sti_hlt();
    }
}

/* Pairs 0-1 and 2-3: each IPI is an interrupt of its own, as the next is sent only after it was taken. */
static void ping_pong(int cpu)
{
    u32 partner = (u32)cpu ^ 1;
    for (u32 i = 1; i <= ROUNDS; i++) {
        if (!(cpu & 1)) {
            ipi(partner, ICR_FIXED | VECTOR_PING);
        }
        sleep_until(&pings[cpu], i);
        if (cpu & 1) {
            ipi(partner, ICR_FIXED | VECTOR_PING);
        }
        rounds_done[cpu] = i;
    }
}

/* Deadlines from the past to 60 us ahead, and sleep; with IPIs of a neighbour in between. */
static void short_timers(int cpu)
{
    u64 seed = (u64)cpu + 1;
    apic_write(APIC_LVT_TIMER, VECTOR_TIMER | MODE_DEADLINE);
    asm volatile("mfence" : : : "memory");
    for (u32 i = 1; i <= 5000; i++) {
        u64 random = random64(&seed);
        wrmsr(MSR_TSC_DEADLINE, rdtsc() + (random & 0xffff));
        if (random >> 60 == 0) {
            ipi((u32)(cpu + 1) % CPUS, ICR_FIXED | VECTOR_PING);
        }
        sleep_until(&timers[cpu], i);
        rounds_done[cpu] = i;
    }
}

/* Everybody sends to everybody; a vector that is already pending may merge, so each sender waits for its own mark. */
static void crossfire(int cpu)
{
    for (u32 i = 1; i <= 3000; i++) {
        u32 target = (u32)cpu ^ (1 + i % 3);
        u32 before = bursts[target];
        ipi(target, ICR_FIXED | VECTOR_BURST);
        while (bursts[target] == before) {
            cli();
            sti_hlt(); /* woken by the others' IPIs and by our timer */
        }
        rounds_done[cpu] = i;
    }
}

static void periodic_timer(int cpu)
{
    (void)cpu;
    apic_write(APIC_TIMER_DIVIDE, 0xb);
    apic_write(APIC_LVT_TIMER, VECTOR_TIMER | 1u << 17);
    apic_write(APIC_TIMER_INITIAL, 100000);
}

static void stop_timer(int cpu)
{
    (void)cpu;
    apic_write(APIC_TIMER_INITIAL, 0);
}

static void run(const char *name, int cpus, void (*work)(int cpu))
{
    memset((void *)pings, 0, sizeof pings);
    memset((void *)timers, 0, sizeof timers);
    memset((void *)bursts, 0, sizeof bursts);
    memset((void *)rounds_done, 0, sizeof rounds_done);
    u64 begin = time_ns();
    bool all = cpus_run(cpus, work);
    u64 each = (time_ns() - begin) / (rounds_done[0] ? rounds_done[0] : 1);
    print("%s: %lu ns a round\n", name, each);
    check(name, all, "rounds %u %u %u %u", rounds_done[0], rounds_done[1], rounds_done[2], rounds_done[3]);
}

int main(void)
{
    if (cpus_start(CPUS) != CPUS) {
        die("a processor does not start");
    }
    handlers[VECTOR_PING] = on_ping;
    handlers[VECTOR_TIMER] = on_timer;
    handlers[VECTOR_BURST] = on_burst;
    sti();
    run("ping_pong", 2, ping_pong);
    run("short_timers", CPUS, short_timers);
    cpus_run(CPUS, periodic_timer);
    run("crossfire", CPUS, crossfire);
    cpus_run(CPUS, stop_timer);
    return 0;
}
