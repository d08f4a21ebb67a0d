/*
 * The segment: guest RAM and the words around it, one memfd shared by every process of a VM.
 *
 * This text is the only description of the layout. C includes it, Python feeds it to cffi, so it
 * holds nothing but integer #defines, enums and structs. Each word says who writes it and with
 * which order; "atomic" means a C11 atomic of the given order, everything else is plain.
 *
 * Conventions: gpa = guest-physical address; "offset" = byte offset in the segment; guest memory
 * (RAM, then video RAM, then ROM) is one contiguous, page-aligned run of the segment that starts at
 * seg_header.guest, and "page" is an index of 4 KiB pages in that run.
 */
#pragma once

#define SEG_MAGIC 0x4c4c4f5441 /* "ATOLL" */
#define SEG_LAYOUT 3

#define SEG_PAGE 4096
#define SEG_MAX_VCPUS 32
#define SEG_MAX_HOSTS 8        /* device hosts */
#define SEG_MAX_REGIONS 64     /* memory map */
#define SEG_MAX_REGS 2048      /* register descriptors, index 0 = unclaimed */
#define SEG_MAX_SHADOWS 512
#define SEG_MAX_DEVICES 64     /* device ids for counters; 0 = nobody */
#define SEG_DEVICE_LAPIC 1     /* ids of what the vCPUs answer themselves */
#define SEG_DEVICE_IOAPIC 2
#define SEG_MAX_HAZARDS 64
#define SEG_MAX_TIME_SOURCES 8
#define SEG_RING_SLOTS 4096    /* posted entries a device host */
#define SEG_CODE_SLOTS 4096    /* code-write events */
#define SEG_STATE_SLOTS 128    /* committed records a device host */
#define SEG_STATE_ROOM 0x800000  /* bytes for them; what is never written takes no memory */
#define SEG_OUTPUT_ROOM 0x100000 /* bytes of a device host's output ring; a power of two */
#define SEG_PAGE_LOCKS 1024
#define SEG_EXIT_SLOTS 16      /* exits a vCPU remembers; a power of two */
#define SEG_PORTS 65536
#define SEG_IOAPIC_PINS 24
#define SEG_NAME_LEN 32
#define SEG_NO_OFFSET 0xffffffffffffffff
#define SEG_SHADOW_ASK 0x8000000000000000 /* in a shadow: reading would have an effect now, make it a sync access */

/* ---- access classes of a register (design: "five classes of access") ---- */
enum access_class {
    ACCESS_SYNC = 0,   /* request and reply; earlier posted writes of that host are applied first */
    ACCESS_POSTED = 1, /* writes: appended to the host's ring */
    ACCESS_SHADOW = 2, /* reads: value in shadow[], unless a posted write of its hazard is unapplied */
    ACCESS_TIME = 3,   /* reads: a pure function of the timebase */
    ACCESS_MEMORY = 4, /* answered in the vCPU from the segment: memory (not counted), local APIC, IOAPIC */
    ACCESS_NOBODY = 5, /* nobody claims it: all ones, writes ignored; answered in the vCPU */
    ACCESS_CLASSES = 6
};

/* ---- what run() stops for, and the index of exit counters ---- */
enum vcpu_exit {
    EXIT_NONE = 0,
    EXIT_IO = 1,          /* vcpu_block.io holds a sync access for a device host */
    EXIT_CONTROL = 2,     /* ATTN_CONTROL: look at the control socket */
    EXIT_INTA = 3,        /* PIC interrupt acknowledge is wanted (a sync access of its own) */
    EXIT_SHUTDOWN = 4,    /* triple fault */
    EXIT_BUDGET = 5,      /* the instruction budget given to run() is used up */
    EXIT_DEBUG = 6,       /* a host-side breakpoint or the differential harness's end */
    EXIT_ERROR = 7,       /* vcpu_block.error_text says what; the process cannot go on */
    EXIT_COUNT = 8
};

/* ---- vcpu_block.place: how much of arch is exact, for who finds the vCPU dead ---- */
enum vcpu_place {
    PLACE_OUTSIDE = 0,    /* run() is not inside: all of it */
    PLACE_GUEST = 1,      /* rip is that of the first byte of the block in execution, status flags follow from `lazy`, x87 and MXCSR
                           * are those of the last stay elsewhere */
    PLACE_ACCESS = 2,     /* in a sync access: rip is in the last entry of exit_log, status flags follow from `lazy` */
    PLACE_ASLEEP = 3      /* HLT, or wait for SIPI: rip is that of the next instruction, status flags follow from `lazy` */
};

/* ---- bits of vcpu_block.attention; the run loop's one test at each block head ---- */
#define ATTN_CONTROL 0x01  /* coordinator: leave run() and look at the control socket */
#define ATTN_IRQ     0x02  /* something was posted: IRR, NMI, INIT, SIPI, ExtINT level */
#define ATTN_TIMER   0x04  /* local APIC timer may be due (timer thread of this vCPU) */
#define ATTN_MAP     0x08  /* memory or port map has a new version */
#define ATTN_TLB     0x10  /* drop all TLB entries (dirty-bit harvest) */
#define ATTN_CODE    0x20  /* code events are waiting */
#define ATTN_WORLD   0x40  /* another vCPU wants the world stopped (LOCK across two pages) */

/* ---- architectural state ---- */
union vec_reg { uint8_t b[64]; uint16_t w[32]; uint32_t d[16]; uint64_t q[8]; };

/* Descriptor cache. attr = descriptor bits 40..55: type 0-3, S 4, DPL 5-6, P 7, (limit 8-11 zero), AVL 12, L 13, D/B 14, G 15.
 * limit is in bytes (granularity applied). */
struct seg_reg { uint64_t base; uint32_t limit; uint16_t selector; uint16_t attr; };

struct x87_state {              /* physical registers; top is bits 11-13 of sw */
    uint8_t fpr[8][16];         /* 80-bit value in bytes 0..9; MMX register i is fpr[i] bytes 0..7 */
    uint16_t cw, sw;
    uint8_t tag_valid;          /* bit i set = physical register i not empty (FXSAVE abridged tag) */
    uint8_t pad0;
    uint16_t fop;
    uint64_t fip, fdp;
    uint16_t fcs, fds;
    uint32_t mxcsr;
};

enum activity { ACT_RUNNING = 0, ACT_HALTED = 1, ACT_WAIT_SIPI = 2, ACT_SHUTDOWN = 3 };

#define INHIBIT_STI 1    /* interrupt shadow of STI */
#define INHIBIT_MOV_SS 2 /* shadow of MOV SS / POP SS: also debug traps and NMI */

struct apic_state {              /* local APIC, registers as in SDM vol. 3 ch. 11; owner: its vCPU */
    uint64_t base_msr;           /* IA32_APIC_BASE */
    uint32_t id, tpr, ldr, dfr, svr, esr, esr_pending, icr_low, icr_high;
    uint32_t lvt_cmci, lvt_timer, lvt_thermal, lvt_pmc, lvt_lint0, lvt_lint1, lvt_error;
    uint32_t timer_initial, timer_divide;
    uint64_t timer_start_ns;     /* guest time at which the count was loaded */
    uint64_t timer_deadline_ns;  /* guest time of the next expiry, 0 = not armed */
    uint64_t tsc_deadline;       /* IA32_TSC_DEADLINE, 0 = not armed */
    uint64_t irr[4], isr[4], tmr[4];
};

struct cpu_arch {                /* owner: the vCPU; others read it while it is stopped */
    uint64_t gpr[16];            /* RAX RCX RDX RBX RSP RBP RSI RDI R8..R15 */
    uint64_t zero;               /* always 0: "no base", "no index" */
    uint64_t rip;
    uint64_t rflags;             /* exact whenever run() is not inside */
    struct seg_reg seg[6];       /* ES CS SS DS FS GS */
    struct seg_reg ldtr, tr, gdtr, idtr; /* gdtr and idtr use base and limit only */
    uint64_t cr0, cr2, cr3, cr4, xcr0, efer;
    uint64_t dr[8];
    uint32_t activity;           /* enum activity; published for readers, atomic relaxed */
    uint32_t inhibit;            /* INHIBIT_* */
    uint32_t nmi_blocked;
    uint32_t cpl;                /* = SS.DPL; kept apart for speed */
    struct x87_state fpu;
    uint64_t opmask[8];
    uint64_t vec_align[5];       /* puts vec on a multiple of 64: host stubs use aligned moves */
    union vec_reg vec[32];       /* ZMM-sized: XMM in bytes 0..15 */
    uint64_t star, lstar, cstar, fmask, kernel_gs_base;
    uint64_t sysenter_cs, sysenter_esp, sysenter_eip;
    uint64_t tsc_aux, tsc_adjust, pat, misc_enable, mcg_status, mcg_ctl, hwcr, debugctl;
    uint64_t mtrr_def_type, mtrr_fixed[11], mtrr_base[8], mtrr_mask[8];
    uint64_t mc_bank[4 * 8];
    uint64_t kvm_wall_clock, kvm_system_time, kvm_steal_time, kvm_pv_eoi, kvm_async_pf, kvm_poll_control;
    struct apic_state apic;
};

/* A sync access waiting for a device host. Written by the vCPU; data is the reply for reads. */
struct io_request {
    uint64_t addr;               /* port number or gpa */
    uint64_t ticket;             /* posted writes below this ticket are to be applied first */
    uint32_t space;              /* 0 port, 1 memory */
    uint32_t host;               /* device host index */
    uint32_t device;             /* device id */
    uint32_t width;              /* bytes an item: 1, 2, 4, 8 */
    uint32_t count;              /* items (string I/O: more than one; all go to the same port, successive addresses in memory) */
    uint32_t write;              /* 1 = write */
    uint64_t serial;             /* of the last request on the bus; goes on when another process is this vCPU */
    uint8_t data[4096];
};

/* Why the guest was left, and where. */
struct exit_entry {
    uint64_t rip;                /* of the instruction; behind it where run() ended */
    uint64_t instructions;       /* retired by then */
    uint64_t guest_ns;
    uint64_t addr;               /* EXIT_IO: port number or gpa */
    uint32_t reason;             /* enum vcpu_exit */
    uint8_t space, width, write, device; /* EXIT_IO, as in io_request */
};

/* One vCPU. Placed page-aligned; sizes padded by the reader of seg_header.vcpu_stride. */
struct vcpu_block {
    struct cpu_arch arch;
    /* -- words that others write -- */
    uint32_t attention;          /* any process: atomic OR seq_cst; the vCPU clears bits with atomic AND. Futex word */
    uint32_t sleeping;           /* vCPU: 1 while it waits on the futex (atomic seq_cst) */
    uint32_t parked;             /* vCPU: 1 while it promises not to touch guest memory before it looks at map_version and world again */
    uint32_t commands;           /* coordinator: control messages sent so far, counted after sending (atomic); then ATTN_CONTROL */
    uint64_t map_ack;            /* vCPU: last map version in force here (release) */
    uint64_t posted_irr[4];      /* senders: atomic OR; the vCPU: atomic exchange 0 */
    uint64_t posted_tmr[4];      /* senders, before posted_irr: 1 = level triggered; atomic OR / AND */
    uint32_t posted_nmi;         /* senders: atomic store 1; vCPU: exchange 0 */
    uint32_t posted_init;        /* likewise */
    uint32_t posted_sipi;        /* senders: atomic store 0x100 | vector; vCPU: exchange 0 */
    uint32_t posted_kick;        /* hypercall KICK_CPU, any vCPU: atomic store 1; the vCPU: exchange 0. Ends one HLT */
    uint32_t pad2;
    uint32_t extint_level;       /* EXTINT_WIRE: the PIC's INTR, device host; EXTINT_MESSAGE: senders set, vCPU clears; atomic */
    /* -- APIC addressing as senders need it; written by the vCPU (release) -- */
    uint32_t apic_id, apic_ldr, apic_dfr, apic_mode; /* mode: 0 disabled, 1 xAPIC, 2 x2APIC */
    uint32_t apic_sw_enabled, apic_ppr;
    /* -- the exit in hand -- */
    uint32_t exit_reason;        /* enum vcpu_exit */
    uint32_t pad1;
    struct io_request io;
    uint8_t error_text[256];
    /* -- counters: written by the vCPU, read by any (relaxed) -- */
    uint64_t instructions;       /* retired; a REP counts once */
    uint64_t run_ns;             /* host time inside run() less sleep */
    uint64_t halt_ns;
    uint64_t blocks_translated, blocks_dropped, tlb_fills, code_events_seen;
    uint64_t exits[16];
    uint64_t accesses[64][6];    /* [device][class], reads and writes together */
    uint64_t vectors[256];       /* interrupts delivered by vector */
    uint64_t code_cursor;        /* next code event to look at */
    uint32_t pid, os_tid;
    /* -- what a vCPU that has died leaves besides arch: written by the vCPU, plain -- */
    uint64_t lazy_result, lazy_a, lazy_b; /* status flags not worked out yet: vcpu/core/flags.h */
    uint32_t lazy;
    uint32_t place;              /* enum vcpu_place */
    uint32_t pad3;
    uint32_t posting;            /* device host + 1 whose ring a posted write is on its way into; 0 = none (release) */
    uint64_t posting_ticket;     /* ticket + 1 that it has drawn; 0 = not yet (release) */
    uint64_t exits_noted;        /* entries of exit_log so far; entry i lies in slot i % SEG_EXIT_SLOTS */
    struct exit_entry exit_log[SEG_EXIT_SLOTS];
};

/* ---- memory and port map ---- */
#define REGION_READ 1            /* read_offset is memory */
#define REGION_WRITE 2           /* write_offset is memory */
#define REGION_MMIO 4            /* what is not memory by the bits above goes to device registers */
#define REGION_IOAPIC 8          /* the fabric's IOAPIC answers in the vCPU */
/* A region with READ and neither WRITE nor MMIO is ROM: writes are ignored. */

struct map_region {
    uint64_t gpa, size;          /* page aligned */
    uint64_t read_offset, write_offset; /* offsets in the segment */
    uint32_t flags;
    uint32_t host, device;       /* for MMIO */
    uint32_t first_reg, regs;    /* descriptors with offsets in this region; elsewhere: sync */
    uint32_t pad;
};

struct memory_map {              /* sorted by gpa, no overlaps */
    uint32_t count, pad;
    struct map_region region[SEG_MAX_REGIONS];
};

/* What the vCPU must know of a register. Written by the coordinator before start, by device hosts for BARs. */
struct reg_desc {
    uint8_t read_class, write_class; /* enum access_class */
    uint8_t host, device;
    uint8_t widths;              /* bit mask of widths the register takes in one access: 1, 2, 4, 8; wider accesses are split by the vCPU */
    uint8_t time_source;
    uint8_t shift;               /* bytes into the shadow or time value (register halves) */
    uint8_t within;              /* ports: which byte of the register this port is; each port of a shadow register has a shadow[] of its own */
    uint16_t shadow;             /* index */
    uint16_t read_hazard;        /* a shadow read turns sync while hazard[read_hazard] is unapplied; 0 = none */
    uint16_t write_hazard;       /* a posted write marks hazard[write_hazard]; 0 = none */
    uint16_t plain;              /* 1 = reads give what was written, no more: a posted write of what its shadow holds marks no hazard */
    uint32_t offset, length;     /* MMIO: place in the region */
};

/* ---- posted rings ---- */
struct posted_entry {
    uint64_t stamp;              /* ticket + 1 when the entry is whole: vCPU, release */
    uint64_t guest_ns;           /* when it was made */
    uint64_t addr, value;
    uint8_t space, width, vcpu, device;
    uint32_t pad;
};

/* what an event in hand is about */
enum hand_kind { HAND_NOTHING, HAND_ACCESS, HAND_POSTED, HAND_TIMER, HAND_COMPLETION, HAND_COMMAND, HAND_LOAD };

struct host_block {              /* one a device host */
    uint64_t next_ticket;        /* vCPUs: atomic fetch_add */
    uint64_t applied;            /* the host: every ticket below it is applied (release) */
    uint32_t sleeping;           /* the host: 1 before it polls; the doorbell eventfd is written only then */
    uint32_t storing;            /* the host: 1 while it stores the shadows of an event (seq_cst); reads of its shadows are sync then */
    uint32_t pid;
    uint32_t generation;         /* the coordinator: raised when another process has taken over; vCPUs ask again (atomic) */
    uint64_t hazard[SEG_MAX_HAZARDS]; /* ticket + 1 of the newest posted write of the group: vCPUs, atomic max */
    uint64_t sync_served, posted_served, timer_fires, dma_bytes; /* the host, relaxed */
    uint64_t roundtrips[64];     /* sync accesses served by device */
    uint64_t effects_done;       /* the host: effects performed since power-on, stored after each (release) */
    uint64_t events;             /* the host: events that have ended since power-on, but for power-on and taking over (relaxed) */
    uint64_t begun;              /* the host: `events`, and one more while an event is in hand (relaxed) */
    uint64_t output_head;        /* the host: bytes of the output ring that are committed (seq_cst) */
    uint64_t output_tail;        /* the coordinator: bytes that it has read (seq_cst) */
    struct posted_entry ring[SEG_RING_SLOTS];
    /* of the event in hand; the host, relaxed: read when it has died */
    uint32_t hand_kind;
    uint32_t hand_device;        /* whose it is; 0: no single device's */
    uint32_t hand_space, hand_write;
    uint64_t hand_address;       /* of an access or posted write */
    uint64_t hand_number;        /* the same when it is done again (devhost/hand.py) */
};

/* ---- committed state (state.c): one area a device host. Writer: the host; read by its successor, never beside it ---- */
struct state_slot {              /* a record, in two halves of `room` bytes each from `offset` (in the area) on */
    uint8_t name[SEG_NAME_LEN];
    uint64_t offset, room;
    uint64_t stamp[2];           /* number of the commit that made this half valid; 0 = none */
    uint64_t length[2];
};

struct state_area {
    uint64_t seq;                /* commits so far: the commit word (release) */
    uint64_t used;               /* bytes of the area that slots have */
    uint32_t slots, pad;         /* (release) */
    struct state_slot slot[SEG_STATE_SLOTS];
};

/* ---- interrupt fabric ---- */
struct ioapic_state {            /* under fabric.lock */
    uint32_t id, select;
    uint64_t redirection[SEG_IOAPIC_PINS]; /* 82093AA section 3.2.4 */
};

struct fabric {
    uint32_t lock;               /* futex-backed lock word; held for nanoseconds, by any process */
    uint32_t turn;               /* lowest-priority delivery: where the search among equals begins */
    uint32_t pin_sources[SEG_IOAPIC_PINS]; /* bit s = source s asserts the pin; a pin's level is != 0 */
    struct ioapic_state ioapic;
    uint64_t delivered[SEG_IOAPIC_PINS];
};

/* ---- time ---- */
struct timebase {                /* sequence lock; writer: coordinator */
    uint32_t seq, running;
    uint64_t host_ns;            /* CLOCK_MONOTONIC at the reference */
    uint64_t guest_ns;           /* guest time at the reference */
    uint64_t tsc_khz;            /* guest TSC = guest_ns * tsc_khz / 1e6 */
    uint64_t wall_ns;            /* UNIX time at guest time 0 (RTC, kvmclock wall clock) */
};

struct time_source {             /* value = running ? ((guest_ns - offset_ns) * mul / div) & mask : frozen */
    uint32_t seq, running;       /* sequence lock; writer: the device host */
    uint64_t offset_ns, mul, div, mask, frozen;
};

/* ---- code writes ---- */
struct code_event { uint64_t stamp; uint64_t page; };
struct code_log {
    uint64_t head;               /* atomic fetch_add */
    struct code_event slot[SEG_CODE_SLOTS];
    uint32_t page_lock[SEG_PAGE_LOCKS]; /* spin words by hash of the page */
};

struct world_lock { uint32_t owner; uint32_t pad; }; /* vCPU index + 1 that has stopped the world; atomic CAS; futex */

struct seg_header {
    uint64_t magic;
    uint32_t layout, vcpus;
    uint64_t size;               /* of the segment */
    uint64_t ram_size, vram_size, rom_size;
    uint64_t vcpu_offset, vcpu_stride;
    uint64_t host_offset, host_stride;
    uint64_t ports_offset;       /* uint16_t[SEG_PORTS]: index into regs */
    uint64_t regs_offset;        /* struct reg_desc[SEG_MAX_REGS] */
    uint64_t shadow_offset;      /* uint64_t[SEG_MAX_SHADOWS]: device host, atomic release */
    uint64_t maps_offset;        /* struct memory_map[2] */
    uint64_t fabric_offset, code_offset;
    uint64_t state_offset, state_stride; /* struct state_area by device host, then its output ring: SEG_OUTPUT_ROOM bytes */
    uint64_t dirty_offset;       /* uint8_t a page: 1 = written since last cleared */
    uint64_t code_mask_offset;   /* uint64_t a page: bit l = the 64-byte line l holds translated code */
    uint64_t guest;              /* first byte of guest memory = RAM */
    uint64_t guest_pages;
    uint64_t vram, rom;          /* offsets */
    uint64_t map_version;        /* odd/even picks maps[version & 1]; writer: who holds map_lock; atomic */
    uint32_t map_lock, stopped;
    uint32_t next_device, next_reg, next_shadow, next_hazard, next_time_source; /* first free index; atomic fetch_add */
    uint32_t hosts;              /* device hosts in use */
    struct world_lock world;
    struct timebase time;
    struct time_source time_source[SEG_MAX_TIME_SOURCES];
    uint8_t device_name[64][SEG_NAME_LEN]; /* by device id, for tables and traces */
};
