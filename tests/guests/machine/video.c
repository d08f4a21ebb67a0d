/*
 * The VGA card: text and planar memory hold what was written; bank, cursor and start addresses past video RAM (item 11); and
 * two more of the hardware cases that ports alone show: fw_cfg selectors out of range, the 8254's read-back (item 10).
 * "shoot" lines ask the host for a picture; it presses a key when it has one.
 */
#include "guest.h"

#define TEXT ((volatile u16 *)0xb8000ul)
#define PLANES ((volatile u8 *)0xa0000ul)
#define VBE_INDEX 0x1ce
#define VBE_DATA 0x1cf
enum { VBE_ID, VBE_XRES, VBE_YRES, VBE_BPP, VBE_ENABLE, VBE_BANK, VBE_VIRT_WIDTH, VBE_VIRT_HEIGHT, VBE_X, VBE_Y };

static void vbe(u16 index, u16 value)
{
    outw(VBE_INDEX, index);
    outw(VBE_DATA, value);
}

static u16 vbe_read(u16 index)
{
    outw(VBE_INDEX, index);
    return inw(VBE_DATA);
}

static void set(u16 port, u8 index, u8 value)
{
    outb(port, index);
    outb((u16)(port + 1), value);
}

static void shoot(const char *what)
{
    print("shoot %s\n", what);
    bool key = false;
    while (!key) { /* i8042: output buffer full */
        key = inb(0x64) & 1;
        pause();
    }
    while (inb(0x64) & 1) {
        (void)inb(0x60);
        delay_ns(1000000);
    }
}

static void text(void)
{
    u32 wrong = 0;
    for (u16 i = 0; i < 2000; i++) {
        TEXT[i] = (u16)(0x1f00 | (0x20 + i % 95));
    }
    for (u16 i = 0; i < 2000; i++) {
        wrong += TEXT[i] != (0x1f00 | (0x20 + i % 95));
    }
    check("text_memory", !wrong, "%u cells", wrong);
    shoot("text");
    set(0x3d4, 0x0e, 0xff); /* cursor and start address far out */
    set(0x3d4, 0x0f, 0xff);
    shoot("cursor_out");
    set(0x3d4, 0x0c, 0xff);
    set(0x3d4, 0x0d, 0xf0);
    set(0x3d4, 0x13, 0xff); /* offset: the longest lines */
    shoot("start_out");
    set(0x3d4, 0x0c, 0);
    set(0x3d4, 0x0d, 0);
    set(0x3d4, 0x13, 40);
}

static void planar(void)
{
    set(0x3c4, 4, 0x06); /* planes, no chain */
    set(0x3ce, 6, 0x05); /* graphics, A0000h, 64 KiB */
    set(0x3ce, 5, 0);    /* write mode 0, read mode 0 */
    set(0x3ce, 1, 0);
    set(0x3ce, 3, 0);
    set(0x3ce, 8, 0xff);
    u32 wrong = 0;
    for (u8 plane = 0; plane < 4; plane++) {
        set(0x3c4, 2, (u8)(1 << plane));
        for (u32 i = 0; i < 8; i++) {
            PLANES[i] = (u8)(0x11 * (plane + 1) + i);
            PLANES[0xfff8 + i] = (u8)(0x22 * (plane + 1) + i);
        }
    }
    for (u8 plane = 0; plane < 4; plane++) {
        set(0x3ce, 4, plane);
        for (u32 i = 0; i < 8; i++) {
            wrong += PLANES[i] != (u8)(0x11 * (plane + 1) + i);
            wrong += PLANES[0xfff8 + i] != (u8)(0x22 * (plane + 1) + i);
        }
    }
    check("planar_memory", !wrong, "%u bytes", wrong);
    set(0x3c4, 2, 0x0f);
    set(0x3ce, 1, 0x0f); /* set/reset on all planes, bit mask: read-modify-write through the latches */
    set(0x3ce, 0, 0x05);
    set(0x3ce, 8, 0x0f);
    (void)PLANES[0];
    PLANES[0] = 0xff;
    bool latched = true;
    for (u8 plane = 0; plane < 4; plane++) {
        set(0x3ce, 4, plane);
        u8 old = (u8)(0x11 * (plane + 1));
        latched &= PLANES[0] == (u8)((old & 0xf0) | (5 >> plane & 1 ? 0x0f : 0));
    }
    check("planar_latches", latched, "%x", PLANES[0]);
    set(0x3ce, 1, 0);
    set(0x3ce, 8, 0xff);
}

static void linear(void)
{
    pci_write(2, 0, 0x10, 0xfd000000);
    pci_write(2, 0, 0x04, 3);
    volatile u8 *frame = (volatile u8 *)0xfd000000ul;
    vbe(VBE_ENABLE, 0);
    vbe(VBE_XRES, 640);
    vbe(VBE_YRES, 480);
    vbe(VBE_BPP, 32);
    vbe(VBE_ENABLE, 0x41);
    for (u32 i = 0; i < 640 * 480; i += 97) {
        *(volatile u32 *)(frame + 4 * i) = 0x00ff8040;
    }
    bool id = (vbe_read(VBE_ID) & 0xfff0) == 0xb0c0 && vbe_read(VBE_XRES) == 640;
    vbe(VBE_BANK, 3);
    PLANES[5] = 0x77;
    bool banked = frame[3 * 65536 + 5] == 0x77;
    check("vbe_bank", id && banked, "%d %d", id, banked);
    shoot("linear");
    static const u16 banks[] = {0x00ff, 0x0100, 0x01ff, 0x7fff, 0xffff};
    for (unsigned i = 0; i < COUNT(banks); i++) { /* past video RAM: nothing of ours is touched */
        vbe(VBE_BANK, banks[i]);
        for (u32 at = 0; at < 0x10000; at += 4099) {
            PLANES[at] = 0x66;
            (void)PLANES[at];
        }
    }
    vbe(VBE_BANK, 0);
    vbe(VBE_VIRT_WIDTH, 0xffff);
    vbe(VBE_X, 0xffff);
    vbe(VBE_Y, 0xffff);
    shoot("offsets_out");
    vbe(VBE_ENABLE, 0);
    vbe(VBE_XRES, 0xffff);
    vbe(VBE_YRES, 0xffff);
    vbe(VBE_BPP, 0xffff);
    vbe(VBE_ENABLE, 0x41);
    shoot("sizes_out");
    vbe(VBE_ENABLE, 0);
    vbe(VBE_XRES, 0);
    vbe(VBE_YRES, 0);
    vbe(VBE_BPP, 4);
    vbe(VBE_ENABLE, 0x41);
    shoot("no_size");
    vbe(VBE_ENABLE, 0);
    check("vbe_out_of_range", true, " ");
}

static void ports(void)
{
    u32 wrong = 0;
    for (u32 selector = 0; selector < 0x10000; selector += 0x0fff) { /* CVE-2016-1714: past the last entry reads 0 */
        outw(0x510, (u16)(selector | 0x3f00));
        for (int i = 0; i < 40; i++) {
            wrong += inb(0x511) != 0;
            outb(0x511, 0xff);
        }
    }
    outw(0x510, 0);
    bool signature = inb(0x511) == 'Q' && inb(0x511) == 'E' && inb(0x511) == 'M' && inb(0x511) == 'U' && inb(0x511) == 0;
    check("fw_cfg_selectors", !wrong && signature, "%u bytes, %d", wrong, signature);
    for (u32 word = 0; word < 256; word++) { /* CVE-2015-3215: channel 3 and all read-backs */
        outb(0x43, (u8)(0xc0 | word));
        (void)inb(0x43);
        for (u16 port = 0x40; port < 0x44; port++) {
            (void)inb(port);
        }
    }
    outb(0x43, 0xb0); /* channel 2, mode 0, low then high */
    outb(0x42, 0x34);
    outb(0x42, 0x12);
    outb(0x43, 0xe8); /* read-back: status of channel 2 */
    u8 status = inb(0x42);
    check("pit_read_back", (status & 0x3f) == 0x30, "%x", status);
}

int main(void)
{
    ports();
    text();
    planar();
    linear();
    return 0;
}
