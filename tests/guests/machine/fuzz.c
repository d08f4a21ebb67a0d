/*
 * Item 12 of the hardware cases: random values to and from every port and every address of a device, in every width, with a
 * fixed seed. Left out is what ends or resets the machine, shuts A20 over our own code, or sends us an INIT.
 * It ends with "fuzz: done", whatever came of the devices.
 */
#include "guest.h"

#ifndef ROUNDS
#define ROUNDS 12000u
#endif
#define SEED 0x9e3779b97f4a7c15ul

struct range { u64 first, last; };
static const struct range ports[] = {
    {0x00, 0x1f}, {0x20, 0x21}, {0x40, 0x43}, {0x60, 0x64}, {0x70, 0x73}, {0x80, 0x91}, {0xa0, 0xa1}, {0xb2, 0xb3}, {0xc0, 0xdf},
    {0xe9, 0xe9}, {0x170, 0x177}, {0x1ce, 0x1d1}, {0x1f0, 0x1f7}, {0x2f8, 0x2ff}, {0x376, 0x376}, {0x3b0, 0x3df}, {0x3f0, 0x3f7},
    {0x3f8, 0x3ff}, {0x402, 0x402}, {0x4d0, 0x4d1}, {0x510, 0x51b}, {0x600, 0x63f}, {0xcf8, 0xcff}, {0xb000, 0xb03f}, {0xc000, 0xc00f},
};
static const struct range memory[] = {
    {0xa0000, 0xbffff}, {0xc0000, 0xfffff}, {0xd0000000, 0xd0000fff}, {0xfd000000, 0xfdffffff}, {0xfebf0000, 0xfebf0fff},
    {0xfec00000, 0xfec00fff}, {0xfed00000, 0xfed003ff}, {0xfee00000, 0xfee003ff}, {0xfffc0000, 0xffffffff},
};
/* A20 and reset; debug exit; reset control; PM1 control (S5) */
static const struct range kept[] = {{0x92, 0x92}, {0xf4, 0xf7}, {0xcf9, 0xcf9}, {0x604, 0x605}, {0xb004, 0xb005}};

static u64 seed = SEED;
static u64 any(void) { return random64(&seed); }

static bool overlaps(const struct range *r, unsigned n, u64 at, u64 width)
{
    for (unsigned i = 0; i < n; i++) {
        if (at <= r[i].last && at + width > r[i].first) {
            return true;
        }
    }
    return false;
}

static bool config_is_kept(void) /* the power-management base, which would move PM1 control to where we do not know it */
{
    u32 address = inl(0xcf8);
    return (address & 0xffc0) == (1u << 11 | 3u << 8 | 0x40);
}

static void poke_port(u32 port, u32 width, u32 value, u32 what)
{
    static u8 buffer[256];
    if (overlaps(kept, COUNT(kept), port, width) || port + width > 0x10000) {
        return;
    }
    if (what & 1) {
        if (port <= 0x64 && port + width > 0x64) { /* pulses of the output port, and what writes it */
            port = 0x64;
            width = 1;
            value &= 0x7f;
        }
        if (port + width > 0xcfc && port <= 0xcff && config_is_kept()) {
            return;
        }
    }
    switch (width << 4 | (what & 3)) {
    case 0x10: case 0x12: (void)inb((u16)port); break;
    case 0x20: (void)inw((u16)port); break;
    case 0x40: (void)inl((u16)port); break;
    case 0x11: case 0x13: outb((u16)port, (u8)value); break;
    case 0x21: outw((u16)port, (u16)value); break;
    case 0x41: outl((u16)port, value); break;
    case 0x22: insw((u16)port, buffer, value % 64); break;
    case 0x23: outsw((u16)port, buffer, value % 64); break;
    case 0x42: {
        void *to = buffer;
        u64 n = value % 32;
        asm volatile("rep insl" : "+D"(to), "+c"(n) : "d"((u16)port) : "memory");
        break;
    }
    default: {
        const void *from = buffer;
        u64 n = value % 32;
        asm volatile("rep outsl" : "+S"(from), "+c"(n) : "d"((u16)port) : "memory");
    }
    }
}

static void poke_memory(u64 at, u32 width, u64 value, bool write)
{
    if (write && at >= 0xfee00300 && at < 0xfee00320) {
        return; /* ICR: INIT */
    }
    if (write && at >= 0xfee000f0 && at < 0xfee00100) {
        value |= 0x1ff;
    }
    if (write && at < 0xfec01000 && at >= 0xfec00000) {
        value &= ~0x0700070007000700ul; /* every redirection entry stays with fixed delivery */
    }
    switch (width << 1 | write) {
    case 2: (void)*(volatile u8 *)at; break;
    case 3: *(volatile u8 *)at = (u8)value; break;
    case 4: (void)*(volatile u16 *)at; break;
    case 5: *(volatile u16 *)at = (u16)value; break;
    case 8: (void)*(volatile u32 *)at; break;
    case 9: *(volatile u32 *)at = (u32)value; break;
    case 16: (void)*(volatile u64 *)at; break;
    default: *(volatile u64 *)at = value;
    }
}

static void ignore(struct frame *f)
{
    if (f->vector >= 32) {
        apic_eoi();
    }
}

static void say(const char *what) /* the console's registers are as random as the rest */
{
    outb(0x3fb, 3);
    outb(0x3f9, 0);
    outb(0x3fc, 3);
    print("\nfuzz: %s\n", what);
}

static u64 within(const struct range *r) { return r->first + any() % (r->last - r->first + 1); }

int main(void)
{
    for (int i = 0; i < 256; i++) {
        if (i == 2 || i >= 32) {
            handlers[i] = ignore;
        }
    }
    pci_write(2, 0, 0x10, 0xfd000000); /* the VGA card, as firmware would place it */
    pci_write(2, 0, 0x18, 0xfebf0000);
    pci_write(2, 0, 0x04, 3);
    ide_master();
    for (u32 port = 0; port < 0x10000; port += 1 + (u32)(any() % 3)) { /* everywhere once; nearly all of it is nobody's */
        poke_port(port, 1u << any() % 3, (u32)any(), (u32)any() & 1);
    }
    say("every port");
    for (u32 i = 0; i < ROUNDS; i++) {
        u64 dice = any();
        if (dice & 3) {
            u32 port = (u32)within(&ports[(dice >> 8) % COUNT(ports)]);
            poke_port(port, 1u << (dice >> 16) % 3, (u32)any(), (u32)(dice >> 24) & ((dice >> 32 & 7) ? 1 : 3));
        } else {
            u32 width = 1u << (dice >> 16) % 4;
            u64 at = within(&memory[(dice >> 8) % COUNT(memory)]);
            at = dice >> 20 & 3 ? at & ~(u64)(width - 1) : at; /* misaligned now and then */
            if (at + width <= 0x100000000ul) {
                poke_memory(at, width, any(), dice >> 24 & 1);
            }
        }
    }
    say("done");
    for (;;) {
        cli();
        asm volatile("hlt");
    }
}
