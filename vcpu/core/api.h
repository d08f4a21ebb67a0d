/*
 * What Python calls: cffi reads this text behind segment.h, so it holds nothing but prototypes.
 * All functions but core_run() return at once; core_run() releases the GIL.
 */
struct cpu;

/* Maps the segment behind fd and makes vCPU `index` of it ready; NULL: error_text() says why. The fd may be closed. */
struct cpu *core_create(int fd, uint32_t index, void *handle);
void core_destroy(struct cpu *c);
const char *core_error(void);                     /* of the last core_create(), one line */
struct vcpu_block *core_block(struct cpu *c);
struct seg_header *core_segment(struct cpu *c);
uint8_t *core_base(struct cpu *c);                /* host address of the segment */

/* Runs at most budget instructions (a REP counts once). Returns enum vcpu_exit. */
int core_run(struct cpu *c, int64_t budget);
/* After someone else wrote the architectural state (reset, load): TLB, blocks' mode and lazy flags follow. */
void core_state_changed(struct cpu *c);
/* Architectural state that is not in struct vcpu_block, for save and load while run() is not inside. */
struct core_hidden {
    uint64_t pdpte[4];       /* PAE: as loaded with CR3; memory may say something else by now */
    uint32_t lint0_seen;     /* level of the PIC's INTR at the last look */
    uint32_t debug_hit;      /* DR6 bits of breakpoints that were met and wait behind MOV SS (SDM vol. 3 section 6.8.3) */
};
void core_hidden_get(const struct cpu *c, struct core_hidden *out);
/* arch and the posted words were written: everything that follows from them is made anew, the APIC timer armed. */
void core_loaded(struct cpu *c, const struct core_hidden *hidden);
/* What CPUID answers now: EAX, EBX, ECX, EDX. */
void core_cpuid(const struct cpu *c, uint32_t leaf, uint32_t subleaf, uint32_t out[4]);
/* RFLAGS as they were when the process of this vCPU died. */
uint64_t core_last_rflags(const struct vcpu_block *block);
/* HLT ends run() with EXIT_DEBUG, rip behind it: how a program without devices ends in tests. */
void core_halt_exits(struct cpu *c, int on);
/* Architectural state as after power-on; an AP then waits for SIPI. Posted words are emptied. */
void core_power_on(struct cpu *c);
/* gpa of a linear address, without side effects or checks of privilege; SEG_NO_OFFSET: not mapped. While run() is not inside. */
uint64_t core_translate(struct cpu *c, uint64_t linear);
/* eventfd that wakes device host `host`. */
void core_doorbell(struct cpu *c, uint32_t host, int fd);
/* Raises ATTN_* bits at this vCPU. */
void core_attend(struct cpu *c, uint32_t bits);
