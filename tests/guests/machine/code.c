/*
 * Code that changes: under itself, under another processor (SDM vol. 3 section 9.1.3: cross-modifying code), by two
 * processors for each other, and by a bus master.
 *
 * The IDE disk (primary master, made by the test) has in sector n, for n in 0 to 63, the code of
 * `mov $0x1000 + n, %eax; ret`.
 */
#include "guest.h"

#define CPUS 2
#define ROUNDS 3000u
#define VECTOR_SYNC 0x45

typedef u32 (*function)(void);
static u8 area[8 * PAGE] __attribute__((aligned(4096)));

/* mov $value, %eax; ret - with the immediate on a multiple of 4, so that a store changes it at once */
static function put_function(u8 *at, u32 value)
{
    at[0] = 0x90;
    at[1] = 0x90;
    at[2] = 0x90;
    at[3] = 0xb8;
    *(volatile u32 *)(at + 4) = value;
    at[8] = 0xc3;
    return (function)(u64)at;
}

/* ---- by itself ---- */
static u32 next_immediate(u32 value) /* the store changes the instruction right behind it */
{
    u32 got;
    asm volatile("lea 1f(%%rip), %%rcx; movl %1, 1(%%rcx); 1: mov $0x11111111, %%eax; mov %%eax, %0"
                 : "=r"(got) : "r"(value) : "rax", "rcx", "memory");
    return got;
}

static u32 far_in_block(u32 value) /* some instructions on, in the same block */
{
    u32 got;
    asm volatile("lea 1f(%%rip), %%rcx; movl %1, 1(%%rcx); xor %%edx, %%edx; inc %%edx; add $7, %%edx; nop; nop;"
                 "1: mov $0x11111111, %%eax; mov %%eax, %0" : "=r"(got) : "r"(value) : "rax", "rcx", "rdx", "memory", "cc");
    return got;
}

static u32 by_string(u32 value) /* MOVSB over the instruction behind it */
{
    u32 got, copy = value;
    asm volatile("lea 1f+1(%%rip), %%rdi; mov %1, %%rsi; mov $4, %%ecx; rep movsb; 1: mov $0x11111111, %%eax; mov %%eax, %0"
                 : "=r"(got) : "r"(&copy) : "rax", "rcx", "rsi", "rdi", "memory");
    return got;
}

static u32 by_lock(u32 value) /* an atomic does it */
{
    u32 got;
    asm volatile("lea 1f+1(%%rip), %%rcx; mov %1, %%edx; xchgl %%edx, (%%rcx); 1: mov $0x11111111, %%eax; mov %%eax, %0"
                 : "=r"(got) : "r"(value) : "rax", "rcx", "rdx", "memory");
    return got;
}

static u32 by_push(u32 value) /* the stack lies over the code */
{
    u64 got;
    asm volatile("mov %%rsp, %%rdx; lea 1f+10(%%rip), %%rsp; pushq %1; mov %%rdx, %%rsp; 1: movabs $0x1111111111111111, %%rax;"
                 "mov %%rax, %0" : "=r"(got) : "r"((u64)value) : "rax", "rdx", "memory");
    return (u32)got;
}

static void itself(void)
{
    static u32 (*const ways[])(u32) = {next_immediate, far_in_block, by_string, by_lock, by_push};
    static const char *const names[] = {"self_next", "self_same_block", "self_string", "self_xchg", "self_push"};
    for (unsigned way = 0; way < COUNT(ways); way++) {
        u32 wrong = 0;
        for (u32 i = 0; i < ROUNDS; i++) {
            wrong += ways[way](i * 2654435761u) != i * 2654435761u;
        }
        check(names[way], !wrong, "%u rounds of %u", wrong, ROUNDS);
    }
    /* an instruction across two pages, of which the second changes */
    u8 *at = area + PAGE - 4;
    u32 wrong = 0;
    function f = put_function(at, 0);
    for (u32 i = 0; i < ROUNDS; i++) {
        *(volatile u32 *)(at + 4) = i;
        wrong += f() != i;
    }
    at = area + PAGE - 6; /* now inside the immediate */
    f = put_function(at, 0);
    for (u32 i = 0; i < ROUNDS; i++) {
        *(volatile u16 *)(at + 6) = (u16)i;
        wrong += f() != (i & 0xffff) << 16;
    }
    check("self_two_pages", !wrong, "%u rounds", wrong);
}

/* ---- by another processor: an atomic change of an immediate, told by a flag, taken over by CPUID ---- */
static volatile u32 told, seen;
static volatile u32 wrong_values;
static function target;

static void flagged(int cpu)
{
    for (u32 i = 1; i <= ROUNDS; i++) {
        if (cpu == 0) {
            *(volatile u32 *)((u8 *)target + 4) = i;
            told = i;
            while (seen != i) {
                pause();
            }
        } else {
            while (told != i) {
                wrong_values += target() > i; /* keeps it translated, old or new */
            }
            serialize();
            wrong_values += target() != i;
            seen = i;
        }
    }
}

/* No flag, no serialising: the loop sees one or the other value, and the new one in the end. */
static void unflagged(int cpu)
{
    if (cpu == 0) {
        for (u32 i = 1; i <= ROUNDS; i++) {
            *(volatile u32 *)((u8 *)target + 4) = i;
            while (seen != i) {
                pause();
            }
        }
    } else {
        u32 last = 0;
        while (last != ROUNDS) {
            u32 got = target();
            wrong_values += got != last && got != last + 1;
            last = got;
            seen = got;
        }
    }
}

/* The loop itself is patched: never left, its immediate is added in each turn. */
static u8 *loop_at;
static volatile u64 loop_sum;
static volatile u32 loop_stop;
static void running_loop(int cpu)
{
    if (cpu == 1) {
        ((void (*)(volatile u64 *, volatile u32 *))(u64)loop_at)(&loop_sum, &loop_stop);
        return;
    }
    for (u32 i = 1; i <= 2000; i++) {
        *(volatile u32 *)(loop_at + 4) = i; /* mov $i, %eax */
        while ((u32)loop_sum != i) {
            pause();
        }
    }
    loop_stop = 1;
}

static void put_loop(u8 *at)
{
    static const u8 code[] = {
        0x90, 0x90, 0x90,
        0xb8, 0, 0, 0, 0,       /* mov $0, %eax: immediate at 4 */
        0x48, 0x89, 0x07,       /* mov %rax, (%rdi) */
        0x83, 0x3e, 0x00,       /* cmpl $0, (%rsi) */
        0x74, 0xf0,             /* je to the mov */
        0xc3,
    };
    memcpy(at, code, sizeof code);
}

/* ---- INT3 protocol, as Linux patches a running kernel: breakpoint, the other serialises, the tail,
 * again, the head, again ---- */
static volatile u32 breakpoints, synced[MAX_CPUS], patch_stop;
static u8 *patched;

static void on_breakpoint(struct frame *f)
{
    if (f->rip - 1 != (u64)patched) {
        die("a breakpoint at %lx", f->rip);
    }
    __atomic_fetch_add(&breakpoints, 1, __ATOMIC_RELAXED);
    f->rax = 0xb3b3b3b3; /* in place of the instruction */
    f->rip += 4;
}

static void on_sync(struct frame *f)
{
    (void)f;
    serialize();
    synced[cpu_index()]++;
    apic_eoi();
}

static bool other_syncs(u32 n)
{
    ipi(1, ICR_FIXED | VECTOR_SYNC);
    return await(synced[1] == n);
}

static void patching(int cpu)
{
    static const u8 variants[2][5] = {{0xb8, 0xaa, 0xaa, 0xaa, 0xaa}, {0x8d, 0x44, 0x24, 0x7f, 0x90}}; /* mov $, %eax; lea 127(%rsp), %eax; nop */
    function f = (function)(u64)(patched);
    if (cpu) {
        while (!patch_stop) {
            u32 rsp = (u32)(u64)__builtin_frame_address(0), got = f();
            bool lea = got != 0xaaaaaaaa && got != 0xb3b3b3b3;
            wrong_values += lea && (got & 7) != 7 && got - rsp > 0; /* 127 above an 8-aligned stack */
        }
        return;
    }
    u32 n = 0;
    bool came = true;
    for (u32 i = 0; i < 1500 && came; i++) {
        const u8 *to = variants[i & 1];
        *(volatile u8 *)patched = 0xcc;
        came = other_syncs(++n);
        memcpy(patched + 1, to + 1, 4);
        came = came && other_syncs(++n);
        *(volatile u8 *)patched = to[0];
        came = came && other_syncs(++n);
        u32 got = f();
        wrong_values += i & 1 ? (got & 7) != 7 : got != 0xaaaaaaaa;
    }
    wrong_values += !came;
    patch_stop = 1;
}

/* ---- each writes what the other runs ---- */
static volatile u32 turn[2];
static void each_other(int cpu)
{
    u8 *mine = area + 2 * PAGE + 256 * (u32)cpu, *theirs = area + 2 * PAGE + 256 * (u32)!cpu; /* in one page */
    u8 *mine_far = area + (4 + (u32)cpu) * PAGE, *theirs_far = area + (4 + (u32)!cpu) * PAGE;
    for (u32 i = 1; i <= ROUNDS; i++) {
        put_function(theirs, i);
        put_function(theirs_far, i + 7);
        turn[cpu] = 2 * i - 1;
        while (turn[!cpu] < 2 * i - 1) {
            pause();
        }
        serialize();
        wrong_values += ((function)(u64)mine)() != i;
        wrong_values += ((function)(u64)mine_far)() != i + 7;
        turn[cpu] = 2 * i; /* we have run it: it may change */
        while (turn[!cpu] < 2 * i) {
            pause();
        }
    }
}

static void cross(const char *name, int cpus, void (*work)(int cpu))
{
    told = seen = wrong_values = 0;
    bool back = cpus_run(cpus, work);
    check(name, back && !wrong_values, "%d, %u wrong, told %u seen %u", back, wrong_values, told, seen);
}

static void others(void)
{
    target = put_function(area + 3 * PAGE + 64, 0);
    cross("cross_flagged", 2, flagged);
    target = put_function(area + 3 * PAGE + 128, 0);
    cross("cross_unflagged", 2, unflagged);
    loop_at = area + 3 * PAGE + 256;
    put_loop(loop_at);
    cross("cross_running_loop", 2, running_loop);
    cross("cross_each_other", 2, each_other);
    handlers[3] = on_breakpoint;
    handlers[VECTOR_SYNC] = on_sync;
    patched = area + 6 * PAGE + 5; /* not aligned */
    memcpy(patched, "\xb8\xaa\xaa\xaa\xaa\xc3", 6);
    cross("cross_int3", 2, patching);
    print("breakpoints met: %u\n", breakpoints);
}

/* ---- by DMA and by string input ---- */
#define SECTORS 64u
static void dma(void)
{
    static u8 buffer[2 * PAGE] __attribute__((aligned(4096)));
    u32 wrong = 0, failed = 0;
    for (u32 i = 0; i < 6 * SECTORS; i++) {
        failed += !ide_read_dma(i % SECTORS, 1, buffer);
        wrong += ((function)(u64)buffer)() != 0x1000 + i % SECTORS;
    }
    check("dma_over_code", !wrong && !failed, "%u wrong, %u failed", wrong, failed);
    wrong = failed = 0;
    for (u32 i = 0; i < 2 * SECTORS; i++) {
        failed += !ide_read_pio(i % SECTORS, buffer + PAGE);
        wrong += ((function)(u64)(buffer + PAGE))() != 0x1000 + i % SECTORS;
    }
    check("insw_over_code", !wrong && !failed, "%u wrong, %u failed", wrong, failed);
}

int main(void)
{
    if (cpus_start(CPUS) != CPUS) {
        die("a processor does not start");
    }
    sti();
    itself();
    others();
    dma();
    return 0;
}
