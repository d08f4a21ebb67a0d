/*
 * What the guests of ours share: they are started by multiboot in long mode with the first 8 GiB mapped one
 * to one, speak through COM1, and end the machine through isa-debug-exit with a status of their own.
 * A guest is one C file with main(); each thing it shows is a line "ok NAME" or "FAIL NAME: why".
 */
#ifndef GUEST_H
#define GUEST_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

typedef uint8_t u8;
typedef uint16_t u16;
typedef uint32_t u32;
typedef uint64_t u64;

#define MAX_CPUS 8
#define PAGE 4096ul
#define COUNT(a) (sizeof(a) / sizeof(a)[0])

/* ---- instructions ---- */
static inline void outb(u16 port, u8 v) { asm volatile("outb %0, %1" : : "a"(v), "Nd"(port)); }
static inline void outw(u16 port, u16 v) { asm volatile("outw %0, %1" : : "a"(v), "Nd"(port)); }
static inline void outl(u16 port, u32 v) { asm volatile("outl %0, %1" : : "a"(v), "Nd"(port)); }
static inline u8 inb(u16 port) { u8 v; asm volatile("inb %1, %0" : "=a"(v) : "Nd"(port)); return v; }
static inline u16 inw(u16 port) { u16 v; asm volatile("inw %1, %0" : "=a"(v) : "Nd"(port)); return v; }
static inline u32 inl(u16 port) { u32 v; asm volatile("inl %1, %0" : "=a"(v) : "Nd"(port)); return v; }
static inline void insw(u16 port, void *to, u64 words)
{
    asm volatile("rep insw" : "+D"(to), "+c"(words) : "d"(port) : "memory");
}
static inline void outsw(u16 port, const void *from, u64 words)
{
    asm volatile("rep outsw" : "+S"(from), "+c"(words) : "d"(port) : "memory");
}
static inline void cli(void) { asm volatile("cli" : : : "memory"); }
static inline void sti(void) { asm volatile("sti" : : : "memory"); }
static inline void sti_hlt(void) { asm volatile("sti; hlt" : : : "memory"); }
static inline void pause(void) { asm volatile("pause" : : : "memory"); }
static inline void barrier(void) { asm volatile("" : : : "memory"); }
static inline u64 rdtsc(void) { u32 a, d; asm volatile("rdtsc" : "=a"(a), "=d"(d)); return (u64)d << 32 | a; }
static inline u64 rdmsr(u32 n) { u32 a, d; asm volatile("rdmsr" : "=a"(a), "=d"(d) : "c"(n)); return (u64)d << 32 | a; }
static inline void wrmsr(u32 n, u64 v)
{
    asm volatile("wrmsr" : : "c"(n), "a"((u32)v), "d"((u32)(v >> 32)) : "memory");
}
static inline void invlpg(const volatile void *at) { asm volatile("invlpg (%0)" : : "r"(at) : "memory"); }
static inline u64 read_cr2(void) { u64 v; asm volatile("mov %%cr2, %0" : "=r"(v)); return v; }
static inline void write_cr8(u64 v) { asm volatile("mov %0, %%cr8" : : "r"(v) : "memory"); }
static inline void cpuid(u32 leaf, u32 sub, u32 r[4])
{
    asm volatile("cpuid" : "=a"(r[0]), "=b"(r[1]), "=c"(r[2]), "=d"(r[3]) : "a"(leaf), "c"(sub) : "memory");
}
static inline void serialize(void) { u32 r[4]; cpuid(0, 0, r); }

/* ---- console, verdicts, the end: runtime.c ---- */
void print(const char *format, ...) __attribute__((format(printf, 1, 2))); /* %s %c %d %u %x, l; no widths but %08x's kind */
void check(const char *name, bool ok, const char *format, ...) __attribute__((format(printf, 3, 4)));
_Noreturn void finish(void);                /* status 33 when nothing failed, else 35 */
_Noreturn void die(const char *format, ...) __attribute__((format(printf, 1, 2)));
void *memset(void *to, int byte, size_t n);
void *memcpy(void *to, const void *from, size_t n);
int memcmp(const void *a, const void *b, size_t n);
u64 random64(u64 *state);                   /* xorshift64*; the state must not be 0 */

/* ---- time: the HPET's counter, in ns; not for judging, but to tell a hang from a wait ---- */
u64 time_ns(void);
void delay_ns(u64 ns);
#define PATIENCE_NS 20000000000ul
/* Waits for the condition; false when it has not come true within PATIENCE_NS. */
#define await(condition)                                              \
    ({                                                                \
        u64 until_ = 0;                                               \
        bool came_;                                                   \
        for (unsigned n_ = 1; !(came_ = (condition)); n_++) {         \
            pause();                                                  \
            if (n_ % 1024 == 0) {                                     \
                u64 now_ = time_ns();                                 \
                until_ = until_ ? until_ : now_ + PATIENCE_NS;        \
                if (now_ > until_) {                                  \
                    break;                                            \
                }                                                     \
            }                                                         \
        }                                                             \
        came_;                                                        \
    })

/* ---- interrupts ---- */
struct frame {
    u64 r15, r14, r13, r12, r11, r10, r9, r8, rdi, rsi, rbp, rbx, rdx, rcx, rax;
    u64 vector, error;
    u64 rip, cs, rflags, rsp, ss;
};
typedef void (*handler)(struct frame *);
extern volatile handler handlers[256];      /* NULL: the guest dies with the frame printed */

/* ---- local APIC and processors: cpus.c ---- */
enum {
    APIC_ID = 0x020, APIC_TPR = 0x080, APIC_PPR = 0x0a0, APIC_EOI = 0x0b0, APIC_LDR = 0x0d0, APIC_DFR = 0x0e0, APIC_SVR = 0x0f0,
    APIC_ISR = 0x100, APIC_TMR = 0x180, APIC_IRR = 0x200, APIC_ESR = 0x280, APIC_ICR = 0x300, APIC_ICR_HIGH = 0x310,
    APIC_LVT_TIMER = 0x320, APIC_LVT_LINT0 = 0x350, APIC_LVT_LINT1 = 0x360, APIC_TIMER_INITIAL = 0x380,
    APIC_TIMER_CURRENT = 0x390, APIC_TIMER_DIVIDE = 0x3e0, APIC_SELF_IPI = 0x3f0
};
#define ICR_FIXED 0x4000u
#define ICR_LOWEST 0x4100u
#define ICR_NMI 0x4400u
#define ICR_INIT 0x4500u
#define ICR_SIPI 0x4600u
#define ICR_SELF_EXTINT 0x44700u
#define ICR_LOGICAL 0x800u
#define ICR_SELF 0x40000u
#define ICR_ALL 0x80000u
#define ICR_OTHERS 0xc0000u
#define VECTOR_WAKE 0xfd
#define VECTOR_SPURIOUS 0xff

int cpu_index(void);                        /* of the processor that asks; = its APIC ID */
int cpus_start(int count);                  /* INIT-SIPI-SIPI until `count` run in all; how many do */
void cpu_forget(int cpu);                   /* it is to be started again, whatever it does */
void cpu_run(int cpu, void (*work)(int cpu)); /* on a started processor; at once */
bool cpu_idle(int cpu);                     /* has it finished? */
bool cpus_run(int count, void (*work)(int cpu)); /* on processors 0 to count-1 at once; false: one does not come back */
u32 apic_read(u32 reg);
void apic_write(u32 reg, u32 value);
void apic_eoi(void);
void apic_x2(void);                         /* this processor changes to x2APIC mode */
bool apic_is_x2(void);
void ipi(u32 dest, u32 icr);                /* dest: APIC ID or logical ID */
static inline bool apic_bit(u32 bank, u32 vector) { return apic_read(bank + (vector / 32) * 0x10) >> (vector % 32) & 1; }

/* ---- IOAPIC ---- */
u32 ioapic_read(u32 reg);
void ioapic_write(u32 reg, u32 value);
void ioapic_route(int pin, u32 low, u32 dest); /* low half of the redirection entry: vector, mode, trigger, mask */
#define IOAPIC_LEVEL 0x8000u
#define IOAPIC_MASKED 0x10000u
void pic_init(u8 base, u8 masks_master, u8 masks_slave); /* 8259 pair at vectors base and base + 8 */

/* ---- page tables: a private window of 4 KiB pages, paging.c ---- */
extern u64 pml4[512], pdpt[512];
#define PTE_PRESENT 1ul
#define PTE_WRITE 2ul
#define PTE_ACCESSED 0x20ul
#define PTE_DIRTY 0x40ul
#define PTE_NX (1ul << 63)
#define WINDOW 0x8000000000ul               /* linear 512 GiB; WINDOW_PAGES pages, nothing mapped */
#define WINDOW_PAGES 512
void window_map(unsigned page, u64 physical, u64 flags); /* flags 0: not present. No INVLPG */
u64 window_entry(unsigned page);
#define WINDOW_AT(page) ((volatile u8 *)(WINDOW + (page) * PAGE))

/* ---- PCI configuration space (pci.c), primary IDE master (ide.c), polled ---- */
u32 pci_read(u32 device, u32 function, u32 reg);
void pci_write(u32 device, u32 function, u32 reg, u32 value);
u16 ide_master(void);                       /* base of the bus-master registers; enabled and decoded */
bool ide_read_dma(u32 lba, u8 count, void *to); /* false: error, or no end */
void ide_start_dma(u32 lba, u8 count, void *to);
bool ide_end_dma(void);
bool ide_read_pio(u32 lba, void *to);       /* one sector */
void ide_interrupts(bool on);

int main(void);

#endif
