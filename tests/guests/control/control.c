/* A bare-metal guest that a test controls over COM1: it answers, shows a picture, and sleeps in between.
 *
 * Multiboot, 32-bit, no library. It prints "ready", then for what reaches it: "got XX" for a byte on
 * COM1, "key XX" for one of the keyboard controller, "nmi", "button" for the ACPI power button. Some
 * bytes are orders: R resets by port CF9h, T by a triple fault, O powers off, D ends through
 * isa-debug-exit with value 10h, H halts for ever, S spins, I reads the IDE status for ever.
 *
 * Sources: Multiboot 0.6.96 section 3.1; 16550D section 8; 8259A data sheet; ACPI 6.4 section 4.8.3;
 * Bochs VBE extensions.
 */
typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;

enum { COM1 = 0x3F8, PIC1 = 0x20, PIC2 = 0xA0, KBD = 0x60, PCI = 0xCF8, VBE = 0x1CE };
enum { PM_STATUS = 0x600, PM_ENABLE = 0x602, PM_CONTROL = 0x604, POWER_BUTTON = 1 << 8, S5_ENABLE = 0x2000 };
enum { CODE = 8, IRQ_BASE = 0x20, VECTOR_NMI = 2 };
enum { WIDTH = 64, HEIGHT = 48 };

__attribute__((section(".text.multiboot"), used, aligned(4)))
static const u32 multiboot_header[] = { 0x1BADB002, 0, -0x1BADB002u };

static inline void outb(u16 port, u8 value) { __asm__ volatile("outb %0, %1" : : "a"(value), "Nd"(port)); }
static inline void outw(u16 port, u16 value) { __asm__ volatile("outw %0, %1" : : "a"(value), "Nd"(port)); }
static inline void outl(u16 port, u32 value) { __asm__ volatile("outl %0, %1" : : "a"(value), "Nd"(port)); }
static inline u8 inb(u16 port) { u8 v; __asm__ volatile("inb %1, %0" : "=a"(v) : "Nd"(port)); return v; }
static inline u16 inw(u16 port) { u16 v; __asm__ volatile("inw %1, %0" : "=a"(v) : "Nd"(port)); return v; }
static inline u32 inl(u16 port) { u32 v; __asm__ volatile("inl %1, %0" : "=a"(v) : "Nd"(port)); return v; }

static void put(const char *text)
{
    for (; *text; text++) {
        while (!(inb(COM1 + 5) & 0x20))
            ;
        outb(COM1, (u8)*text);
    }
}

static void put_byte(const char *what, u8 value)
{
    static const char digits[] = "0123456789abcdef";
    char text[] = { digits[value >> 4], digits[value & 15], '\n', 0 };
    put(what);
    put(text);
}

/* ---- interrupts ---- */
struct frame;
struct __attribute__((packed)) table { u16 limit; const void *base; };

static u32 gdt[6] = { 0, 0, 0x0000FFFF, 0x00CF9B00, 0x0000FFFF, 0x00CF9300 };
static u32 idt[2 * (IRQ_BASE + 16)];
static volatile int pressed;

/* prints at once: a flag set between the main loop's look and its HLT would be overslept */
__attribute__((interrupt)) static void on_nmi(struct frame *frame) { (void)frame; put("nmi\n"); }
__attribute__((interrupt)) static void on_irq(struct frame *frame)
{
    (void)frame;
    if (inw(PM_STATUS) & POWER_BUTTON) { /* a level: it must go before the EOI */
        outw(PM_STATUS, POWER_BUTTON);
        pressed = 1;
    }
    outb(PIC2, 0x20);
    outb(PIC1, 0x20);
}

static void gate(int vector, void (*handler)(struct frame *))
{
    u32 at = (u32)handler;
    idt[2 * vector] = CODE << 16 | (at & 0xFFFF);
    idt[2 * vector + 1] = (at & 0xFFFF0000) | 0x8E00;
}

static void load_tables(void)
{
    struct table g = { sizeof gdt - 1, gdt }, i = { sizeof idt - 1, idt };
    __asm__ volatile("lgdt %0; ljmp %1, $1f; 1: mov %2, %%ds; mov %2, %%es; mov %2, %%ss; lidt %3"
                     : : "m"(g), "i"(CODE), "r"(CODE + 8), "m"(i) : "memory");
}

static void set_up_interrupts(void)
{
    static const u8 words[][2] = { { 0x11, 0x11 }, { IRQ_BASE, IRQ_BASE + 8 }, { 4, 2 }, { 1, 1 } };
    gate(VECTOR_NMI, on_nmi);
    for (int irq = 0; irq < 16; irq++)
        gate(IRQ_BASE + irq, on_irq);
    load_tables();
    outb(PIC1, words[0][0]);
    outb(PIC2, words[0][1]);
    for (int i = 1; i < 4; i++) {
        outb(PIC1 + 1, words[i][0]);
        outb(PIC2 + 1, words[i][1]);
    }
    outb(PIC1 + 1, (u8)~(1 << 1 | 1 << 2 | 1 << 4)); /* keyboard, cascade, COM1 */
    outb(PIC2 + 1, (u8)~(1 << 1));                   /* SCI */
    *(volatile u32 *)0xFEE000F0 = 0x1FF;             /* local APIC on, */
    *(volatile u32 *)0xFEE00350 = 0x700;             /* LINT0 is the PIC's */
    outb(COM1 + 3, 3);
    outb(COM1 + 2, 1);
    outb(COM1 + 4, 0xB);
    outb(COM1 + 1, 1);
    outb(KBD + 4, 0x60); /* command byte: */
    outb(KBD, 0x41);     /* keyboard interrupt, scan codes of set 1 */
    outw(PM_ENABLE, POWER_BUTTON);
}

/* ---- screen ---- */
static void vbe(u16 index, u16 value)
{
    outw(VBE, index);
    outw(VBE + 1, value);
}

/* Pixel (x, y) is (4x, 5y, 80h) where there is a VGA card at 0:2.0 with a frame buffer. */
static void picture(void)
{
    outl(PCI, 0x80000000 | 2 << 11);
    if (inl(PCI + 4) != 0x11111234)
        return;
    outl(PCI, 0x80000000 | 2 << 11 | 4);
    outl(PCI + 4, inl(PCI + 4) | 3);
    outl(PCI, 0x80000000 | 2 << 11 | 0x10);
    if (!(inl(PCI + 4) & ~15u))
        outl(PCI + 4, 0xFD000000);
    volatile u32 *pixels = (volatile u32 *)(inl(PCI + 4) & ~15u);
    vbe(4, 0);
    vbe(1, WIDTH);
    vbe(2, HEIGHT);
    vbe(3, 32);
    vbe(4, 0x41);
    outb(0x3C0, 0x20); /* let the attribute controller show */
    for (u32 y = 0; y < HEIGHT; y++)
        for (u32 x = 0; x < WIDTH; x++)
            pixels[y * WIDTH + x] = (4 * x) << 16 | (5 * y) << 8 | 0x80;
}

/* ---- orders ---- */
static void order(u8 byte)
{
    static const struct table none;
    switch (byte) {
    case 'R': outb(0xCF9, 6); break;
    case 'T': __asm__ volatile("lidt %0; int3" : : "m"(none)); break;
    case 'O': outw(PM_CONTROL, S5_ENABLE); break;
    case 'D': outb(0x501, 0x10); break;
    case 'H': __asm__ volatile("cli; hlt"); break;
    case 'S': for (;;) __asm__ volatile("pause");
    case 'I': for (;;) inb(0x1F7);
    }
}

__attribute__((used)) static void guest(void)
{
    set_up_interrupts();
    picture();
    put("ready\n");
    for (;;) {
        int quiet = 1;
        while (inb(COM1 + 5) & 1) {
            u8 byte = inb(COM1);
            put_byte("got ", byte);
            order(byte);
            quiet = 0;
        }
        while (inb(KBD + 4) & 1) {
            put_byte("key ", inb(KBD));
            quiet = 0;
        }
        if (pressed) {
            pressed = 0;
            put("button\n");
        }
        if (quiet)
            __asm__ volatile("sti; hlt; cli");
    }
}

__attribute__((naked)) void _start(void) { __asm__("mov $0x8f000, %esp; cld; call guest"); }
