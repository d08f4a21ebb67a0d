/*
 * The local APIC on four processors: timer, priorities, IPIs of every kind, NMI, INIT and SIPI, x2APIC, and KVM's
 * paravirtual ways around it where CPUID offers them. Sections are those of SDM vol. 3 chapter 11 (2023).
 */
#include "guest.h"

#define CPUS 4
#define TIMER 0x40
#define MSR_TSC_DEADLINE 0x6e0
#define MODE_PERIODIC (1u << 17)
#define MODE_DEADLINE (2u << 17)
#define LVT_MASKED (1u << 16)

static volatile u32 taken[MAX_CPUS][256];
static volatile u8 order[64];
static volatile u32 ordered;
static volatile u64 timer_tsc;

static u32 taken_by_all(u32 vector)
{
    u32 sum = 0;
    for (int i = 0; i < CPUS; i++) {
        sum += taken[i][vector];
    }
    return sum;
}

static void forget(void)
{
    memset((void *)taken, 0, sizeof taken);
    ordered = 0;
}

static void count(struct frame *f)
{
    taken[cpu_index()][f->vector]++;
    apic_eoi();
}

static void log_order(struct frame *f)
{
    order[ordered++ % sizeof order] = (u8)f->vector;
    apic_eoi();
}

static void on_timer(struct frame *f)
{
    timer_tsc = rdtsc();
    count(f);
}

/* ---- 11.5.4 ---- */
static void timer(void)
{
    handlers[TIMER] = on_timer;
    sti();
    apic_write(APIC_TIMER_DIVIDE, 0xb);
    apic_write(APIC_LVT_TIMER, TIMER);
    apic_write(APIC_TIMER_INITIAL, 2000000);
    u32 running = apic_read(APIC_TIMER_CURRENT);
    bool came = await(taken[0][TIMER] == 1);
    u32 after = apic_read(APIC_TIMER_CURRENT);
    delay_ns(5000000);
    check("timer_one_shot", came && running && running <= 2000000 && after == 0 && taken[0][TIMER] == 1,
          "taken %u, count %u then %u", taken[0][TIMER], running, after);

    forget();
    apic_write(APIC_LVT_TIMER, TIMER | LVT_MASKED);
    apic_write(APIC_TIMER_INITIAL, 100000);
    bool ran_out = await(apic_read(APIC_TIMER_CURRENT) == 0);
    apic_write(APIC_LVT_TIMER, TIMER);
    delay_ns(1000000);
    check("timer_masked", ran_out && taken[0][TIMER] == 0, "taken %u", taken[0][TIMER]);

    forget();
    apic_write(APIC_LVT_TIMER, TIMER | MODE_PERIODIC);
    apic_write(APIC_TIMER_INITIAL, 300000);
    came = await(taken[0][TIMER] >= 20);
    apic_write(APIC_TIMER_INITIAL, 0);
    u32 stopped = taken[0][TIMER];
    delay_ns(3000000);
    check("timer_periodic", came && taken[0][TIMER] - stopped <= 1, "taken %u, %u after the stop", stopped, taken[0][TIMER]);

    forget();
    apic_write(APIC_TIMER_DIVIDE, 0x2); /* by 8 */
    apic_write(APIC_LVT_TIMER, TIMER);
    u64 begin = time_ns();
    apic_write(APIC_TIMER_INITIAL, 1000000);
    came = await(taken[0][TIMER] == 1);
    check("timer_divided", came && time_ns() - begin >= 7900000, "taken %u after %lu ns", taken[0][TIMER], time_ns() - begin);
    apic_write(APIC_TIMER_DIVIDE, 0xb);
}

/* 11.5.4.1 */
static void deadline(void)
{
    u32 r[4];
    cpuid(1, 0, r);
    if (!(r[2] >> 24 & 1)) {
        check("timer_deadline", false, "CPUID has no TSC deadline");
        return;
    }
    forget();
    apic_write(APIC_LVT_TIMER, TIMER | MODE_DEADLINE);
    asm volatile("mfence" : : : "memory");
    u64 late = 0, early = 0, armed = 0;
    bool came = true;
    for (u32 i = 1; i <= 200 && came; i++) {
        u64 at = rdtsc() + 20000 * (i % 7);
        wrmsr(MSR_TSC_DEADLINE, at);
        came = await(taken[0][TIMER] == i);
        early += timer_tsc < at;
        armed += rdmsr(MSR_TSC_DEADLINE) != 0;
    }
    check("timer_deadline", came && !early && !armed, "taken %u, %lu early, %lu still armed", taken[0][TIMER], early, armed);
    forget();
    for (u32 i = 1; i <= 200 && came; i++) { /* asleep when it is due */
        cli();
        u64 at = rdtsc() + 30000 * (i % 5);
        wrmsr(MSR_TSC_DEADLINE, at);
        while (taken[0][TIMER] < i) {
            sti_hlt();
            cli();
        }
        sti();
        late += timer_tsc < at;
    }
    check("timer_wakes", taken[0][TIMER] == 200 && !late, "taken %u, %lu early", taken[0][TIMER], late);
    forget();
    wrmsr(MSR_TSC_DEADLINE, 1); /* long past */
    came = await(taken[0][TIMER] == 1);
    wrmsr(MSR_TSC_DEADLINE, rdtsc() + 3000000);
    wrmsr(MSR_TSC_DEADLINE, 0);
    delay_ns(5000000);
    check("timer_deadline_edges", came && taken[0][TIMER] == 1, "taken %u", taken[0][TIMER]);
    apic_write(APIC_LVT_TIMER, TIMER | LVT_MASKED);
}

/* ---- 11.8 ---- */
static void priorities(void)
{
    static const u8 vectors[] = {0x31, 0x45, 0x51, 0x61, 0x91};
    for (unsigned i = 0; i < COUNT(vectors); i++) {
        handlers[vectors[i]] = count;
    }
    forget();
    sti();
    apic_write(APIC_TPR, 0x50);
    ipi(0, ICR_FIXED | ICR_SELF | 0x45);
    ipi(0, ICR_FIXED | ICR_SELF | 0x51); /* of the same class as TPR: waits too */
    ipi(0, ICR_FIXED | ICR_SELF | 0x61);
    bool high = await(taken[0][0x61]);
    u32 ppr = apic_read(APIC_PPR);
    u64 cr8;
    asm volatile("mov %%cr8, %0" : "=r"(cr8));
    bool held = !taken[0][0x45] && !taken[0][0x51] && apic_bit(APIC_IRR, 0x45) && apic_bit(APIC_IRR, 0x51);
    write_cr8(4);
    bool middle = await(taken[0][0x51]) && !taken[0][0x45] && apic_read(APIC_TPR) == 0x40;
    apic_write(APIC_TPR, 0);
    bool low = await(taken[0][0x45]);
    check("tpr", high && held && middle && low && ppr == 0x50 && cr8 == 5, "%d %d %d %d ppr %x cr8 %lx", high, held, middle, low,
          ppr, cr8);

    forget();
    for (unsigned i = 0; i < COUNT(vectors); i++) {
        handlers[vectors[i]] = log_order;
    }
    cli();
    ipi(0, ICR_FIXED | ICR_SELF | 0x31);
    ipi(0, ICR_FIXED | ICR_SELF | 0x91);
    ipi(0, ICR_FIXED | ICR_SELF | 0x51);
    ipi(0, ICR_FIXED | ICR_SELF | 0x91); /* twice pending is once */
    sti();
    bool all = await(ordered == 3);
    check("priority_order", all && order[0] == 0x91 && order[1] == 0x51 && order[2] == 0x31, "%u: %x %x %x", ordered, order[0],
          order[1], order[2]);
}

/* Each way to open the window for an interrupt that has been pending for a while, with no other event after it. */
static void windows(void)
{
    static const char *const names[] = {"window_sti", "window_popf", "window_iret", "window_tpr", "window_cr8"};
    handlers[0x31] = count;
    for (unsigned way = 0; way < COUNT(names); way++) {
        bool all = true;
        for (u32 i = 1; i <= 50 && all; i++) {
            forget();
            cli();
            ipi(0, ICR_FIXED | ICR_SELF | 0x31);
            if (way >= 3) {
                write_cr8(15);
                sti();
            }
            await(apic_bit(APIC_IRR, 0x31));
            for (int n = 0; n < 300; n++) {
                pause();
            }
            all = !taken[0][0x31];
            switch (way) {
            case 0: asm volatile("sti" : : : "memory"); break;
            case 1: asm volatile("pushfq; orl $0x200, (%%rsp); popfq" : : : "memory", "cc"); break;
            case 2:
                asm volatile("mov %%rsp, %%rax; mov %%ss, %%ecx; push %%rcx; push %%rax; pushfq; orl $0x200, (%%rsp);"
                             "mov %%cs, %%ecx; push %%rcx; lea 1f(%%rip), %%rax; push %%rax; iretq; 1:"
                             : : : "rax", "rcx", "memory", "cc");
                break;
            case 3: apic_write(APIC_TPR, 0); break;
            default: write_cr8(0);
            }
            for (int n = 0; n < 100 && !taken[0][0x31]; n++) {
                barrier();
            }
            all = all && taken[0][0x31] == 1;
            write_cr8(0);
        }
        check(names[way], all, "taken %u", taken[0][0x31]);
    }
}

static void nesting_handler(struct frame *f)
{
    order[ordered++] = (u8)f->vector;
    if (f->vector == 0x51) {
        ipi(0, ICR_FIXED | ICR_SELF | 0x45); /* lower: after our EOI and IRET */
        ipi(0, ICR_FIXED | ICR_SELF | 0x58); /* same class: likewise, and before 45h */
        ipi(0, ICR_FIXED | ICR_SELF | 0x71); /* higher: now */
        sti();
        await(ordered >= 2);
        for (int i = 0; i < 1000; i++) {
            pause();
        }
        cli();
        order[ordered++] = apic_bit(APIC_ISR, 0x51) && apic_bit(APIC_IRR, 0x58) && apic_bit(APIC_IRR, 0x45) ? 1 : 0;
    }
    apic_eoi();
}

static void nesting(void)
{
    static const u8 expected[] = {0x51, 0x71, 1, 0x58, 0x45};
    handlers[0x45] = handlers[0x51] = handlers[0x58] = handlers[0x71] = nesting_handler;
    forget();
    sti();
    ipi(0, ICR_FIXED | ICR_SELF | 0x51);
    bool all = await(ordered == sizeof expected);
    check("nested", all && !memcmp((void *)order, expected, sizeof expected), "%u: %x %x %x %x %x", ordered, order[0], order[1],
          order[2], order[3], order[4]);
}

/* ---- 11.6 ---- */
static bool flat_ldr;
static void set_logical(int cpu)
{
    apic_write(APIC_DFR, flat_ldr ? 0xffffffff : 0x0fffffff);
    apic_write(APIC_LDR, flat_ldr ? 1u << (24 + cpu) : (u32)(cpu / 2) << 28 | 1u << (24 + cpu % 2));
}

static bool counts(u32 vector, u32 a, u32 b, u32 c, u32 d)
{
    bool right = await(taken[0][vector] == a && taken[1][vector] == b && taken[2][vector] == c && taken[3][vector] == d);
    delay_ns(100000); /* whoever should not have it would have it now */
    return right && taken_by_all(vector) == a + b + c + d;
}

static void verdict(const char *name, u32 vector, u32 a, u32 b, u32 c, u32 d)
{
    bool right = counts(vector, a, b, c, d);
    check(name, right, "%u %u %u %u", taken[0][vector], taken[1][vector], taken[2][vector], taken[3][vector]);
    forget();
}

static void raise_tpr(int cpu) { apic_write(APIC_TPR, cpu == 2 ? 0 : 0x20); }
static void drop_tpr(int cpu) { (void)cpu; apic_write(APIC_TPR, 0); }

static void ipis(void)
{
    const u32 v = 0x39;
    handlers[v] = count;
    forget();
    sti();
    ipi(2, ICR_FIXED | v);
    ipi(3, ICR_FIXED | v);
    verdict("ipi_physical", v, 0, 0, 1, 1);
    ipi(0, ICR_FIXED | ICR_ALL | v);
    verdict("ipi_all", v, 1, 1, 1, 1);
    ipi(0, ICR_FIXED | ICR_OTHERS | v);
    verdict("ipi_others", v, 0, 1, 1, 1);
    ipi(0, ICR_FIXED | ICR_SELF | v);
    verdict("ipi_self", v, 1, 0, 0, 0);
    ipi(0xff, ICR_FIXED | v);
    verdict("ipi_broadcast", v, 1, 1, 1, 1);
    flat_ldr = true;
    cpus_run(CPUS, set_logical);
    ipi(0xa, ICR_FIXED | ICR_LOGICAL | v);
    verdict("ipi_logical_flat", v, 0, 1, 0, 1);
    for (int i = 0; i < 100; i++) {
        ipi(0xf, ICR_LOWEST | ICR_LOGICAL | v);
        await(taken_by_all(v) == (u32)i + 1);
    }
    delay_ns(100000);
    check("ipi_lowest_once", taken_by_all(v) == 100, "%u", taken_by_all(v));
    forget();
    cpus_run(CPUS, raise_tpr);
    ipi(0xf, ICR_LOWEST | ICR_LOGICAL | v);
    verdict("ipi_lowest_priority", v, 0, 0, 1, 0);
    cpus_run(CPUS, drop_tpr);
    flat_ldr = false;
    cpus_run(CPUS, set_logical);
    ipi(0x12, ICR_FIXED | ICR_LOGICAL | v); /* cluster 1, member 1 */
    verdict("ipi_logical_cluster", v, 0, 0, 0, 1);
    ipi(0x03, ICR_FIXED | ICR_LOGICAL | v); /* cluster 0, both */
    verdict("ipi_logical_cluster_two", v, 1, 1, 0, 0);
    flat_ldr = true;
    cpus_run(CPUS, set_logical);
}

/* ---- NMI, INIT ---- */
static void count_nmi(struct frame *f)
{
    taken[cpu_index()][f->vector]++;
}

static volatile u32 stage;
static void halted_for_good(int cpu) /* IF = 0: only an NMI ends this */
{
    (void)cpu;
    cli();
    stage = 1;
    asm volatile("hlt" : : : "memory");
    stage = 2;
}

static void nmi_and_init(void)
{
    handlers[2] = count_nmi;
    forget();
    cli();
    ipi(1, ICR_NMI);
    ipi(0, ICR_NMI | ICR_OTHERS);
    bool came = await(taken[1][2] >= 1 && taken[2][2] == 1 && taken[3][2] == 1);
    sti();
    check("nmi", came && taken[0][2] == 0, "%u %u %u %u", taken[0][2], taken[1][2], taken[2][2], taken[3][2]);
    forget();
    stage = 0;
    cpu_run(2, halted_for_good);
    bool asleep = await(stage == 1);
    ipi(2, ICR_FIXED | 0x39); /* masked by IF: must not end it */
    delay_ns(200000);
    bool slept = stage == 1;
    ipi(2, ICR_NMI);
    bool woke = await(stage == 2) && await(cpu_idle(2)) && await(taken[2][0x39] == 1);
    check("nmi_ends_hlt", asleep && slept && woke && taken[2][2] == 1, "%d %d %d, %u", asleep, slept, woke, taken[2][2]);

    forget();
    stage = 0;
    cpu_run(3, halted_for_good);
    asleep = await(stage == 1);
    cpu_forget(3);
    int running = cpus_start(CPUS);
    handlers[0x39] = count;
    ipi(3, ICR_FIXED | 0x39);
    bool lives = await(taken[3][0x39] == 1);
    check("init_sipi_again", asleep && running == CPUS && lives && stage == 1, "%d %d %d %u", asleep, running, lives, stage);
}

/* ---- 11.12 ---- */
static u32 x2_ldr[MAX_CPUS], x2_id[MAX_CPUS];
static void enter_x2(int cpu)
{
    apic_x2();
    x2_ldr[cpu] = apic_read(APIC_LDR);
    x2_id[cpu] = apic_read(APIC_ID);
}

static void x2apic(void)
{
    const u32 v = 0x3a;
    handlers[v] = count;
    for (int i = CPUS - 1; i >= 0; i--) {
        if (i) {
            cpu_run(i, enter_x2);
            await(cpu_idle(i));
        } else {
            enter_x2(0);
        }
    }
    bool ids = true;
    for (u32 i = 0; i < CPUS; i++) {
        ids &= x2_id[i] == i && x2_ldr[i] == 1u << i;
    }
    check("x2apic_ids", ids, "%x %x %x %x", x2_ldr[0], x2_ldr[1], x2_ldr[2], x2_ldr[3]);
    forget();
    sti();
    ipi(1, ICR_FIXED | v);
    verdict("x2apic_physical", v, 0, 1, 0, 0);
    ipi(0x5, ICR_FIXED | ICR_LOGICAL | v);
    verdict("x2apic_logical", v, 1, 0, 1, 0);
    ipi(0xffffffff, ICR_FIXED | v);
    verdict("x2apic_broadcast", v, 1, 1, 1, 1);
    ipi(0, ICR_FIXED | ICR_OTHERS | v);
    verdict("x2apic_others", v, 0, 1, 1, 1);
    wrmsr(0x800 + (APIC_SELF_IPI >> 4), v);
    verdict("x2apic_self_ipi", v, 1, 0, 0, 0);
}

/* ---- KVM: Documentation/virt/kvm/x86/cpuid.rst, hypercalls.rst, msr.rst ---- */
#define KVM_PV_EOI 6
#define KVM_PV_UNHALT 7
#define KVM_PV_SEND_IPI 11
#define MSR_KVM_PV_EOI 0x4b564d04
enum { KICK_CPU = 5, SEND_IPI = 10 };
static u32 kvm_features;

static long hypercall(u64 number, u64 a, u64 b, u64 c, u64 d, bool vmcall)
{
    long result;
    if (vmcall) {
        asm volatile("vmcall" : "=a"(result) : "a"(number), "b"(a), "c"(b), "d"(c), "S"(d) : "memory");
    } else {
        asm volatile("vmmcall" : "=a"(result) : "a"(number), "b"(a), "c"(b), "d"(c), "S"(d) : "memory");
    }
    return result;
}

static void kvm_send_ipi(void)
{
    const u32 v = 0x3b;
    handlers[v] = count;
    forget();
    if (!(kvm_features >> KVM_PV_SEND_IPI & 1)) {
        check("pv_ipi", true, "not offered");
        return;
    }
    long first = hypercall(SEND_IPI, 0xd, 0, 0, v, false);
    bool right = counts(v, 1, 0, 1, 1);
    long second = hypercall(SEND_IPI, 0x3, 0, 1, v, true); /* from ID 1 on */
    right = right && counts(v, 1, 1, 2, 1);
    long nobody = hypercall(SEND_IPI, 1, 0, 200, v, false);
    long unknown = hypercall(77, 0, 0, 0, 0, false);
    check("pv_ipi", right && first == 3 && second == 2 && nobody == 0 && unknown == -1000, "%d: %ld %ld %ld %ld", right, first,
          second, nobody, unknown);
}

static void kvm_kick(void)
{
    if (!(kvm_features >> KVM_PV_UNHALT & 1)) {
        check("pv_kick", true, "not offered");
        return;
    }
    u32 rounds = 0;
    for (; rounds < 500; rounds++) {
        stage = 0;
        cpu_run(1, halted_for_good);
        if (!await(stage == 1)) {
            break;
        }
        hypercall(KICK_CPU, 0, 1, 0, 0, rounds & 1);
        if (!await(stage == 2 && cpu_idle(1))) {
            break;
        }
    }
    check("pv_kick", rounds == 500, "lost in round %u", rounds);
}

static volatile u32 eoi_word __attribute__((aligned(4)));
static u32 eoi_written, eoi_saved;
static void eoi_handler(struct frame *f)
{
    taken[cpu_index()][f->vector]++;
    u32 was = __atomic_fetch_and(&eoi_word, ~1u, __ATOMIC_SEQ_CST);
    if (was & 1) {
        eoi_saved++;
    } else {
        eoi_written++;
        apic_eoi();
    }
}

static void kvm_eoi(void)
{
    const u32 v = 0x3c, w = 0x3d;
    handlers[v] = handlers[w] = eoi_handler;
    forget();
    if (!(kvm_features >> KVM_PV_EOI & 1)) {
        check("pv_eoi", true, "not offered");
        return;
    }
    wrmsr(MSR_KVM_PV_EOI, (u64)&eoi_word | 1);
    bool came = true;
    for (u32 i = 1; i <= 300 && came; i++) {
        cli();
        ipi(0, ICR_FIXED | ICR_SELF | v);
        if (i % 3 == 0) {
            ipi(0, ICR_FIXED | ICR_SELF | w); /* two at once: the first must be ended by a write */
        }
        sti();
        came = await(taken[0][v] == i && taken[0][w] == i / 3);
    }
    wrmsr(MSR_KVM_PV_EOI, 0);
    bool idle = !apic_bit(APIC_ISR, v) && !apic_bit(APIC_ISR, w) && apic_read(APIC_PPR) == 0;
    check("pv_eoi", came && idle && eoi_saved && eoi_written + eoi_saved == 400, "%d %d: %u written, %u saved", came, idle,
          eoi_written, eoi_saved);
}

static void kvm(void)
{
    u32 r[4];
    cpuid(0x40000000, 0, r);
    if (r[1] == 0x4b4d564b && r[2] == 0x564b4d56) {
        cpuid(0x40000001, 0, r);
        kvm_features = r[0];
    }
    sti();
    kvm_send_ipi();
    kvm_kick();
    kvm_eoi();
}

int main(void)
{
    int running = cpus_start(CPUS);
    check("sipi", running == CPUS, "%d run", running);
    if (running != CPUS) {
        return 1;
    }
    timer();
    deadline();
    priorities();
    windows();
    nesting();
    ipis();
    nmi_and_init();
    x2apic();
    kvm();
    return 0;
}
