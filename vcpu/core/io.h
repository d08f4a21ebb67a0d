/*
 * Port and memory-mapped I/O: classes of access, and the sync access that goes to a device host.
 *
 * Every function here may leave by cpu_unwind(c, u, UNWIND_RETRY) before anything was done (the vCPU
 * is told to stop while a device host holds the access), and may park: translations got before the
 * call are void after it. So probe, access, then store to guest memory with a fresh translation.
 */
#ifndef ATOLL_IO_H
#define ATOLL_IO_H

#include "cpu.h"

/* Ports; width 1, 2, 4. The caller has called io_check(). */
uint32_t io_read(struct cpu *c, const struct uop *u, unsigned port, unsigned width);
void io_write(struct cpu *c, const struct uop *u, unsigned port, unsigned width, uint32_t value);
/* REP INS and OUTS: as many of `count` items as go in one message (at most 4096 bytes), at least 1; returns how many. */
unsigned io_read_string(struct cpu *c, const struct uop *u, unsigned port, unsigned width, unsigned count, void *to);
unsigned io_write_string(struct cpu *c, const struct uop *u, unsigned port, unsigned width, unsigned count, const void *from);

/* Guest-physical addresses that are not plain memory for this access; width 1, 2, 4, 8, within a page. */
uint64_t mmio_read(struct cpu *c, const struct uop *u, uint64_t gpa, unsigned width);
void mmio_write(struct cpu *c, const struct uop *u, uint64_t gpa, unsigned width, uint64_t value);

/* The PIC's vector (interrupt acknowledge). -1: no PIC */
int io_inta(struct cpu *c);

/* Remembers why the guest is left; io: NULL, or the access in hand. */
void note_exit(struct cpu *c, uint64_t rip, unsigned reason, const struct io_request *io);

/* ---- parking: not touching guest memory for a while ---- */
void core_park(struct cpu *c);
void core_unpark(struct cpu *c);      /* drops the TLBs where the map is new */
void core_map_changed(struct cpu *c); /* ATTN_MAP: drops the TLBs, acknowledges */
void core_world_wait(struct cpu *c);  /* ATTN_WORLD */
/* Sleeps, parked, until attention or guest time wake_ns */
void core_sleep(struct cpu *c, uint64_t wake_ns);
/* Stops all other vCPUs; translations got before are void. Sets world_held; cpu_unwind() must resume where it is set. */
void world_stop(struct cpu *c);
void world_resume(struct cpu *c);

#endif
