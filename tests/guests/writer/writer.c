/* The first program of a Linux that writes its disk /dev/sda without end and knows what must be on it.
 *
 * Round n = 1, 2, 3, ... writes pieces of 4 KiB at a place that follows from n alone (see plan), so that the host can make the
 * same disk: every third round through the page cache with fdatasync, the others by direct I/O, every eighth with a flush behind
 * it. Then it reads another place by direct I/O and compares. On the console:
 *   wrote N          so many rounds are done and right; every tenth
 *   bad N BLOCK      round N found other data in that block, and no more
 *   failed WHAT      a call failed, and no more
 *   kernel LINE      after a byte on /dev/ttyS1: what the kernel's log says of trouble with the disk
 *   end N            behind that: all is flushed; power off
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/klog.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/syscall.h>
#include <termios.h>
#include <unistd.h>

enum { BLOCK = 4096, MOST = 32, BLOCKS = 4096, WORDS = BLOCK / 8 };

struct place { unsigned first, count; };

static uint32_t written[BLOCKS]; /* the round that wrote a block last; 0: as the host made it, not looked at */
static uint64_t data[MOST * WORDS] __attribute__((aligned(BLOCK)));

static void say(const char *format, ...)
{
    char line[512];
    va_list arguments;
    va_start(arguments, format);
    int length = vsnprintf(line, sizeof line, format, arguments);
    va_end(arguments);
    if (length >= (int)sizeof line)
        length = sizeof line - 1;
    if (write(STDOUT_FILENO, line, (size_t)length) != length)
        sleep(1);
}

static void stop_here(void)
{
    for (;;)
        pause();
}

static void must(int good, const char *what)
{
    if (good)
        return;
    say("failed %s: %s\n", what, strerror(errno));
    stop_here();
}

/* The finalizer of SplitMix64 (Steele, Lea, Flood 2014). */
static uint64_t mix(uint64_t z)
{
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return z ^ z >> 31;
}

static struct place plan(uint64_t n)
{
    uint64_t r = mix(n * 0x9e3779b97f4a7c15u);
    unsigned count = 1 + (unsigned)(r >> 32) % MOST;
    return (struct place){(unsigned)(r & 0xffffffff) % (BLOCKS - count), count};
}

static uint64_t word(uint32_t round, unsigned block, unsigned index)
{
    return (uint64_t)round << 32 | block << 12 | index;
}

static void write_place(int fd, struct place at, uint32_t n)
{
    for (unsigned i = 0; i < at.count * WORDS; i++)
        data[i] = word(n, at.first + i / WORDS, i % WORDS);
    size_t bytes = at.count * BLOCK;
    must(pwrite(fd, data, bytes, (off_t)at.first * BLOCK) == (ssize_t)bytes, "write");
    for (unsigned block = 0; block < at.count; block++)
        written[at.first + block] = n;
}

static void read_place(int fd, struct place at, uint32_t n)
{
    size_t bytes = at.count * BLOCK;
    must(pread(fd, data, bytes, (off_t)at.first * BLOCK) == (ssize_t)bytes, "read");
    for (unsigned i = 0; i < at.count * WORDS; i++) {
        unsigned block = at.first + i / WORDS;
        if (written[block] && data[i] != word(written[block], block, i % WORDS)) {
            say("bad %u %u\n", n, block);
            stop_here();
        }
    }
}

static void load_modules(void)
{
    FILE *order = fopen("/modules/order", "r");
    char name[64], path[96];
    must(order != NULL, "/modules/order");
    while (fscanf(order, "%63s", name) == 1) {
        snprintf(path, sizeof path, "/modules/%s.ko", name);
        int fd = open(path, O_RDONLY | O_CLOEXEC);
        must(fd >= 0 && (syscall(SYS_finit_module, fd, "", 0) == 0 || errno == EEXIST), path);
        close(fd);
    }
    fclose(order);
}

/* syslog(2): 3 reads all of the kernel's log */
static void say_trouble(void)
{
    static char log[1 << 20];
    static const char *const signs[] = {"exception Emask", "resetting link", "I/O error", "timed out", "(timeout)"};
    int length = klogctl(3, log, sizeof log - 1);
    must(length > 0, "syslog");
    for (char *line = strtok(log, "\n"); line != NULL; line = strtok(NULL, "\n"))
        for (unsigned i = 0; i < sizeof signs / sizeof signs[0]; i++)
            if (strstr(line, signs[i]) != NULL)
                say("kernel %s\n", line);
}

static int open_soon(const char *path, int flags)
{
    for (int tries = 0; tries < 6000; tries++) { /* libata probes its ports in the background */
        int fd = open(path, flags | O_CLOEXEC);
        if (fd >= 0)
            return fd;
        usleep(10000);
    }
    must(0, path);
    return -1;
}

int main(void)
{
    char byte;
    mount("dev", "/dev", "devtmpfs", 0, NULL);
    load_modules();
    int direct = open_soon("/dev/sda", O_RDWR | O_DIRECT), cached = open_soon("/dev/sda", O_RDWR);
    int host = open_soon("/dev/ttyS1", O_RDONLY | O_NONBLOCK | O_NOCTTY);
    struct termios raw;
    must(tcgetattr(host, &raw) == 0, "ttyS1");
    cfmakeraw(&raw);
    must(tcsetattr(host, TCSANOW, &raw) == 0, "ttyS1");
    uint32_t n = 0;
    while (read(host, &byte, 1) != 1) {
        int through_cache = ++n % 3 == 0;
        write_place(through_cache ? cached : direct, plan(n), n);
        if (through_cache || n % 8 == 0)
            must(fdatasync(cached) == 0, "fdatasync");
        read_place(direct, plan(n + (1u << 31)), n);
        if (n % 10 == 0)
            say("wrote %u\n", n);
    }
    must(fsync(cached) == 0, "fsync");
    say_trouble();
    say("end %u\n", n);
    tcdrain(STDOUT_FILENO);
    reboot(RB_POWER_OFF);
    stop_here();
}
