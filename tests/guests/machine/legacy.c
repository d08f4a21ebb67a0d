/*
 * Interrupts of the board: the 8259 pair through LINT0, spurious ones, PIT, RTC and HPET through the IOAPIC, level-triggered
 * lines that rise and fall around the EOI, and the IDE channel's. A lost interrupt shows as a wait without end.
 */
#include "guest.h"

#define PIC_BASE 0x20
#define VECTOR 0x51
#define VECTOR_LEVEL 0x61
#define HPET 0xfed00000ul
#define LEVEL_TIMER 2 /* of the HPET, for level-triggered tests */

static volatile u32 taken, spurious, served, wanted;

static void sleep_until(u32 count)
{
    for (;;) {
        cli();
        if (taken >= count) {
            sti();
            return;
        }
        sti_hlt();
    }
}

/* ---- 8254 (231164-005), channel 0 ---- */
static void pit(u8 mode, u16 count)
{
    outb(0x43, (u8)(0x30 | mode << 1));
    outb(0x40, (u8)count);
    outb(0x40, (u8)(count >> 8));
}

/* ---- 8259 (231468), INTR at LINT0 as ExtINT ---- */
static void on_irq0(struct frame *f)
{
    (void)f;
    taken++;
    outb(0x20, 0x20);
}

static u8 in_service(void)
{
    outb(0x20, 0x0b);
    return inb(0x20);
}

static void on_irq7(struct frame *f)
{
    (void)f;
    if (in_service() & 0x80) {
        die("a real interrupt 7");
    }
    spurious++; /* no EOI: nothing is in service */
}

static void pic_mode(void)
{
    handlers[PIC_BASE] = on_irq0;
    handlers[PIC_BASE + 7] = on_irq7;
    apic_write(APIC_LVT_LINT0, 0x700);
    pic_init(PIC_BASE, 0xfe, 0xff);
    pit(2, 1193); /* 1 kHz */
    sleep_until(60);
    cli();
    outb(0x21, 0xff);
    pit(4, 0);
    check("pic_pit", !(in_service() & 1), "taken %u, in service %x", taken, in_service());

    /* a request that waits for IF, then for the interrupt in service */
    taken = 0;
    pic_init(PIC_BASE, 0xfe, 0xff);
    pit(0, 20);
    outb(0x20, 0x0a); /* IRR */
    bool requested = await(inb(0x20) & 1);
    bool early = taken;
    sti();
    bool came = await(taken == 1);
    check("pic_waits_for_if", requested && !early && came, "%d %d %u", requested, early, taken);
    outb(0x21, 0xff);

    /* INTA without a request gives the vector of IRQ7 and leaves nothing in service */
    sti();
    apic_write(APIC_LVT_LINT0, 0x10700);
    for (u32 i = 1; i <= 20; i++) {
        ipi(0, ICR_SELF_EXTINT);
        if (!await(spurious == i)) {
            break;
        }
    }
    check("pic_spurious", spurious == 20 && !in_service(), "%u, in service %x", spurious, in_service());

    /* an ISR bit blocks lower ones until its EOI; rotation and specific EOI are the chip tests' */
    taken = 0;
    cli();
    apic_write(APIC_LVT_LINT0, 0x700);
    pic_init(PIC_BASE, 0xfe, 0xff);
    pit(2, 1193);
    for (u32 i = 1; i <= 40; i++) { /* PIC masked and opened again at any moment */
        outb(0x21, 0xff);
        outb(0x21, 0xfe);
        sti();
        sti_hlt();
        cli();
    }
    outb(0x21, 0xff);
    pit(4, 0);
    check("pic_mask_races", taken >= 1 && spurious <= 60, "taken %u, spurious %u", taken, spurious);
    apic_write(APIC_LVT_LINT0, 0x10700);
    sti();
}

/* ---- through the IOAPIC ---- */
static void on_edge(struct frame *f)
{
    (void)f;
    taken++;
    apic_eoi();
}

static void on_rtc(struct frame *f)
{
    (void)f;
    taken++;
    outb(0x70, 0x0c); /* its flags hold the line until they are read */
    (void)inb(0x71);
    apic_eoi();
}

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

static volatile u64 *hpet(u32 reg) { return (volatile u64 *)(HPET + reg); }
static volatile u64 *hpet_timer(int timer, u32 reg) { return hpet(0x100 + 0x20 * (u32)timer + reg); }
static int hpet_route(int timer) { return 31 - __builtin_clz((u32)(*hpet_timer(timer, 0) >> 32)); }

static void edges(void)
{
    handlers[VECTOR] = on_edge;
    taken = 0;
    ioapic_route(2, VECTOR, 0);
    pit(2, 1193);
    sleep_until(50);
    ioapic_route(2, IOAPIC_MASKED, 0);
    pit(4, 0);
    check("pit", true, " ");
    u32 wrong = 0;
    taken = 0;
    ioapic_route(2, VECTOR, 0);
    for (u32 i = 1; i <= 100; i++) { /* one-shot again and again */
        pit(0, (u16)(50 + i));
        sleep_until(i);
        wrong += taken != i;
    }
    ioapic_route(2, IOAPIC_MASKED, 0);
    check("pit_one_shot", !wrong, "%u rounds", wrong);

    handlers[VECTOR] = on_rtc;
    taken = 0;
    ioapic_route(8, VECTOR, 0);
    set_cmos(0x0a, 0x26);                            /* 1024 Hz */
    set_cmos(0x0b, (u8)((cmos(0x0b) | 0x40) & ~0x30)); /* periodic */
    cmos(0x0c);
    sleep_until(50);
    set_cmos(0x0b, (u8)(cmos(0x0b) & ~0x40));
    cmos(0x0c);
    ioapic_route(8, IOAPIC_MASKED, 0);
    check("rtc", true, " ");

    handlers[VECTOR] = on_edge;
    taken = 0;
    int pin = hpet_route(0);
    ioapic_route(pin, VECTOR, 0);
    u64 period = 1000000000000ul / (*hpet(0) >> 32); /* 1 ms */
    for (u64 ahead = period, target = 0; *hpet(0xf0) >= target; ahead *= 2) { /* until it lies ahead when all is written */
        target = *hpet(0xf0) + ahead;
        *hpet_timer(0, 0) = (u64)pin << 9 | 4 | 8 | 64; /* edge, enabled, periodic, value set */
        *hpet_timer(0, 8) = target;
        *hpet_timer(0, 8) = period;
        (void)*hpet_timer(0, 8); /* it has arrived */
    }
    sleep_until(50);
    *hpet_timer(0, 0) = 0;
    ioapic_route(pin, IOAPIC_MASKED, 0);
    check("hpet_periodic", true, " ");
    taken = 0;
    ioapic_route(pin, VECTOR, 0);
    for (u32 i = 1; i <= 200; i++) {
        *hpet_timer(0, 0) = (u64)pin << 9 | 4;
        *hpet_timer(0, 8) = *hpet(0xf0) + period / 10; /* 100 us: may be late, then it is far away: */
        while (taken < i) {
            if (*hpet(0xf0) > *hpet_timer(0, 8) + 20 * period) {
                *hpet_timer(0, 8) = *hpet(0xf0) + period;
            }
            pause();
        }
    }
    *hpet_timer(0, 0) = 0;
    ioapic_route(pin, IOAPIC_MASKED, 0);
    check("hpet_one_shot", taken >= 200, "taken %u", taken);
}

/* ---- level: an HPET timer's status bit holds the line until a one is written to it ---- */
static int level_pin;
static u32 remote_irr(void) { return ioapic_read(0x10 + 2 * (u32)level_pin) & 0x4000; }
static void line_down(void) { *hpet(0x20) = 1u << LEVEL_TIMER; }
static bool is_up(void) { return *hpet(0x20) & 1u << LEVEL_TIMER || served != wanted; }
static void line_up(void) /* the comparator lies a little ahead; should it turn out to lie behind, farther */
{
    *hpet_timer(LEVEL_TIMER, 0) = (u64)level_pin << 9 | 4 | 2;
    wanted = served;
    for (u64 ahead = 100000; !is_up(); ahead *= 2) {
        u64 target = *hpet(0xf0) + ahead;
        *hpet_timer(LEVEL_TIMER, 8) = target;
        (void)*hpet_timer(LEVEL_TIMER, 8); /* it has arrived */
        if (*hpet(0xf0) < target) {
            await(is_up());
            return;
        }
        delay_ns(10000000);
    }
}

static volatile u32 clear_at; /* the how-manieth interrupt takes the cause away; before its EOI */
static void on_level(struct frame *f)
{
    (void)f;
    if (++taken >= clear_at) {
        line_down();
        served++;
    }
    apic_eoi();
}

static void level(void)
{
    handlers[VECTOR_LEVEL] = on_level;
    level_pin = hpet_route(LEVEL_TIMER);
    sti();
    ioapic_route(level_pin, VECTOR_LEVEL | IOAPIC_LEVEL, 0);
    u32 wrong = 0;
    for (u32 i = 1; i <= 30; i++) { /* it comes again at each EOI, until the cause is gone: i times and no more */
        taken = 0;
        clear_at = i;
        line_up();
        wrong += !await(taken >= i);
        delay_ns(200000);
        wrong += taken != i || remote_irr();
    }
    check("level_again_at_eoi", !wrong, "%u wrong", wrong);

    ioapic_route(level_pin, VECTOR_LEVEL | IOAPIC_LEVEL | IOAPIC_MASKED, 0);
    taken = 0;
    clear_at = 1;
    line_up();
    bool masked = !taken;
    ioapic_write(0x10 + 2 * (u32)level_pin, VECTOR_LEVEL | IOAPIC_LEVEL);
    bool came = await(taken == 1);
    check("level_held_while_masked", masked && came, "%d %u", masked, taken);

    taken = 0;
    cli();
    clear_at = 100;
    line_up();
    bool pending = await(apic_bit(APIC_IRR, VECTOR_LEVEL)) && apic_bit(APIC_TMR, VECTOR_LEVEL) && remote_irr();
    line_down(); /* too late: it was accepted */
    sti();
    came = await(taken == 1);
    delay_ns(200000);
    check("level_falls_while_pending", pending && came && taken == 1 && !remote_irr(), "%d %u", pending, taken);
}

/* Two processors: one moves the line as fast as it can, the other takes and ends what comes. Nothing may stick. */
static volatile u32 over;
static void count_level(struct frame *f)
{
    (void)f;
    taken++;
    apic_eoi();
}

static void racing(int cpu)
{
    if (cpu == 0) {
        for (u32 i = 0; i < 1500; i++) {
            *hpet_timer(LEVEL_TIMER, 8) = *hpet(0xf0) + 1;
            for (u32 n = i % 50; n; n--) {
                pause();
            }
            line_down();
        }
        over = 1;
    } else {
        while (!over) {
            pause();
        }
    }
}

static void level_races(void)
{
    handlers[VECTOR_LEVEL] = count_level;
    ioapic_route(level_pin, VECTOR_LEVEL | IOAPIC_LEVEL, 1);
    bool back = cpus_run(2, racing);
    line_down();
    bool free = await(!remote_irr());
    handlers[VECTOR_LEVEL] = on_level;
    taken = 0;
    clear_at = 1;
    line_up();
    bool came = await(taken == 1);
    check("level_races", back && free && came, "%d %d %d", back, free, came);
    *hpet_timer(LEVEL_TIMER, 0) = 0;
    ioapic_route(level_pin, IOAPIC_MASKED, 0);
}

/* ---- the primary IDE channel, pin 14 ---- */
static void on_ide(struct frame *f)
{
    (void)f;
    taken++;
    apic_eoi();
}

static void ide(void)
{
    static u8 buffer[4096] __attribute__((aligned(4096)));
    handlers[VECTOR] = on_ide;
    ide_interrupts(true);
    ioapic_route(14, VECTOR, 0);
    taken = 0;
    u32 failed = 0, wrong = 0;
    for (u32 i = 1; i <= 600; i++) {
        ide_start_dma(i % 32, 8, buffer);
        sleep_until(i);
        failed += !ide_end_dma();
        wrong += taken != i;
    }
    check("ide_interrupts", !failed && !wrong, "%u failed, %u counts wrong", failed, wrong);
    ioapic_route(14, VECTOR, 1); /* asleep elsewhere than where it is taken */
    taken = 0;
    for (u32 i = 1; i <= 200 && !failed; i++) {
        ide_start_dma(i % 32, 8, buffer);
        failed += !await(taken == i);
        failed += !ide_end_dma();
    }
    check("ide_interrupts_elsewhere", !failed, "%u failed", failed);
    ioapic_route(14, IOAPIC_MASKED, 0);
}

int main(void)
{
    if (cpus_start(2) != 2) {
        die("a processor does not start");
    }
    cli();
    pic_mode();
    edges();
    level();
    level_races();
    ide();
    return 0;
}
