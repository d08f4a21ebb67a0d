/*
 * Reset by each way there is, each in the middle of a bus-master transfer, and what the next start finds. CMOS byte 50h,
 * which no reset touches, counts the starts.
 */
#include "guest.h"

#define COUNTER 0x50
#define WAYS 6
#define SECTORS 255

static u8 landing[256 * 512] __attribute__((aligned(65536)));

static u8 cmos(u8 reg)
{
    outb(0x70, reg);
    return inb(0x71);
}

static void set_cmos(u8 reg, u8 value)
{
    outb(0x70, reg);
    outb(0x71, value);
}

static const char *const names[WAYS + 1] = {"power_on", "reset_cf9_hard", "reset_cf9_soft", "reset_port_92", "reset_keyboard",
                                            "reset_triple_fault", "reset_qmp"};

static void fresh(int start)
{
    u16 base = (u16)(pci_read(1, 1, 0x20) & 0xfffc); /* as found, not as we would make it */
    bool drive = inb(0x1f7) == 0x50 && inb(0x3f6) == 0x50;
    bool master = base && !inb(base) && !(inb((u16)(base + 2)) & 7) && !inl((u16)(base + 4));
    outb(0x20, 0x0b);
    bool pic = !inb(0x20) && inb(0x21) == 0xff && inb(0xa1) == 0xff;
    u32 routed = 0;
    for (u32 pin = 0; pin < 24; pin++) {
        routed += !(ioapic_read(0x10 + 2 * pin) & IOAPIC_MASKED);
    }
    u32 pending = 0;
    for (u32 i = 0; i < 8; i++) {
        pending |= apic_read(APIC_IRR + 16 * i) | apic_read(APIC_ISR + 16 * i);
    }
    volatile u32 *volatile low = (volatile u32 *)0x500, *volatile high = (volatile u32 *)0x100500; /* A20 tells them apart */
    u32 kept = *high;
    *low = ~kept;
    bool a20 = *high == kept;
    u32 written = 0;
    delay_ns(3000000); /* the old transfer would have gone on by now */
    for (unsigned i = 0; i < sizeof landing; i++) {
        written += landing[i] != 0;
    }
    bool others = cpus_start(2) == 2;
    check(names[start], drive && master && pic && !routed && !pending && a20 && !written && others,
          "drive %d master %d pic %d routed %u pending %x a20 %d written %u others %d", drive, master, pic, routed, pending, a20,
          written, others);
}

static void spin(int cpu)
{
    (void)cpu;
    for (;;) {
        pause();
    }
}

static void ignore(struct frame *f)
{
    (void)f;
    apic_eoi();
}

static void transfer(void)
{
    handlers[0x51] = handlers[0x52] = ignore;
    ioapic_route(14, 0x51, 0);
    ioapic_route(2, 0x52, 1);
    pic_init(0x20, 0, 0);
    cpu_run(1, spin); /* another processor is busy */
    ide_interrupts(true);
    ide_start_dma(0, SECTORS, landing);
}

int main(void)
{
    int start = cmos(COUNTER);
    if (start > WAYS) {
        start = 0;
    }
    fresh(start);
    if (start == WAYS) {
        set_cmos(COUNTER, 0);
        return 0;
    }
    set_cmos(COUNTER, (u8)(start + 1));
    cli();
    transfer();
    switch (start) {
    case 0: outb(0xcf9, 2); outb(0xcf9, 6); break;
    case 1: outb(0xcf9, 0); outb(0xcf9, 4); break;
    case 2: outb(0x92, (u8)(inb(0x92) | 1)); break;
    case 3: outb(0x64, 0xfe); break;
    case 4: {
        struct { u16 limit; u64 base; } __attribute__((packed)) none = {0, 0};
        asm volatile("lidt %0; int3" : : "m"(none));
        break;
    }
    default:
        for (;;) { /* until the host resets us, transfer after transfer */
            print("reset me\n");
            ide_end_dma();
            ide_start_dma(0, SECTORS, landing);
        }
    }
    for (;;) {
        pause();
    }
}
