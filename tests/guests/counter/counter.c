/* A bare-metal guest that counts, and would notice if its memory, its clock or its interrupts were not its own.
 *
 * Multiboot, 32-bit, no library. At each tick of the PIT (100 Hz) it looks whether a page has what it wrote there PAGES ticks
 * ago, writes the tick's number over the whole page, and says "n XXXXXXXX" on COM1; or "bad XXXXXXXX" and no more. The console
 * of a machine, or of the machines that it has lived in one after another, is thus a sequence without a gap or a repetition.
 *
 * What reaches it on COM1 are orders: R resets by port CF9h, T by a triple fault, O powers off.
 *
 * Sources: Multiboot 0.6.96 section 3.1; 16550D section 8; 8259A and 8254 data sheets; ACPI 6.4 section 4.8.3.
 */
typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;

enum { COM1 = 0x3F8, PIC1 = 0x20, PIC2 = 0xA0, PIT = 0x40, PM_CONTROL = 0x604, S5_ENABLE = 0x2000 };
enum { CODE = 8, IRQ_BASE = 0x20, HZ = 100, PIT_HZ = 1193182 };
enum { FIRST_PAGE = 0x400000, PAGES = 256, WORDS = 1024 };

__attribute__((section(".text.multiboot"), used, aligned(4)))
static const u32 multiboot_header[] = { 0x1BADB002, 0, -0x1BADB002u };

static inline void outb(u16 port, u8 value) { __asm__ volatile("outb %0, %1" : : "a"(value), "Nd"(port)); }
static inline void outw(u16 port, u16 value) { __asm__ volatile("outw %0, %1" : : "a"(value), "Nd"(port)); }
static inline u8 inb(u16 port) { u8 v; __asm__ volatile("inb %1, %0" : "=a"(v) : "Nd"(port)); return v; }

static void put(const char *text)
{
    for (; *text; text++) {
        while (!(inb(COM1 + 5) & 0x20))
            ;
        outb(COM1, (u8)*text);
    }
}

static void put_word(const char *what, u32 value)
{
    static const char digits[] = "0123456789abcdef";
    char text[10];
    for (int i = 0; i < 8; i++)
        text[i] = digits[value >> (28 - 4 * i) & 15];
    text[8] = '\n';
    text[9] = 0;
    put(what);
    put(text);
}

/* ---- interrupts ---- */
struct frame;
struct __attribute__((packed)) table { u16 limit; const void *base; };

static u32 gdt[6] = { 0, 0, 0x0000FFFF, 0x00CF9B00, 0x0000FFFF, 0x00CF9300 };
static u32 idt[2 * (IRQ_BASE + 8)];
static volatile u32 ticks;

__attribute__((interrupt)) static void on_tick(struct frame *frame)
{
    (void)frame;
    ticks++;
    outb(PIC1, 0x20);
}

static void set_up_interrupts(void)
{
    u32 at = (u32)on_tick;
    idt[2 * IRQ_BASE] = CODE << 16 | (at & 0xFFFF);
    idt[2 * IRQ_BASE + 1] = (at & 0xFFFF0000) | 0x8E00;
    struct table g = { sizeof gdt - 1, gdt }, i = { sizeof idt - 1, idt };
    __asm__ volatile("lgdt %0; ljmp %1, $1f; 1: mov %2, %%ds; mov %2, %%es; mov %2, %%ss; lidt %3"
                     : : "m"(g), "i"(CODE), "r"(CODE + 8), "m"(i) : "memory");
    outb(PIC1, 0x11);
    outb(PIC1 + 1, IRQ_BASE);
    outb(PIC1 + 1, 4);
    outb(PIC1 + 1, 1);
    outb(PIC1 + 1, 0xFE);
    outb(PIC2 + 1, 0xFF);
    *(volatile u32 *)0xFEE000F0 = 0x1FF; /* local APIC on, */
    *(volatile u32 *)0xFEE00350 = 0x700; /* LINT0 is the PIC's */
    outb(PIT + 3, 0x34);
    outb(PIT, (PIT_HZ / HZ) & 0xFF);
    outb(PIT, (PIT_HZ / HZ) >> 8);
}

/* ---- memory ---- */
/* Whether the page of tick n is as PAGES ticks ago left it; then it is this tick's. */
static int turn(u32 n)
{
    volatile u32 *page = (volatile u32 *)(FIRST_PAGE + n % PAGES * 4096);
    u32 before = n > PAGES ? n - PAGES : 0;
    for (int i = 0; i < WORDS; i++) {
        if (page[i] != before)
            return 0;
        page[i] = n;
    }
    return 1;
}

static void order(u8 byte)
{
    static const struct table none;
    switch (byte) {
    case 'R': outb(0xCF9, 6); break;
    case 'T': __asm__ volatile("lidt %0; int3" : : "m"(none)); break;
    case 'O': outw(PM_CONTROL, S5_ENABLE); break;
    }
}

__attribute__((used)) static void guest(void)
{
    for (volatile u32 *word = (u32 *)FIRST_PAGE; word < (u32 *)(FIRST_PAGE + PAGES * 4096); word++)
        *word = 0; /* a reset leaves memory as it is */
    set_up_interrupts();
    for (u32 n = 1;; n++) {
        while (ticks < n)
            __asm__ volatile("sti; hlt; cli");
        if (!turn(n)) {
            put_word("bad ", n);
            __asm__ volatile("cli; hlt");
        }
        put_word("n ", n);
        while (inb(COM1 + 5) & 1)
            order(inb(COM1));
    }
}

__attribute__((naked)) void _start(void) { __asm__("mov $0x8f000, %esp; cld; call guest"); }
