/*
 * Ports and memory-mapped registers: what a vCPU answers itself, and what becomes a message.
 *
 * One access of the guest is cut into pieces that a register takes (reg_desc.widths). Each piece is,
 * by the register's class: nobody's, a shadow, a function of time, an entry of the posted ring, or a
 * sync access, for which vcpu_block.io is filled and Python called.
 */
#include "host.h"
#include "io.h"
#include "api.h"

/* in _core's generated file: calls Python. 0: done, the reply is in s.io.data. 1: not begun, leave. */
int core_sync_access(void *handle);

enum space { SPACE_PORT, SPACE_MEMORY, SPACE_INTA };

/* Where a piece of an access goes */
struct piece {
    enum space space;
    uint64_t addr;
    unsigned width;
    unsigned skip;             /* bytes into the register */
    unsigned host, device;
    const struct reg_desc *reg; /* NULL: no descriptor, sync */
};

void core_doorbell(struct cpu *c, uint32_t host, int fd)
{
    if (host < SEG_MAX_HOSTS) {
        c->doorbell[host] = fd;
    }
}

static uint64_t ones(unsigned width) { return ~UINT64_C(0) >> (64 - 8 * width); }

static void count(struct cpu *c, unsigned device, enum access_class class)
{
    seg_count(&c->s.accesses[device % SEG_MAX_DEVICES][class]);
}

/* ---- sync ---- */
void note_exit(struct cpu *c, uint64_t rip, unsigned reason, const struct io_request *io)
{
    struct exit_entry e = {.rip = rip, .instructions = c->s.instructions + (uint64_t)(c->budget_noted - c->budget),
                           .guest_ns = guest_now(c->seg), .reason = reason};
    if (io) {
        e.addr = io->addr;
        e.space = (uint8_t)io->space;
        e.width = (uint8_t)io->width;
        e.write = (uint8_t)io->write;
        e.device = (uint8_t)io->device;
    }
    c->s.exit_log[c->s.exits_noted % SEG_EXIT_SLOTS] = e;
    c->s.exits_noted++;
}

static void sync_access(struct cpu *c, const struct uop *u, const struct piece *p, unsigned items, bool write)
{
    struct io_request *r = &c->s.io;
    r->addr = p->addr;
    r->space = p->space;
    r->host = p->host;
    r->device = p->device;
    r->width = p->width;
    r->count = items;
    r->write = write;
    r->ticket = ring_next_ticket(c->seg, p->host);
    unsigned reason = p->space == SPACE_INTA ? EXIT_INTA : EXIT_IO;
    note_exit(c, uop_rip(c, u), reason, r);
    core_park(c);
    fpu_park(c);
    c->s.place = PLACE_ACCESS;
    int abandoned = core_sync_access(c->handle);
    c->s.place = PLACE_GUEST;
    fpu_unpark(c);
    core_unpark(c);
    if (abandoned) {
        cpu_unwind(c, u, UNWIND_RETRY);
    }
    count(c, p->device, ACCESS_SYNC);
    seg_count(&c->s.exits[reason]);
}

static uint64_t sync_read(struct cpu *c, const struct uop *u, const struct piece *p)
{
    uint64_t value = 0;
    sync_access(c, u, p, 1, false);
    memcpy(&value, c->s.io.data, p->width);
    return value;
}

static void sync_write(struct cpu *c, const struct uop *u, const struct piece *p, uint64_t value)
{
    memcpy(c->s.io.data, &value, sizeof value);
    sync_access(c, u, p, 1, true);
}

/* ---- shadow ---- */
/* The value of a shadow register; false where the access must be sync */
static bool shadow(struct cpu *c, const struct reg_desc *reg, uint64_t *value)
{
    if (reg->read_class != ACCESS_SHADOW || ring_hazard(c->seg, reg->host, reg->read_hazard) || ring_stores(c->seg, reg->host)) {
        return false;
    }
    *value = seg_load(&seg_shadows(c->seg)[reg->shadow % SEG_MAX_SHADOWS]);
    return !(*value & SEG_SHADOW_ASK);
}

/* ---- posted ---- */
static void post(struct cpu *c, const struct piece *p, uint64_t value)
{
    struct posted_entry entry = {.guest_ns = guest_now(c->seg), .addr = p->addr, .value = value, .space = (uint8_t)p->space,
                                 .width = (uint8_t)p->width, .vcpu = (uint8_t)c->index, .device = (uint8_t)p->device};
    uint64_t held;
    bool same = p->reg->plain && shadow(c, p->reg, &held) && held == value;
    uint64_t ticket = ring_claim(c->seg, c->index, p->host);
    if (unlikely(ring_full(c->seg, p->host, ticket))) {
        core_park(c); /* the host may be publishing a map, and wait for us */
        ring_wait(c->seg, p->host, ticket);
        core_unpark(c);
    }
    ring_put(c->seg, p->host, ticket, &entry, same ? 0 : p->reg->write_hazard, c->doorbell[p->host]);
    ring_claimed(c->seg, c->index);
    count(c, p->device, ACCESS_POSTED);
}

/* ---- one piece ---- */
static uint64_t read_piece(struct cpu *c, const struct uop *u, const struct piece *p)
{
    const struct reg_desc *reg = p->reg;
    uint64_t value;
    if (reg && shadow(c, reg, &value)) {
        count(c, p->device, ACCESS_SHADOW);
    } else if (reg && reg->read_class == ACCESS_TIME) {
        count(c, p->device, ACCESS_TIME);
        value = time_source_read(c->seg, reg->time_source);
    } else {
        return sync_read(c, u, p);
    }
    unsigned skip = reg->shift;
    if (p->space == SPACE_MEMORY || reg->read_class == ACCESS_TIME) { /* each port of a shadow has a value of its own */
        skip += p->skip;
    }
    return skip < 8 ? value >> 8 * skip & ones(p->width) : 0;
}

static void write_piece(struct cpu *c, const struct uop *u, const struct piece *p, uint64_t value)
{
    if (p->reg && p->reg->write_class == ACCESS_POSTED) {
        post(c, p, value & ones(p->width));
    } else {
        sync_write(c, u, p, value);
    }
}

/* The widest access, of at most `width` bytes, that the register takes from byte `skip` on. From its first byte on that is for
 * reg->widths alone to say (a data port of 16 bits has a neighbour at its second byte); from a later one it ends with the
 * register. A register whose own accesses are all wider gets the narrow one as it is. */
static unsigned fit(const struct reg_desc *reg, unsigned skip, unsigned width)
{
    unsigned room = skip == 0 ? 8 : reg->length > skip ? reg->length - skip : 1;
    for (unsigned w = 8; w; w >>= 1) {
        if (w <= width && w <= room && reg->widths & w) {
            return w;
        }
    }
    unsigned w = 8;
    while (w > width || w > room) {
        w >>= 1;
    }
    return w;
}

/* ---- ports ---- */
static struct piece port_piece(struct cpu *c, unsigned port, unsigned width)
{
    unsigned index = __atomic_load_n(&seg_ports(c->seg)[port & 0xffff], __ATOMIC_ACQUIRE);
    if (index == 0 || index >= SEG_MAX_REGS) {
        return (struct piece){.width = 1};
    }
    const struct reg_desc *reg = &seg_regs(c->seg)[index];
    return (struct piece){SPACE_PORT, port & 0xffff, fit(reg, reg->within, width), reg->within, reg->host, reg->device, reg};
}

uint32_t io_read(struct cpu *c, const struct uop *u, unsigned port, unsigned width)
{
    uint32_t value = 0;
    for (unsigned done = 0; done < width;) {
        struct piece p = port_piece(c, port + done, width - done);
        if (p.reg) {
            value |= (uint32_t)read_piece(c, u, &p) << 8 * done;
        } else {
            count(c, 0, ACCESS_NOBODY);
            value |= 0xffu << 8 * done;
        }
        done += p.width;
    }
    return value;
}

void io_write(struct cpu *c, const struct uop *u, unsigned port, unsigned width, uint32_t value)
{
    for (unsigned done = 0; done < width;) {
        struct piece p = port_piece(c, port + done, width - done);
        if (p.reg) {
            write_piece(c, u, &p, value >> 8 * done & ones(p.width));
        } else {
            count(c, 0, ACCESS_NOBODY);
        }
        done += p.width;
    }
}

static unsigned items_a_message(unsigned width, unsigned items)
{
    unsigned most = sizeof ((struct io_request *)0)->data / width;
    return items < most ? items : most;
}

unsigned io_read_string(struct cpu *c, const struct uop *u, unsigned port, unsigned width, unsigned items, void *to)
{
    struct piece p = port_piece(c, port, width);
    if (p.reg && p.width == width && p.reg->read_class == ACCESS_SYNC) {
        items = items_a_message(width, items);
        sync_access(c, u, &p, items, false);
        memcpy(to, c->s.io.data, items * width);
        return items;
    }
    uint32_t value = io_read(c, u, port, width);
    memcpy(to, &value, width);
    return 1;
}

unsigned io_write_string(struct cpu *c, const struct uop *u, unsigned port, unsigned width, unsigned items, const void *from)
{
    struct piece p = port_piece(c, port, width);
    if (p.reg && p.width == width && p.reg->write_class == ACCESS_SYNC) {
        items = items_a_message(width, items);
        memcpy(c->s.io.data, from, items * width);
        sync_access(c, u, &p, items, true);
        return items;
    }
    uint32_t value = 0;
    memcpy(&value, from, width);
    io_write(c, u, port, width, value);
    return 1;
}

int io_inta(struct cpu *c)
{
    struct piece p = {.space = SPACE_INTA, .width = 1, .device = SEG_DEVICE_LAPIC};
    sync_access(c, NULL, &p, 1, false);
    return c->s.io.data[0];
}

/* ---- memory ---- */
/* Where no register is described the access goes as it is, but for what a piece before it has left over: a message's items are
 * of 1, 2, 4 or 8 bytes. */
static unsigned power_of_two(unsigned width) { return width >= 8 ? 8 : width >= 4 ? 4 : width >= 2 ? 2 : 1; }

static struct piece memory_piece(struct cpu *c, const struct map_region *r, uint64_t gpa, unsigned width)
{
    struct piece p = {.space = SPACE_MEMORY, .addr = gpa, .width = power_of_two(width), .host = r->host, .device = r->device};
    uint64_t offset = gpa - r->gpa;
    const struct reg_desc *regs = &seg_regs(c->seg)[r->first_reg];
    for (unsigned i = 0; i < r->regs; i++) {
        if (offset >= regs[i].offset && offset - regs[i].offset < regs[i].length) {
            p.reg = &regs[i];
            p.skip = (unsigned)(offset - regs[i].offset);
            p.width = fit(p.reg, p.skip, width);
            return p;
        }
    }
    return p;
}

static uint64_t read_ioapic(struct cpu *c, uint64_t offset, unsigned width)
{
    count(c, SEG_DEVICE_IOAPIC, ACCESS_MEMORY);
    uint64_t value = ioapic_read(c->seg, (uint32_t)offset & 0xffc);
    return value >> 8 * (offset & 3) & ones(width);
}

static void write_ioapic(struct cpu *c, uint64_t offset, unsigned width, uint64_t value)
{
    count(c, SEG_DEVICE_IOAPIC, ACCESS_MEMORY);
    if (!(offset & 3) && (width >= 4 || (offset & 0xfff) == 0)) { /* the index register is a byte */
        ioapic_write(c->seg, (uint32_t)offset & 0xfff, (uint32_t)value);
    }
}

uint64_t mmio_read(struct cpu *c, const struct uop *u, uint64_t gpa, unsigned width)
{
    struct map_region r;
    uint64_t value = 0;
    if (!seg_map_find(c->seg, gpa, &r)) {
        count(c, 0, ACCESS_NOBODY);
        return ones(width);
    }
    if (r.flags & REGION_READ) {
        memcpy(&value, c->base + r.read_offset + (gpa - r.gpa), width);
    } else if (r.flags & REGION_IOAPIC) {
        value = read_ioapic(c, gpa - r.gpa, width);
    } else if (r.flags & REGION_MMIO) {
        for (unsigned done = 0; done < width;) {
            struct piece p = memory_piece(c, &r, gpa + done, width - done);
            value |= read_piece(c, u, &p) << 8 * done;
            done += p.width;
        }
    } else {
        count(c, 0, ACCESS_NOBODY);
        value = ones(width);
    }
    return value;
}

void mmio_write(struct cpu *c, const struct uop *u, uint64_t gpa, unsigned width, uint64_t value)
{
    struct map_region r;
    if (!seg_map_find(c->seg, gpa, &r)) {
        count(c, 0, ACCESS_NOBODY);
    } else if (r.flags & REGION_WRITE) {
        uint64_t offset = r.write_offset + (gpa - r.gpa);
        memcpy(c->base + offset, &value, width);
        seg_written(c->seg, offset, width);
    } else if (r.flags & REGION_IOAPIC) {
        write_ioapic(c, gpa - r.gpa, width, value);
    } else if (r.flags & REGION_MMIO) {
        for (unsigned done = 0; done < width;) {
            struct piece p = memory_piece(c, &r, gpa + done, width - done);
            write_piece(c, u, &p, value >> 8 * done & ones(p.width));
            done += p.width;
        }
    } else {
        count(c, 0, ACCESS_NOBODY); /* ROM */
    }
}
