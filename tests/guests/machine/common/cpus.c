/* Processors, their local APICs (SDM vol. 3 chapter 11), the IOAPIC (82093AA) and the 8259 pair. */
#include "guest.h"

#define XAPIC 0xfee00000ul
#define IOAPIC 0xfec00000ul
#define MSR_APIC_BASE 0x1b
#define MSR_GS_BASE 0xc0000101
#define BASE_X2 0x400
#define BASE_ENABLE 0x800
#define STACK_BYTES 16384
#define AP_PAGE 8 /* start.S put the start code at 8000h */

struct cpu {
    struct cpu *self;
    u64 index;
    bool x2;
    volatile bool up;
    void (*volatile work)(int cpu);
    u8 stack[STACK_BYTES] __attribute__((aligned(16)));
};
static struct cpu cpus[MAX_CPUS];
extern u64 ap_stack;
void idt_load(void);

static struct cpu *self(void)
{
    struct cpu *c;
    asm volatile("mov %%gs:0, %0" : "=r"(c));
    return c;
}

int cpu_index(void) { return (int)self()->index; }

/* ---- local APIC ---- */
u32 apic_read(u32 reg)
{
    return self()->x2 ? (u32)rdmsr(0x800 + (reg >> 4)) : *(volatile u32 *)(XAPIC + reg);
}

void apic_write(u32 reg, u32 value)
{
    if (self()->x2) {
        wrmsr(0x800 + (reg >> 4), value);
    } else {
        *(volatile u32 *)(XAPIC + reg) = value;
    }
}

void apic_eoi(void) { apic_write(APIC_EOI, 0); }

void apic_x2(void)
{
    wrmsr(MSR_APIC_BASE, rdmsr(MSR_APIC_BASE) | BASE_X2 | BASE_ENABLE);
    self()->x2 = true;
}

bool apic_is_x2(void) { return self()->x2; }

void ipi(u32 dest, u32 icr)
{
    if (self()->x2) {
        wrmsr(0x800 + (APIC_ICR >> 4), (u64)dest << 32 | icr);
    } else {
        apic_write(APIC_ICR_HIGH, dest << 24);
        apic_write(APIC_ICR, icr);
        while (apic_read(APIC_ICR) & 0x1000) {
            pause();
        }
    }
}

static void on_wake(struct frame *f)
{
    (void)f;
    apic_eoi();
}

static void on_spurious(struct frame *f) { (void)f; }

static void cpu_init(int index)
{
    cpus[index].self = &cpus[index];
    cpus[index].index = (u64)index;
    cpus[index].x2 = false;
    wrmsr(MSR_GS_BASE, (u64)&cpus[index]);
    idt_load();
    apic_write(APIC_SVR, 0x100 | VECTOR_SPURIOUS);
    apic_write(APIC_TPR, 0);
}

void cpus_init(void);
void cpus_init(void)
{
    handlers[VECTOR_WAKE] = on_wake;
    handlers[VECTOR_SPURIOUS] = on_spurious;
    cpu_init(0);
    cpus[0].up = true;
}

void ap_main(void);
void ap_main(void)
{
    struct cpu *c = (struct cpu *)(ap_stack - sizeof(struct cpu));
    cpu_init((int)(c - cpus));
    c->up = true;
    for (;;) {
        cli();
        if (!c->work) {
            sti_hlt();
            continue;
        }
        sti();
        c->work((int)c->index);
        __atomic_store_n(&c->work, NULL, __ATOMIC_SEQ_CST);
    }
}

/* SDM vol. 3 section 8.4.4.1 */
int cpus_start(int count)
{
    for (int i = 1; i < count; i++) {
        if (cpus[i].up) {
            continue;
        }
        ap_stack = (u64)(&cpus[i] + 1);
        ipi((u32)i, ICR_INIT);
        delay_ns(100000);
        for (int n = 0; n < 2 && !cpus[i].up; n++) {
            ipi((u32)i, ICR_SIPI | AP_PAGE);
            u64 until = time_ns() + (n ? PATIENCE_NS : 200000);
            while (!cpus[i].up && time_ns() < until) {
                pause();
            }
        }
        if (!cpus[i].up) {
            return i;
        }
    }
    return count;
}

void cpu_forget(int cpu)
{
    cpus[cpu].up = false;
    cpus[cpu].work = NULL;
}

void cpu_run(int cpu, void (*work)(int cpu))
{
    __atomic_store_n(&cpus[cpu].work, work, __ATOMIC_SEQ_CST);
    ipi((u32)cpu, ICR_FIXED | VECTOR_WAKE);
}

bool cpu_idle(int cpu) { return __atomic_load_n(&cpus[cpu].work, __ATOMIC_SEQ_CST) == NULL; }

bool cpus_run(int count, void (*work)(int cpu))
{
    for (int i = 1; i < count; i++) {
        cpu_run(i, work);
    }
    work(0);
    for (int i = 1; i < count; i++) {
        if (!await(cpu_idle(i))) {
            return false;
        }
    }
    return true;
}

/* ---- IOAPIC ---- */
u32 ioapic_read(u32 reg)
{
    *(volatile u32 *)IOAPIC = reg;
    return *(volatile u32 *)(IOAPIC + 0x10);
}

void ioapic_write(u32 reg, u32 value)
{
    *(volatile u32 *)IOAPIC = reg;
    *(volatile u32 *)(IOAPIC + 0x10) = value;
}

void ioapic_route(int pin, u32 low, u32 dest)
{
    ioapic_write(0x10 + 2 * (u32)pin, IOAPIC_MASKED);
    ioapic_write(0x11 + 2 * (u32)pin, dest << 24);
    ioapic_write(0x10 + 2 * (u32)pin, low);
}

/* ---- 8259: initialisation words 1 to 4, then the masks ---- */
void pic_init(u8 base, u8 masks_master, u8 masks_slave)
{
    outb(0x20, 0x11);
    outb(0xa0, 0x11);
    outb(0x21, base);
    outb(0xa1, (u8)(base + 8));
    outb(0x21, 4);
    outb(0xa1, 2);
    outb(0x21, 1);
    outb(0xa1, 1);
    outb(0x21, masks_master);
    outb(0xa1, masks_slave);
}
