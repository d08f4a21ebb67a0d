/*
 * The IOAPIC (Intel 82093AA, 290566) in the segment: whoever sets a pin or writes a register resolves
 * it in place.
 *
 * Level pins and EOI. Everything that decides - sources of a pin, mask, trigger mode, remote IRR - is
 * read and written under fabric.lock, so each of "pin rises", "pin falls", "EOI" and "register
 * written" sees the others as before or after, never half-way:
 *   - a rise with remote IRR set delivers nothing; the EOI that clears remote IRR comes later under
 *     the lock and looks at the pin again, so the rise is not lost;
 *   - a rise after the EOI finds remote IRR clear and delivers by itself, so nobody need look again;
 *   - both can not deliver: the first sets remote IRR, the second finds it set;
 *   - a fall before the EOI leaves nothing to deliver; a fall after it comes after a second delivery,
 *     which a handler finds without a cause, as on hardware.
 * The vCPU takes its vector out of the ISR before it calls fabric_eoi(), so a delivery made there
 * finds it free. posted_irr with the trigger mode is written under the same lock as remote IRR, so an
 * EOI can not overtake the vector it ends.
 */
#include "seg.h"

/* section 3.1: windows */
#define IOREGSEL 0x00
#define IOWIN 0x10
/* section 3.2 */
#define REG_ID 0x00
#define REG_VERSION 0x01
#define REG_ARBITRATION 0x02
#define REG_REDIRECTION 0x10
#define VERSION (0x11u | (SEG_IOAPIC_PINS - 1) << 16)
#define ID_MASK 0x0f000000u

/* redirection entry, section 3.2.4 */
#define RTE_VECTOR(e) ((uint32_t)(e) & 0xff)
#define RTE_MODE(e) ((uint32_t)(e) >> 8 & 7)
#define RTE_LOGICAL(e) ((uint32_t)(e) >> 11 & 1)
#define RTE_REMOTE_IRR 0x4000u
#define RTE_LEVEL 0x8000u
#define RTE_MASKED 0x10000u
#define RTE_DEST(e) ((uint32_t)((e) >> 56))
#define RTE_WRITABLE 0x1afffu /* but delivery status (12) and remote IRR (14) */

static bool level_triggered(uint64_t entry) { return entry & RTE_LEVEL && RTE_MODE(entry) <= DELIVER_LOWEST; }

/* Sends what the pin asks for; 1 = somebody took it. The lock is held. */
static int send(struct seg_header *seg, uint32_t pin)
{
    struct fabric *f = seg_fabric(seg);
    uint64_t entry = f->ioapic.redirection[pin];
    int taken = fabric_deliver(seg, RTE_MODE(entry), RTE_VECTOR(entry), RTE_LOGICAL(entry), RTE_DEST(entry), 0, level_triggered(entry));
    if (taken) {
        __atomic_fetch_add(&f->delivered[pin], 1, __ATOMIC_RELAXED);
    }
    return taken;
}

static void resolve_level(struct seg_header *seg, uint32_t pin)
{
    struct fabric *f = seg_fabric(seg);
    uint64_t *entry = &f->ioapic.redirection[pin];
    if (f->pin_sources[pin] && level_triggered(*entry) && !(*entry & (RTE_MASKED | RTE_REMOTE_IRR))) {
        /* set first: the target may run its handler and call fabric_eoi() before send() returns - it waits for the lock */
        if (send(seg, pin)) {
            *entry |= RTE_REMOTE_IRR;
        }
    }
}

void pin_set(struct seg_header *seg, uint32_t pin, uint32_t source, int level)
{
    struct fabric *f = seg_fabric(seg);
    if (pin >= SEG_IOAPIC_PINS || source >= 32) {
        return;
    }
    uint32_t bit = 1u << source;
    seg_lock(&f->lock);
    uint32_t before = f->pin_sources[pin];
    uint32_t after = level ? before | bit : before & ~bit;
    uint64_t entry = f->ioapic.redirection[pin];
    /* An edge at a masked pin is ignored, not held. It is sent before it is noted: who dies in between is followed by one
     * that raises the pin again (devhost/commit.py), and a rise that has been noted is none. */
    if (!before && after && !level_triggered(entry) && !(entry & RTE_MASKED)) {
        send(seg, pin);
    }
    seg_store(&f->pin_sources[pin], after);
    if (!before && after && level_triggered(entry)) {
        resolve_level(seg, pin);
    }
    seg_unlock(&f->lock);
}

int pin_level(const struct seg_header *seg, uint32_t pin)
{
    return pin < SEG_IOAPIC_PINS && seg_load(&seg_fabric(seg)->pin_sources[pin]) != 0;
}

void fabric_resolve(struct seg_header *seg)
{
    struct fabric *f = seg_fabric(seg);
    seg_lock(&f->lock);
    for (uint32_t pin = 0; pin < SEG_IOAPIC_PINS; pin++) {
        resolve_level(seg, pin);
    }
    seg_unlock(&f->lock);
}

void fabric_eoi(struct seg_header *seg, uint32_t vector)
{
    struct fabric *f = seg_fabric(seg);
    seg_lock(&f->lock);
    for (uint32_t pin = 0; pin < SEG_IOAPIC_PINS; pin++) {
        uint64_t *entry = &f->ioapic.redirection[pin];
        if (RTE_VECTOR(*entry) == vector && *entry & RTE_REMOTE_IRR) {
            *entry &= ~(uint64_t)RTE_REMOTE_IRR;
            resolve_level(seg, pin);
        }
    }
    seg_unlock(&f->lock);
}

void ioapic_reset(struct seg_header *seg)
{
    struct fabric *f = seg_fabric(seg);
    seg_lock(&f->lock);
    f->ioapic.id = f->ioapic.select = 0;
    for (uint32_t pin = 0; pin < SEG_IOAPIC_PINS; pin++) {
        f->ioapic.redirection[pin] = RTE_MASKED;
    }
    seg_unlock(&f->lock);
}

static uint32_t read_register(const struct ioapic_state *s)
{
    uint32_t index = s->select, pin = (index - REG_REDIRECTION) / 2;
    if (index >= REG_REDIRECTION && pin < SEG_IOAPIC_PINS) {
        return (uint32_t)(s->redirection[pin] >> (index & 1 ? 32 : 0));
    }
    switch (index) {
    case REG_ID:
    case REG_ARBITRATION:
        return s->id & ID_MASK;
    case REG_VERSION:
        return VERSION;
    default:
        return 0;
    }
}

static void write_register(struct seg_header *seg, struct ioapic_state *s, uint32_t value)
{
    uint32_t index = s->select, pin = (index - REG_REDIRECTION) / 2;
    if (index == REG_ID) {
        s->id = value & ID_MASK;
    }
    if (index < REG_REDIRECTION || pin >= SEG_IOAPIC_PINS) {
        return;
    }
    uint64_t entry = s->redirection[pin];
    if (index & 1) {
        entry = (uint32_t)entry | (uint64_t)(value & 0xff000000u) << 32;
    } else {
        entry = (entry & ~(uint64_t)0xffffffffu) | (entry & RTE_REMOTE_IRR) | (value & RTE_WRITABLE);
        if (!(entry & RTE_LEVEL)) {
            entry &= ~(uint64_t)RTE_REMOTE_IRR; /* how software without an EOI register clears it */
        }
    }
    s->redirection[pin] = entry;
    resolve_level(seg, pin);
}

uint32_t ioapic_read(struct seg_header *seg, uint32_t offset)
{
    struct fabric *f = seg_fabric(seg);
    uint32_t value = 0;
    seg_lock(&f->lock);
    if (offset == IOREGSEL) {
        value = f->ioapic.select;
    } else if (offset == IOWIN) {
        value = read_register(&f->ioapic);
    }
    seg_unlock(&f->lock);
    return value;
}

void ioapic_write(struct seg_header *seg, uint32_t offset, uint32_t value)
{
    struct fabric *f = seg_fabric(seg);
    seg_lock(&f->lock);
    if (offset == IOREGSEL) {
        f->ioapic.select = value & 0xff;
    } else if (offset == IOWIN) {
        write_register(seg, &f->ioapic, value);
    }
    seg_unlock(&f->lock);
}
