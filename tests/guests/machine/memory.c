/*
 * Paging: faults in the middle of repeated string instructions, accessed and dirty bits, and what other processors'
 * translations do when a page moves.
 */
#include "guest.h"

#define CPUS 4
#define VECTOR_SHOOT 0x45
#define VECTOR_NUDGE 0x46

/* ---- faults ---- */
static u8 frames[8][PAGE] __attribute__((aligned(4096)));
static struct { u64 cr2, error, rcx, rsi, rdi, rip, count; } fault;

static void on_page_fault(struct frame *f)
{
    u64 at = read_cr2();
    if (at < WINDOW || at >= WINDOW + 8 * PAGE) {
        die("page fault at %lx, rip %lx error %lx", at, f->rip, f->error);
    }
    fault.cr2 = at;
    fault.error = f->error;
    fault.rcx = f->rcx;
    fault.rsi = f->rsi;
    fault.rdi = f->rdi;
    fault.rip = f->rip;
    fault.count++;
    unsigned page = (unsigned)((at - WINDOW) / PAGE);
    window_map(page, (u64)frames[page], PTE_PRESENT | PTE_WRITE);
}

/* Pages 0 to 3 of the window; only those in `present` are mapped. */
static void set_window(unsigned present)
{
    for (unsigned page = 0; page < 4; page++) {
        window_map(page, (u64)frames[page], present >> page & 1 ? PTE_PRESENT | PTE_WRITE : 0);
        invlpg((void *)(WINDOW + page * PAGE));
    }
    memset(&fault, 0, sizeof fault);
}

static u8 source[2 * PAGE], copy[2 * PAGE];

static void fill(void)
{
    u64 seed = 88172645463325252;
    for (unsigned i = 0; i < sizeof source; i++) {
        source[i] = (u8)(random64(&seed) >> 32);
    }
    memset(frames, 0, sizeof frames);
}

#define BEFORE 100u /* bytes before the page that faults */

#define MOVS(name, letter, width, misalign)                                                                              \
    static void name(void)                                                                                               \
    {                                                                                                                    \
        fill();                                                                                                          \
        set_window(1);                                                                                                   \
        u64 to = WINDOW + PAGE - BEFORE + misalign, from = (u64)source, items = 1024 / width, n = items;                 \
        u64 whole = (BEFORE - misalign) / width; /* items that end before the page */                                    \
        u64 start = to;                                                                                                  \
        asm volatile("rep movs" letter : "+D"(to), "+S"(from), "+c"(n) : : "memory");                                    \
        bool data = !memcmp((void *)start, source, items * width);                                                       \
        check(#name, data && n == 0 && to == start + items * width && from == (u64)source + items * width && fault.count == 1 &&  \
              fault.cr2 == WINDOW + PAGE && fault.error == 2 && fault.rcx == items - whole && fault.rdi == start + whole * width && \
              fault.rsi == (u64)source + whole * width,                                                                  \
              "data %d, count %lu, cr2 %lx error %lx rcx %lu rdi %lx", data, fault.count, fault.cr2, fault.error, fault.rcx, fault.rdi); \
    }
MOVS(movsb_fault, "b", 1, 0)
MOVS(movsw_fault, "w", 2, 1)
MOVS(movsl_fault, "l", 4, 2)
MOVS(movsq_fault, "q", 8, 0)
MOVS(movsq_fault_aligned, "q", 8, 4)

static void source_fault(void)
{
    fill();
    set_window(1);
    memcpy(frames[0] + PAGE - 96, source, 96);
    memcpy(frames[1], source + 96, 928);
    u64 from = WINDOW + PAGE - 96, to = (u64)copy, n = 128;
    asm volatile("rep movsq" : "+D"(to), "+S"(from), "+c"(n) : : "memory");
    check("movsq_source_fault", !memcmp(copy, source, 1024) && n == 0 && fault.count == 1 && fault.error == 0 &&
          fault.cr2 == WINDOW + PAGE && fault.rcx == 128 - 12 && fault.rsi == WINDOW + PAGE, "error %lx rcx %lu rsi %lx", fault.error,
          fault.rcx, fault.rsi);
}

static void stos_fault(void)
{
    fill();
    set_window(5); /* a hole in the middle */
    u64 to = WINDOW + PAGE - 24, n = 3 + 512 + 5;
    asm volatile("rep stosq" : "+D"(to), "+c"(n) : "a"(0x0123456789abcdef) : "memory");
    u32 wrong = 0;
    for (u64 i = 0; i < 520; i++) {
        wrong += *(volatile u64 *)(WINDOW + PAGE - 24 + 8 * i) != 0x0123456789abcdef;
    }
    check("stosq_fault", !wrong && n == 0 && fault.count == 1 && fault.cr2 == WINDOW + PAGE && fault.error == 2 &&
          fault.rcx == 517 && fault.rdi == WINDOW + PAGE, "%u wrong, rcx %lu rdi %lx", wrong, fault.rcx, fault.rdi);
}

static void backward_fault(void)
{
    fill();
    set_window(2);
    u64 to = WINDOW + PAGE + 63, from = (u64)source + 1023, n = 1024;
    asm volatile("std; rep movsb; cld" : "+D"(to), "+S"(from), "+c"(n) : : "memory", "cc");
    check("movsb_backward_fault", !memcmp((void *)(WINDOW + PAGE + 64 - 1024), source, 1024) && n == 0 && fault.count == 1 &&
          fault.cr2 == WINDOW + PAGE - 1 && fault.rcx == 1024 - 64 && fault.rdi == WINDOW + PAGE - 1, "cr2 %lx rcx %lu rdi %lx",
          fault.cr2, fault.rcx, fault.rdi);
}

static void scan_fault(void)
{
    fill();
    set_window(1);
    memset(frames[0], 7, PAGE);
    memset(frames[1], 7, 50);
    u64 at = WINDOW + PAGE - 30, n = 1000;
    bool equal;
    asm volatile("repe scasb" : "=@cce"(equal), "+D"(at), "+c"(n) : "a"(7) : "memory");
    check("scasb_fault", !equal && at == WINDOW + PAGE + 51 && n == 1000 - 81 && fault.count == 1 && fault.error == 0 &&
          fault.rcx == 970, "at %lx n %lu rcx %lu", at, n, fault.rcx);
}

/* The disk's sector n holds bytes (n + i * 7) & FFh. Nothing is lost of the port's data, nothing comes twice. */
static void ins_fault(void)
{
    u32 wrong = 0;
    u64 faults = 0;
    for (u32 lba = 0; lba < 20; lba++) {
        fill();
        set_window(1);
        u8 *to = (u8 *)WINDOW + PAGE - 2 * (lba * 12 + 3) - (lba & 1);
        wrong += !ide_read_pio(lba, to);
        faults += fault.count;
        for (u32 i = 0; i < 512; i++) {
            wrong += to[i] != ((lba + i * 7) & 0xff);
        }
        u64 whole = ((u64)WINDOW + PAGE - (u64)to) / 2;
        wrong += fault.rcx != 256 - whole || fault.rdi != (u64)to + 2 * whole || fault.cr2 != WINDOW + PAGE;
    }
    check("insw_fault", !wrong && faults == 20, "%u wrong, %lu faults, rcx %lu", wrong, faults, fault.rcx);
}

static void accessed_and_dirty(void)
{
    set_window(3);
    (void)*WINDOW_AT(0);
    bool read = (window_entry(0) & (PTE_ACCESSED | PTE_DIRTY)) == PTE_ACCESSED && !(window_entry(1) & PTE_ACCESSED);
    *WINDOW_AT(0) = 1;
    bool written = (window_entry(0) & (PTE_ACCESSED | PTE_DIRTY)) == (PTE_ACCESSED | PTE_DIRTY);
    set_window(3);
    *WINDOW_AT(0) = 1;
    bool again = window_entry(0) & PTE_DIRTY;
    check("accessed_dirty", read && written && again, "%d %d %d", read, written, again);
}

/* ---- shootdown: the page moves; after every processor has acknowledged nobody reads the old one ---- */
#define SHOTS 1500u
#define SHOTS_OF_TWO 200u /* more processors than the host may have: slow */
#define VERSIONS 64u
static u64 versions[VERSIONS][512] __attribute__((aligned(4096)));
static volatile u32 epoch, acknowledged[MAX_CPUS], ready[MAX_CPUS], stale, shot_over;
static bool by_cr3;
static int readers;
static u32 shots;

static void flush(void)
{
    if (by_cr3) {
        asm volatile("mov %%cr3, %%rax; mov %%rax, %%cr3" : : : "rax", "memory");
    } else {
        invlpg((void *)(WINDOW + 16 * PAGE));
    }
}

static void on_shoot(struct frame *f)
{
    (void)f;
    flush();
    acknowledged[cpu_index()]++;
    apic_eoi();
}

static void shoot(int cpu)
{
    volatile u64 *page = (volatile u64 *)WINDOW_AT(16);
    if (cpu) {
        acknowledged[cpu] = 0; /* the last shots of another run may have come late to a processor that slept then */
        flush();
        ready[cpu] = 1;
        while (!shot_over) {
            u32 before = epoch;
            u64 value = *page;
            u32 after = epoch;
            stale += value < before || value > after + 1; /* the next page may be mapped before its epoch is declared */
        }
        return;
    }
    await(ready[1] && ready[readers]);
    for (u32 i = 1; i <= shots; i++) {
        versions[i % VERSIONS][0] = i;
        window_map(16, (u64)versions[i % VERSIONS], PTE_PRESENT | PTE_WRITE);
        invlpg((void *)page);
        ipi(0, ICR_FIXED | ICR_OTHERS | VECTOR_SHOOT);
        if (!await(acknowledged[1] == i && acknowledged[readers] == i)) {
            break;
        }
        epoch = i;
        stale += *page != i;
    }
    shot_over = 1;
}

static void shootdown(const char *name, int others, u32 times)
{
    readers = others;
    shots = times;
    epoch = stale = shot_over = 0;
    memset((void *)ready, 0, sizeof ready);
    versions[0][0] = 0;
    window_map(16, (u64)versions[0], PTE_PRESENT | PTE_WRITE);
    invlpg((void *)(WINDOW + 16 * PAGE));
    flush();
    bool back = cpus_run(1 + others, shoot);
    check(name, back && !stale && epoch == times, "%u stale, epoch %u", stale, epoch);
}

/* ---- PV TLB flush (msr.rst, MSR_KVM_STEAL_TIME): a sleeping processor is told by a bit, and flushes when it runs again ---- */
#define KVM_PV_TLB_FLUSH 9
#define MSR_STEAL_TIME 0x4b564d03
#define PREEMPTED 1
#define FLUSH_TLB 2
static struct { u64 steal; u32 version, flags; volatile u8 preempted; u8 pad[47]; } steal __attribute__((aligned(64)));
static volatile u32 woken, expected, sleeper_over;

static void on_nudge(struct frame *f)
{
    (void)f;
    woken++;
    apic_eoi();
}

static void sleeper(int cpu)
{
    (void)cpu;
    volatile u64 *page = (volatile u64 *)WINDOW_AT(17);
    wrmsr(MSR_STEAL_TIME, (u64)&steal | 1);
    u32 rounds = 0;
    while (!sleeper_over) {
        (void)*page; /* translated */
        cli();
        if (woken == rounds) {
            sti_hlt();
            cli();
        }
        if (woken != rounds) {
            rounds = woken;
            stale += *page != expected;
            acknowledged[1] = rounds;
        }
        sti();
    }
    wrmsr(MSR_STEAL_TIME, 0);
}

static void pv_flush(void)
{
    u32 r[4];
    cpuid(0x40000001, 0, r);
    if (!(r[0] >> KVM_PV_TLB_FLUSH & 1)) {
        check("pv_tlb_flush", true, "not offered");
        return;
    }
    u32 saved = 0, i = 1;
    stale = woken = 0;
    memset((void *)acknowledged, 0, sizeof acknowledged);
    window_map(17, (u64)versions[0], PTE_PRESENT | PTE_WRITE);
    cpu_run(1, sleeper);
    for (; i <= 1000; i++) {
        await(steal.preempted & PREEMPTED);
        versions[i % VERSIONS][0] = i;
        window_map(17, (u64)versions[i % VERSIONS], PTE_PRESENT | PTE_WRITE);
        u8 state = PREEMPTED;
        bool told = __atomic_compare_exchange_n(&steal.preempted, &state, PREEMPTED | FLUSH_TLB, false, __ATOMIC_SEQ_CST,
                                                __ATOMIC_SEQ_CST);
        if (!told) { /* it runs: as Linux would, by interrupt; here simply again */
            window_map(17, (u64)versions[(i - 1) % VERSIONS], PTE_PRESENT | PTE_WRITE);
            i--;
            continue;
        }
        saved++;
        expected = i;
        ipi(1, ICR_FIXED | VECTOR_NUDGE);
        if (!await(acknowledged[1] == i)) {
            break;
        }
    }
    sleeper_over = 1;
    ipi(1, ICR_FIXED | VECTOR_NUDGE);
    check("pv_tlb_flush", i == 1001 && !stale, "round %u, %u stale, %u told", i, stale, saved);
}

int main(void)
{
    if (cpus_start(CPUS) != CPUS) {
        die("a processor does not start");
    }
    handlers[14] = on_page_fault;
    handlers[VECTOR_SHOOT] = on_shoot;
    handlers[VECTOR_NUDGE] = on_nudge;
    sti();
    movsb_fault();
    movsw_fault();
    movsl_fault();
    movsq_fault();
    movsq_fault_aligned();
    source_fault();
    stos_fault();
    backward_fault();
    scan_fault();
    ins_fault();
    accessed_and_dirty();
    shootdown("shootdown_invlpg", 1, SHOTS);
    shootdown("shootdown_of_two", 2, SHOTS_OF_TWO);
    by_cr3 = true;
    shootdown("shootdown_cr3", 1, SHOTS);
    pv_flush();
    return 0;
}
