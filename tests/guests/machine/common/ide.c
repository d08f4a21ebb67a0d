/* The primary IDE disk by its registers (ATA/ATAPI-6; BMIDE 1.0), polled. */
#include "guest.h"

#define TASK 0x1f0
#define CONTROL 0x3f6
enum { DATA, FEATURES, SECTOR_COUNT, LBA_LOW, LBA_MID, LBA_HIGH, DEVICE, COMMAND };
#define READ_SECTORS 0x20
#define READ_DMA 0xc8
#define BSY 0x80
#define DRQ 0x08
#define ERR 0x01
#define SECTOR 512u

struct prd { u32 address; u16 bytes; u16 last; };
static struct prd table[16] __attribute__((aligned(256)));
static u16 master; /* bus-master registers */

u16 ide_master(void)
{
    if (!master) {
        pci_write(1, 1, 0x04, pci_read(1, 1, 0x04) | 5); /* I/O space, bus master */
        u32 bar = pci_read(1, 1, 0x20) & 0xfffc;
        if (!bar) { /* no firmware has been here */
            bar = 0xc000;
            pci_write(1, 1, 0x20, bar);
        }
        pci_write(1, 1, 0x40, pci_read(1, 1, 0x40) | 0x80008000); /* both channels decode */
        master = (u16)bar;
    }
    return master;
}

static void command(u32 lba, u8 count, u8 opcode)
{
    outb(TASK + DEVICE, (u8)(0xe0 | lba >> 24));
    outb(TASK + SECTOR_COUNT, count);
    outb(TASK + LBA_LOW, (u8)lba);
    outb(TASK + LBA_MID, (u8)(lba >> 8));
    outb(TASK + LBA_HIGH, (u8)(lba >> 16));
    outb(TASK + COMMAND, opcode);
}

void ide_start_dma(u32 lba, u8 count, void *to)
{
    u16 base = ide_master();
    table[0] = (struct prd){(u32)(u64)to, (u16)(count * SECTOR), 0x8000};
    outb(base, 0);
    outb((u16)(base + 2), 6);
    outl((u16)(base + 4), (u32)(u64)table);
    outb(base, 8);
    command(lba, count, READ_DMA);
    outb(base, 9);
}

bool ide_end_dma(void)
{
    u16 base = ide_master();
    bool came = await(inb((u16)(base + 2)) & 4);
    outb(base, 0);
    u8 status = inb(TASK + COMMAND);
    outb((u16)(base + 2), 4);
    return came && !(status & (BSY | DRQ | ERR));
}

bool ide_read_dma(u32 lba, u8 count, void *to)
{
    ide_start_dma(lba, count, to);
    return ide_end_dma();
}

bool ide_read_pio(u32 lba, void *to)
{
    ide_master();
    command(lba, 1, READ_SECTORS);
    if (!await(!(inb(CONTROL) & BSY))) {
        return false;
    }
    if ((inb(TASK + COMMAND) & (DRQ | ERR)) != DRQ) {
        return false;
    }
    insw(TASK + DATA, to, SECTOR / 2);
    return true;
}

void ide_interrupts(bool on) { outb(CONTROL, on ? 0 : 2); }
