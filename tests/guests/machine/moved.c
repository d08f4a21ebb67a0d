/*
 * Four processors under IPIs and timers until the host sends a byte to COM2: every IPI and every timer is waited for, so one
 * that is lost ends all, and in the end the counts of both sides are equal. Time as one processor reads it is never behind
 * what another has read before.
 *
 * On COM1: "n XXXXXXXX" now and then (hexadecimal, eight digits: rounds of processor 0), then the verdicts.
 */
#include "guest.h"

#define CPUS 4
#define VECTOR_PING 0x41
#define VECTOR_DEADLINE 0x42
#define VECTOR_ONE_SHOT 0x43
#define VECTOR_ALL 0x44
#define MSR_TSC_DEADLINE 0x6e0
#define MODE_DEADLINE (2u << 17)
#define COM2 0x2f8
#define SAY_ROUNDS 256

/* Written by the processor of the index alone; a cache line each. */
static volatile struct {
    u32 sent, taken, armed, fired, called, rounds;
    u64 seed;
    bool back; /* its clock was behind another's */
} __attribute__((aligned(64))) of[CPUS];
static volatile u32 calls;  /* IPIs to all others, by processor 0 */
static volatile u64 clock;  /* the latest time that any of them has read */
static volatile bool over;

static void look_at_clock(int cpu)
{
    u64 before = __atomic_load_n(&clock, __ATOMIC_SEQ_CST);
    asm volatile("lfence" : : : "memory"); /* RDTSC may be early */
    u64 now = rdtsc();
    if (now < before) {
        of[cpu].back = true;
    }
    while (now > before && !__atomic_compare_exchange_n(&clock, &before, now, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST)) {
    }
}

static void on_ping(struct frame *f)
{
    (void)f;
    of[cpu_index()].taken++;
    look_at_clock(cpu_index());
    apic_eoi();
}

static void on_all(struct frame *f)
{
    (void)f;
    of[cpu_index()].called++;
    apic_eoi();
}

/* From at once to 65536 ticks ahead. */
static void arm(int cpu)
{
    u64 seed = of[cpu].seed, random = random64(&seed);
    of[cpu].seed = seed;
    of[cpu].armed++;
    if (cpu & 1) {
        apic_write(APIC_TIMER_INITIAL, 1 + (random & 0xffff));
    } else {
        wrmsr(MSR_TSC_DEADLINE, rdtsc() + (random & 0xffff));
    }
}

static void on_timer(struct frame *f)
{
    int cpu = cpu_index();
    (void)f;
    of[cpu].fired++;
    look_at_clock(cpu);
    if (!over) {
        arm(cpu);
    }
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

static void send(u32 target)
{
    of[target ^ 1].sent++;
    ipi(target, ICR_FIXED | VECTOR_PING);
}

static void say(u32 value)
{
    char text[9] = "";
    for (int i = 0; i < 8; i++) {
        text[i] = "0123456789abcdef"[value >> (28 - 4 * i) & 15];
    }
    print("n %s\n", text);
}

/* Processor 0 calls all others at once, and again when all have taken it. */
static void call_all(void)
{
    if (of[1].called >= calls && of[2].called >= calls && of[3].called >= calls) {
        calls++;
        ipi(0, ICR_FIXED | ICR_OTHERS | VECTOR_ALL);
    }
}

/* Pairs 0-1 and 2-3: the next IPI is sent only after the one before was taken. The even one says which round is the last. */
static volatile bool last[CPUS];
static void work(int cpu)
{
    u32 partner = (u32)cpu ^ 1;
    apic_write(APIC_TIMER_DIVIDE, 0xb);
    apic_write(APIC_LVT_TIMER, cpu & 1 ? VECTOR_ONE_SHOT : VECTOR_DEADLINE | MODE_DEADLINE);
    asm volatile("mfence" : : : "memory"); /* SDM vol. 3 section 11.5.4.1 */
    of[cpu].seed = (u64)cpu + 1;
    arm(cpu);
    for (u32 i = 1;; i++) {
        if (!(cpu & 1)) {
            last[cpu] = over;
            send(partner);
        }
        sleep_until(&of[cpu].taken, i);
        bool end = last[cpu & ~1];
        if (cpu & 1) {
            send(partner);
        }
        of[cpu].rounds = i;
        if (end) {
            break;
        }
        if (cpu == 0) {
            call_all();
            if (i % SAY_ROUNDS == 0) {
                say(i);
                over = inb(COM2 + 5) & 1;
            }
        }
    }
    sleep_until(&of[cpu].fired, of[cpu].armed);
}

int main(void)
{
    if (cpus_start(CPUS) != CPUS) {
        die("a processor does not start");
    }
    handlers[VECTOR_PING] = on_ping;
    handlers[VECTOR_DEADLINE] = handlers[VECTOR_ONE_SHOT] = on_timer;
    handlers[VECTOR_ALL] = on_all;
    sti();
    check("all_come_back", cpus_run(CPUS, work), "rounds %u %u %u %u", of[0].rounds, of[1].rounds, of[2].rounds, of[3].rounds);
    bool called = await(of[1].called >= calls && of[2].called >= calls && of[3].called >= calls);
    delay_ns(1000000); /* whatever comes once too often has come by then */
    for (int i = 0; i < CPUS; i++) {
        check("ipis", of[i].taken == of[i ^ 1].sent && of[i].taken == of[i].rounds, "%d: %u of %u", i, of[i].taken, of[i ^ 1].sent);
        check("timers", of[i].fired == of[i].armed, "%d: %u of %u", i, of[i].fired, of[i].armed);
        check("calls", called && of[i].called == (i ? calls : 0), "%d: %u of %u", i, of[i].called, calls);
        check("clock", !of[i].back, "%d: it went back", i);
    }
    print("rounds %u %u, timers %u %u %u %u, calls %u\n", of[0].rounds, of[2].rounds, of[0].fired, of[1].fired, of[2].fired,
          of[3].fired, calls);
    return 0;
}
