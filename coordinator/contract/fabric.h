/*
 * What every process of a machine can call on the segment: time, map, attention, posted rings, DMA,
 * code events, interrupts. Prototypes and integer constants only: C includes this text, cffi parses it.
 * `seg` is the address at which the segment is mapped. No function here blocks on another process for
 * longer than that process holds a lock word, except seg_map_publish() and the *_wait() functions.
 * Sources: timebase.c attention.c map.c memory.c ring.c state.c fabric.c ioapic.c
 */
#pragma once

/* ---- the process: once after mapping the segment. Registers for expedited membarriers. 0, or -errno */
int seg_process_init(void);

uint32_t seg_allocate(uint32_t *next, uint32_t limit);               /* an index below the limit, or the limit: none left */
void seg_shadow_set(struct seg_header *seg, uint32_t index, uint64_t value);

/* ---- time (timebase.c) ---- */
uint64_t guest_now(const struct seg_header *seg);                    /* guest ns; stands still while stopped */
uint64_t guest_tsc(const struct seg_header *seg);                    /* TSC without IA32_TSC_ADJUST */
uint64_t tsc_from_ns(const struct seg_header *seg, uint64_t guest_ns);
uint64_t ns_from_tsc(const struct seg_header *seg, uint64_t tsc);    /* first ns at which the TSC has reached it */
uint64_t guest_host_deadline(const struct seg_header *seg, uint64_t guest_ns); /* CLOCK_MONOTONIC ns, SEG_NO_OFFSET while stopped */
uint64_t time_source_read(const struct seg_header *seg, uint32_t source);
uint64_t time_source_at(const struct seg_header *seg, uint32_t source, uint64_t guest_ns);
void time_source_set(struct seg_header *seg, uint32_t source, uint32_t running, uint64_t offset_ns, uint64_t frozen);
void time_source_shape(struct seg_header *seg, uint32_t source, uint64_t mul, uint64_t div, uint64_t mask);
void guest_time_start(struct seg_header *seg);                       /* coordinator; raises ATTN_TIMER everywhere */
void guest_time_stop(struct seg_header *seg);
void guest_time_set(struct seg_header *seg, uint64_t guest_ns, uint64_t wall_ns, uint64_t tsc_khz); /* only while stopped */

/* ---- attention, sleep, parking (attention.c) ---- */
void vcpu_attend(struct seg_header *seg, uint32_t vcpu, uint32_t bits);
void vcpu_attend_all(struct seg_header *seg, uint32_t bits);
void seg_call(struct seg_header *seg, uint32_t vcpu);                /* coordinator, after it has sent a control message */
uint32_t vcpu_take_attention(struct seg_header *seg, uint32_t vcpu); /* the bits, all cleared; then look at what they announce */
/* Sleeps (parked) until attention is nonzero, or guest time reaches wake_ns (SEG_NO_OFFSET: never). Returns vcpu_unpark()'s. */
int vcpu_sleep(struct seg_header *seg, uint32_t vcpu, uint64_t wake_ns);
void vcpu_park(struct seg_header *seg, uint32_t vcpu);
/* Waits while another vCPU holds the world. 1: the map is new; drop every translation, then vcpu_map_ack(). */
int vcpu_unpark(struct seg_header *seg, uint32_t vcpu);
void vcpu_map_ack(struct seg_header *seg, uint32_t vcpu);
/* Stops the other vCPUs for a LOCK across two pages. 1: done. 0: had to let another one do so first, and the map is new (as above); call again. */
int seg_world_stop(struct seg_header *seg, uint32_t vcpu);
void seg_world_resume(struct seg_header *seg, uint32_t vcpu);        /* harmless when not held */

/* Process `pid` has died: what it held of the segment's locks is free again, and what they guard is made good. */
void seg_break_locks(struct seg_header *seg, uint32_t pid);
/* The process of a vCPU has died, and another may take its place: nobody waits for it, and it has been sent nothing. */
void vcpu_lost(struct seg_header *seg, uint32_t vcpu);

/* ---- map (map.c) ---- */
/* Copies the region that holds gpa; 1, or 0 where there is none. */
int seg_map_find(const struct seg_header *seg, uint64_t gpa, struct map_region *out);
/* Puts a map in force: returns when every vCPU but `self` (-1: none) has it or is parked. Sorted, no overlaps; 0, or -1: not so. */
int seg_map_publish(struct seg_header *seg, const struct memory_map *map, int32_t self);
/* The map as it is, under a version that every vCPU has seen: after changes of the port map. */
void seg_map_republish(struct seg_header *seg, int32_t self);

/* ---- guest memory and code (memory.c). gpa ranges may span regions; n in bytes ---- */
uint64_t seg_dma_read(const struct seg_header *seg, uint64_t gpa, void *to, uint64_t n);     /* bytes that were memory; others read FFh */
uint64_t seg_dma_write(struct seg_header *seg, uint64_t gpa, const void *from, uint64_t n);  /* bytes that landed in RAM */
/* Contiguous memory at gpa: offset in the segment (SEG_NO_OFFSET: none) and, in *length, how much of n. */
uint64_t seg_dma_span(const struct seg_header *seg, uint64_t gpa, uint64_t n, int write, uint64_t *length);
/* Bytes have landed at a segment offset: marks dirty pages, then drops translated code. */
void seg_written(struct seg_header *seg, uint64_t offset, uint64_t n);
/* The code half alone, within one page; offset is relative to guest memory. 1: code was hit (ATTN_CODE is raised everywhere). */
int seg_code_written(struct seg_header *seg, uint64_t guest_offset, uint32_t n);
/* A translator is about to read the lines (bit = 64 bytes) of a page. Call before the bytes are read. */
void seg_code_mark(struct seg_header *seg, uint64_t page, uint64_t lines);
/* Walks the code log: 1 and a page, 0 nothing new, -1 fell behind (drop all). */
int seg_code_next(struct seg_header *seg, uint64_t *cursor, uint64_t *page);

/* ---- posted rings (ring.c) ---- */
uint64_t ring_ticket(struct seg_header *seg, uint32_t host);
/* The same for a vCPU, in a way that its death does no harm; ring_claimed() behind ring_put(). */
uint64_t ring_claim(struct seg_header *seg, uint32_t vcpu, uint32_t host);
void ring_claimed(struct seg_header *seg, uint32_t vcpu);
/* vCPUs have died (bits by index): what they drew and did not fill is filled. 1: not all could be done yet, call again. */
int ring_mend(struct seg_header *seg, uint32_t host, uint32_t dead, int doorbell);
int ring_full(const struct seg_header *seg, uint32_t host, uint64_t ticket); /* the slot of this ticket is not free yet */
void ring_wait(const struct seg_header *seg, uint32_t host, uint64_t ticket); /* until it is; a vCPU parks first */
/* hazard 0: none. doorbell: eventfd, written only when the host sleeps; -1: none. */
void ring_put(struct seg_header *seg, uint32_t host, uint64_t ticket, const struct posted_entry *entry, uint32_t hazard, int doorbell);
void ring_post(struct seg_header *seg, uint32_t host, const struct posted_entry *entry, uint32_t hazard, int doorbell); /* all of it */
int ring_hazard(const struct seg_header *seg, uint32_t host, uint32_t hazard); /* 1: a posted write of the group is not applied yet */
uint64_t ring_next_ticket(const struct seg_header *seg, uint32_t host);
int ring_take(const struct seg_header *seg, uint32_t host, uint64_t ticket, struct posted_entry *out); /* 1: the entry is whole */
void ring_applied(struct seg_header *seg, uint32_t host, uint64_t ticket); /* all tickets below it */
/* The host is about to poll: 1 = do not, entry `ticket` is there. Awake again: ring_awake(). */
int ring_sleep(struct seg_header *seg, uint32_t host, uint64_t ticket);
void ring_awake(struct seg_header *seg, uint32_t host);
/* Around the shadows that belong to one event: before (1) and after (0). */
void ring_storing(struct seg_header *seg, uint32_t host, int storing);
/* Whether the host is in between: then a shadow must not be read. Asked before the shadow is loaded. */
int ring_stores(const struct seg_header *seg, uint32_t host);

/* ---- committed state and output of a device host (state.c) ---- */
/* The slot of this name, made where there is none: its number, or -1: no room, or the slot is smaller. */
int state_slot(struct seg_header *seg, uint32_t host, const char *name, uint64_t room);
/* n bytes that become the slot's record with the next commit. 0, or -1: too long. */
int state_put(struct seg_header *seg, uint32_t host, int slot, const void *data, uint64_t n);
void state_commit(struct seg_header *seg, uint32_t host);
/* For a successor, before anything else: what was put and not committed is void. Returns the number of commits. */
uint64_t state_recover(struct seg_header *seg, uint32_t host);
/* The committed record and its length; NULL: there is none. */
const void *state_get(const struct seg_header *seg, uint32_t host, int slot, uint64_t *n);
/* A frame at byte `at` of the output ring, which nobody sees before output_show(). 1, or 0: no room yet. */
int output_put(struct seg_header *seg, uint32_t host, uint64_t at, const void *frame, uint32_t n);
/* Bytes below `head` may be read. 1: the coordinator has read all that was there, and is to be told. */
int output_show(struct seg_header *seg, uint32_t host, uint64_t head);
/* The coordinator: length of the next frame and, in *frame (room for SEG_OUTPUT_ROOM bytes), its bytes; -1: none. */
int64_t output_take(struct seg_header *seg, uint32_t host, void *frame);

/* ---- interrupts (fabric.c, ioapic.c) ---- */
#define DELIVER_FIXED 0
#define DELIVER_LOWEST 1
#define DELIVER_SMI 2
#define DELIVER_NMI 4
#define DELIVER_INIT 5
#define DELIVER_SIPI 6
#define DELIVER_EXTINT 7
#define EXTINT_WIRE 1    /* bits of vcpu_block.extint_level: the PIC's INTR at LINT0 */
#define EXTINT_MESSAGE 2 /* an ExtINT message was accepted */

/* Level of one source (0-31) of an IOAPIC pin; 1 = asserted. */
void pin_set(struct seg_header *seg, uint32_t pin, uint32_t source, int level);
int pin_level(const struct seg_header *seg, uint32_t pin);
void pic_intr_set(struct seg_header *seg, int level);                /* INTR of the PIC, wired to LINT0 of every vCPU */
uint32_t ioapic_read(struct seg_header *seg, uint32_t offset);       /* offset in the 4 KiB window */
void ioapic_write(struct seg_header *seg, uint32_t offset, uint32_t value);
void ioapic_reset(struct seg_header *seg);
void fabric_resolve(struct seg_header *seg);                         /* looks at all level pins again */
void fabric_eoi(struct seg_header *seg, uint32_t vector);            /* EOI message of a level-triggered vector */
int fabric_msi(struct seg_header *seg, uint64_t addr, uint32_t data); /* 1: somebody took it */
int fabric_ipi(struct seg_header *seg, uint32_t from, uint64_t icr); /* ICR as in the sender's mode (x2APIC: destination in bits 63-32) */
/* One message. wide: dest is a 32-bit x2APIC destination. Returns how many vCPUs took it. */
int fabric_deliver(struct seg_header *seg, uint32_t mode, uint32_t vector, int logical, uint32_t dest, int wide, int level);
void fabric_post(struct seg_header *seg, uint32_t vcpu, uint32_t mode, uint32_t vector, int level);
