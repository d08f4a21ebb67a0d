/* A bare-metal guest that counts in memory and on its disk, and would notice if the two were not of one moment.
 *
 * Multiboot, 32-bit, no library. It clears its sectors and pages. Then, for n = 1, 2, 3, ... it reads sector n % SECTORS of the
 * primary master by PIO, which must hold what it wrote there SECTORS numbers ago, as must a page of memory; writes n over both,
 * flushes now and then, and says "n XXXXXXXX" on COM1; or "bad XXXXXXXX" and no more. In between it sleeps for a tick of the PIT
 * (100 Hz).
 *
 * O on COM1 powers off.
 *
 * Sources: Multiboot 0.6.96 section 3.1; ATA8-ACS sections 7.10, 7.24, 7.61; 8259A and 8254 data sheets.
 */
typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;

enum { COM1 = 0x3F8, PIC1 = 0x20, PIC2 = 0xA0, PIT = 0x40, PM_CONTROL = 0x604, S5_ENABLE = 0x2000 };
enum { DATA = 0x1F0, COUNT = 0x1F2, LBA0, LBA1, LBA2, DEVICE, COMMAND, CONTROL = 0x3F6 };
enum { READ = 0x20, WRITE = 0x30, FLUSH = 0xE7, BUSY = 0x80, READY = 0x40, DRQ = 8, ERR = 1, NIEN = 2 };
enum { CODE = 8, IRQ_BASE = 0x20, HZ = 100, PIT_HZ = 1193182 };
enum { FIRST_PAGE = 0x400000, SECTORS = 32, WORDS = 128, PAGE_WORDS = 1024 };

__attribute__((section(".text.multiboot"), used, aligned(4)))
static const u32 multiboot_header[] = { 0x1BADB002, 0, -0x1BADB002u };

static inline void outb(u16 port, u8 value) { __asm__ volatile("outb %0, %1" : : "a"(value), "Nd"(port)); }
static inline void outw(u16 port, u16 value) { __asm__ volatile("outw %0, %1" : : "a"(value), "Nd"(port)); }
static inline u8 inb(u16 port) { u8 v; __asm__ volatile("inb %1, %0" : "=a"(v) : "Nd"(port)); return v; }
static inline u16 inw(u16 port) { u16 v; __asm__ volatile("inw %1, %0" : "=a"(v) : "Nd"(port)); return v; }

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

__attribute__((interrupt)) static void on_tick(struct frame *frame)
{
    (void)frame;
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

/* ---- disk ---- */
static int begin(u8 command, u32 sector)
{
    outb(DEVICE, 0xE0);
    while (inb(COMMAND) & BUSY)
        ;
    outb(COUNT, 1);
    outb(LBA0, (u8)sector);
    outb(LBA1, 0);
    outb(LBA2, 0);
    outb(COMMAND, command);
    while (inb(COMMAND) & BUSY)
        ;
    return !(inb(COMMAND) & ERR);
}

static int write_sector(u32 sector, u32 value)
{
    if (!begin(WRITE, sector))
        return 0;
    for (int i = 0; i < WORDS; i++) {
        outw(DATA, (u16)value);
        outw(DATA, (u16)(value >> 16));
    }
    while (inb(COMMAND) & BUSY)
        ;
    return !(inb(COMMAND) & ERR);
}

static int turn_sector(u32 n)
{
    u32 before = n > SECTORS ? n - SECTORS : 0, sector = n % SECTORS;
    int good = begin(READ, sector);
    for (int i = 0; good && i < WORDS; i++) {
        u32 low = inw(DATA), high = inw(DATA);
        good = (high << 16 | low) == before;
    }
    return good && write_sector(sector, n) && (n % 16 || begin(FLUSH, 0));
}

static int turn_page(u32 n)
{
    volatile u32 *page = (volatile u32 *)(FIRST_PAGE + n % SECTORS * 4096);
    u32 before = n > SECTORS ? n - SECTORS : 0;
    for (int i = 0; i < PAGE_WORDS; i++) {
        if (page[i] != before)
            return 0;
        page[i] = n;
    }
    return 1;
}

__attribute__((used)) static void guest(void)
{
    set_up_interrupts();
    outb(CONTROL, NIEN);
    for (u32 sector = 0; sector < SECTORS; sector++)
        write_sector(sector, 0);
    for (u32 i = 0; i < SECTORS * PAGE_WORDS; i++)
        ((volatile u32 *)FIRST_PAGE)[i] = 0;
    for (u32 n = 1;; n++) {
        __asm__ volatile("sti; hlt; cli");
        if (!turn_page(n) || !turn_sector(n)) {
            put_word("bad ", n);
            __asm__ volatile("cli; hlt");
        }
        put_word("n ", n);
        while (inb(COM1 + 5) & 1)
            if (inb(COM1) == 'O')
                outw(PM_CONTROL, S5_ENABLE);
    }
}

__attribute__((naked)) void _start(void) { __asm__("mov $0x8f000, %esp; cld; call guest"); }
