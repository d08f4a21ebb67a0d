/* Console, verdicts, time, memory routines. */
#include "guest.h"

#include <stdarg.h>

#define COM1 0x3f8
#define DEBUG_EXIT 0xf4
#define HPET 0xfed00000ul
#define EXIT_PASS 0x10 /* status 33 */
#define EXIT_FAIL 0x11 /* status 35 */

static int failures;
static u32 print_lock;

void *memset(void *to, int byte, size_t n)
{
    void *at = to;
    asm volatile("rep stosb" : "+D"(at), "+c"(n) : "a"(byte) : "memory");
    return to;
}

void *memcpy(void *to, const void *from, size_t n)
{
    void *at = to;
    asm volatile("rep movsb" : "+D"(at), "+S"(from), "+c"(n) : : "memory");
    return to;
}

int memcmp(const void *a, const void *b, size_t n)
{
    const u8 *x = a, *y = b;
    for (size_t i = 0; i < n; i++) {
        if (x[i] != y[i]) {
            return x[i] - y[i];
        }
    }
    return 0;
}

u64 random64(u64 *state)
{
    *state ^= *state >> 12;
    *state ^= *state << 25;
    *state ^= *state >> 27;
    return *state * 0x2545f4914f6cdd1dul;
}

/* ---- console ---- */
static void put(char c) { outb(COM1, (u8)c); }

static void put_string(const char *s)
{
    while (*s) {
        put(*s++);
    }
}

static void put_number(u64 v, unsigned base)
{
    char digits[24];
    int n = 0;
    do {
        digits[n++] = "0123456789abcdef"[v % base];
        v /= base;
    } while (v);
    while (n) {
        put(digits[--n]);
    }
}

static void vprint(const char *f, va_list args)
{
    for (; *f; f++) {
        if (*f != '%') {
            put(*f);
            continue;
        }
        bool wide = *++f == 'l';
        f += wide;
        switch (*f) {
        case 's': put_string(va_arg(args, const char *)); break;
        case 'c': put((char)va_arg(args, int)); break;
        case 'd': {
            long v = wide ? va_arg(args, long) : va_arg(args, int);
            if (v < 0) {
                put('-');
                v = -v;
            }
            put_number((u64)v, 10);
            break;
        }
        case 'u': put_number(wide ? va_arg(args, u64) : va_arg(args, u32), 10); break;
        case 'x': put_number(wide ? va_arg(args, u64) : va_arg(args, u32), 16); break;
        default: put(*f);
        }
    }
}

static void lock(void)
{
    while (__atomic_exchange_n(&print_lock, 1, __ATOMIC_ACQUIRE)) {
        pause();
    }
}

static void unlock(void) { __atomic_store_n(&print_lock, 0, __ATOMIC_RELEASE); }

void print(const char *format, ...)
{
    va_list args;
    va_start(args, format);
    lock();
    vprint(format, args);
    unlock();
    va_end(args);
}

void check(const char *name, bool ok, const char *format, ...)
{
    va_list args;
    va_start(args, format);
    lock();
    if (ok) {
        put_string("ok ");
        put_string(name);
    } else {
        failures++;
        put_string("FAIL ");
        put_string(name);
        put_string(": ");
        vprint(format, args);
    }
    put('\n');
    unlock();
    va_end(args);
}

_Noreturn static void leave(u8 status)
{
    outb(DEBUG_EXIT, status);
    for (;;) {
        asm volatile("cli; hlt");
    }
}

_Noreturn void finish(void) { leave(failures ? EXIT_FAIL : EXIT_PASS); }

_Noreturn void die(const char *format, ...)
{
    va_list args;
    va_start(args, format); /* without the lock: whoever holds it may be dead */
    put_string("FAIL guest: ");
    vprint(format, args);
    put('\n');
    va_end(args);
    leave(EXIT_FAIL);
}

/* ---- time (HPET specification 1.0a, section 2.3) ---- */
static volatile u64 *hpet(unsigned reg) { return (volatile u64 *)(HPET + reg); }
static u64 tick_fs;

u64 time_ns(void) { return *hpet(0xf0) / 1000 * tick_fs / 1000 + *hpet(0xf0) % 1000 * tick_fs / 1000000; }

void delay_ns(u64 ns)
{
    u64 until = time_ns() + ns;
    while (time_ns() < until) {
        pause();
    }
}

/* ---- interrupts ---- */
struct gate { u16 low; u16 selector; u16 type; u16 middle; u32 high; u32 zero; };
static struct gate idt[256] __attribute__((aligned(16)));
volatile handler handlers[256];
extern char stubs[];

static void idt_init(void)
{
    for (int i = 0; i < 256; i++) {
        u64 at = (u64)stubs + 16ul * (u64)i;
        idt[i] = (struct gate){(u16)at, 8, 0x8e00, (u16)(at >> 16), (u32)(at >> 32), 0};
    }
}

void idt_load(void);
void idt_load(void)
{
    struct { u16 limit; u64 base; } __attribute__((packed)) p = {sizeof idt - 1, (u64)idt};
    asm volatile("lidt %0" : : "m"(p));
}

void interrupt(struct frame *f);
void interrupt(struct frame *f)
{
    handler h = handlers[f->vector & 0xff];
    if (!h) {
        die("vector %lu error %lx at %lx cr2 %lx on processor %d", f->vector, f->error, f->rip, read_cr2(), cpu_index());
    }
    h(f);
}

void cpus_init(void);
void guest_start(void);
void guest_start(void)
{
    tick_fs = *hpet(0) >> 32;
    *hpet(0x10) |= 1;
    pic_init(0x20, 0xff, 0xff); /* whatever loaded us may have left it open */
    idt_init();
    idt_load();
    cpus_init();
    main();
    finish();
}
