/* Writes, fsyncs and verifies the disk /dev/sda without end, beside cdreader: files on a FAT volume that it makes in the first
 * half, blocks in the second, through the page cache and by direct I/O.
 *
 * Round n = 1, 2, 3, ... writes one file and one run of blocks that follow from n alone, and compares others:
 *   files    rewritten, or written anew and renamed over the old one, through the page cache, then fsync; read back from the medium
 *   blocks   every third round through the page cache with fdatasync, the others by direct I/O, every eighth with a flush behind
 *            it; read back by direct I/O
 * A line from the host ends it: all is flushed, the volume is mounted anew, and every file and block is compared.
 * Lines for the host:
 *   @diskready TSC BYTES
 *   @disk TSC ROUNDS SYNCS BYTES        so many rounds, flushes that were told to be done and bytes compared; every 20 ms
 *   @diskwrong TSC BYTES WHERE          bytes that are others than were written
 *   @diskerror TSC ERRNO WHAT           a call failed; it is made again
 *   @diskend TSC ROUNDS SYNCS BYTES HEX the end; SHA-256 of the second half
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <termios.h>
#include <unistd.h>

#include "content.h"
#include "fat.h"
#include "report.h"
#include "sha256.h"
#include "start.h"

typedef unsigned long long u64;

enum { FILES = 24, MOST_BLOCKS = 32, MOST_FILE_BLOCKS = 64, BLOCK_LIMIT = 1 << 15, SAY_NS = 20000000, AGAIN_US = 1000 };
/* of the word "place" of the contents: files have their numbers */
enum { RAW = 0xff };

struct run { unsigned first, count; };

static const char FOLDER[] = "/files";
static uint64_t data[MOST_FILE_BLOCKS * BLOCK_WORDS] __attribute__((aligned(BLOCK)));
/* the round that wrote a file or a block last, 0: none */
static uint32_t file_round[FILES], block_round[BLOCK_LIMIT];
static unsigned file_blocks[FILES];
static unsigned blocks; /* of the second half, which begins at `half` */
static off_t half;
static int direct, cached;
static u64 rounds, syncs, compared;

static void failed(const char *what)
{
    report("@diskerror %llu %d %s", (u64)tsc(), errno, what);
    usleep(AGAIN_US);
}

/* Do it until it works. */
#define INSIST(condition, what) \
    do { \
        errno = 0; \
        while (!(condition)) \
            failed(what); \
    } while (0)

static void compare(const uint64_t *found, uint32_t round, unsigned place, unsigned block)
{
    size_t count = wrong(found, round, place, block);
    if (count)
        report("@diskwrong %llu %zu place %u block %u of round %u", (u64)tsc(), count, place, block, round);
    compared += BLOCK;
}

/* ---- blocks ---- */
static struct run place_of(u64 n)
{
    u64 r = drawn(n);
    unsigned count = 1 + (unsigned)(r >> 32) % MOST_BLOCKS;
    return (struct run){(unsigned)(r & 0xffffffff) % (blocks - count), count};
}

static off_t at_block(unsigned block) { return half + (off_t)block * BLOCK; }

static void write_blocks(struct run at, uint32_t n)
{
    int through_cache = n % 3 == 0;
    size_t bytes = (size_t)at.count * BLOCK;
    fill(data, n, RAW, at.first, at.count);
    INSIST(pwrite(through_cache ? cached : direct, data, bytes, at_block(at.first)) == (ssize_t)bytes, "write of blocks");
    for (unsigned i = 0; i < at.count; i++)
        block_round[at.first + i] = n;
    if (through_cache || n % 8 == 0) {
        INSIST(fdatasync(cached) == 0, "fdatasync");
        syncs++;
    }
}

static void check_blocks(struct run at)
{
    size_t bytes = (size_t)at.count * BLOCK;
    INSIST(pread(direct, data, bytes, at_block(at.first)) == (ssize_t)bytes, "read of blocks");
    for (unsigned i = 0; i < at.count; i++)
        if (block_round[at.first + i])
            compare(data + i * BLOCK_WORDS, block_round[at.first + i], RAW, at.first + i);
}

/* ---- files ---- */
static const char *path_of(unsigned file)
{
    static char path[32];
    snprintf(path, sizeof path, "%s/f%02u", FOLDER, file);
    return path;
}

static void write_file(unsigned file, uint32_t n)
{
    static char fresh[32];
    snprintf(fresh, sizeof fresh, "%s/new", FOLDER);
    int anew = n % 4 == 0, fd;
    unsigned count = 1 + (unsigned)(drawn(n) >> 40) % MOST_FILE_BLOCKS;
    size_t bytes = (size_t)count * BLOCK;
    fill(data, n, file, 0, count);
    INSIST((fd = open(anew ? fresh : path_of(file), O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0600)) >= 0, "open of a file");
    INSIST(pwrite(fd, data, bytes, 0) == (ssize_t)bytes, "write of a file");
    INSIST(fsync(fd) == 0, "fsync");
    close(fd);
    if (anew)
        INSIST(rename(fresh, path_of(file)) == 0, "rename");
    syncs++;
    file_round[file] = n;
    file_blocks[file] = count;
}

static void check_file(unsigned file)
{
    int fd;
    size_t bytes = (size_t)file_blocks[file] * BLOCK;
    if (!file_round[file])
        return;
    INSIST((fd = open(path_of(file), O_RDONLY | O_CLOEXEC)) >= 0, "open of a file");
    posix_fadvise(fd, 0, 0, POSIX_FADV_DONTNEED); /* what is read comes from the medium */
    INSIST(pread(fd, data, sizeof data, 0) == (ssize_t)bytes, "read of a file");
    close(fd);
    for (unsigned block = 0; block < file_blocks[file]; block++)
        compare(data + block * BLOCK_WORDS, file_round[file], file, block);
}

/* ---- from the beginning to the end ---- */
static int console_quiet(void)
{
    struct termios settings;
    int fd = open_soon("/dev/ttyS0", O_RDONLY | O_NONBLOCK | O_NOCTTY);
    if (tcgetattr(fd, &settings) != 0)
        give_up("/dev/ttyS0");
    settings.c_lflag &= ~(tcflag_t)(ECHO | ICANON);
    if (tcsetattr(fd, TCSANOW, &settings) != 0)
        give_up("/dev/ttyS0");
    return fd;
}

static void mount_volume(void) { INSIST(mount("/dev/sda", FOLDER, "msdos", MS_NOATIME, NULL) == 0, "mount"); }

static void end(void)
{
    char hex[65];
    struct sha256 sha;
    INSIST(umount(FOLDER) == 0, "umount");
    INSIST(fsync(cached) == 0, "fsync of the disk");
    mount_volume();
    for (unsigned file = 0; file < FILES; file++)
        check_file(file);
    INSIST(umount(FOLDER) == 0, "umount");
    sha256_begin(&sha);
    for (unsigned block = 0; block < blocks; block += MOST_BLOCKS) {
        struct run at = {block, blocks - block < MOST_BLOCKS ? blocks - block : MOST_BLOCKS};
        check_blocks(at);
        sha256_add(&sha, (const uint8_t *)data, (size_t)at.count * BLOCK);
    }
    sha256_end(&sha, hex);
    report("@diskend %llu %llu %llu %llu %s", (u64)tsc(), rounds, syncs, compared, hex);
}

int main(void)
{
    begin_beside();
    uint64_t said = 0;
    char byte;
    direct = open_soon("/dev/sda", O_RDWR | O_DIRECT);
    cached = open_soon("/dev/sda", O_RDWR);
    off_t bytes = lseek(cached, 0, SEEK_END);
    half = bytes / 2 / BLOCK * BLOCK;
    blocks = (unsigned)((bytes - half) / BLOCK);
    if (bytes < 48 << 20 || blocks > BLOCK_LIMIT)
        give_up("a disk of 48 to 256 MiB");
    mkdir(FOLDER, 0700);
    INSIST(make_fat(cached, (uint64_t)half) == 0, "the volume");
    mount_volume();
    int host = console_quiet();
    report("@diskready %llu %lld", (u64)tsc(), (long long)bytes);
    while (read(host, &byte, 1) != 1) {
        uint32_t n = (uint32_t)++rounds;
        write_blocks(place_of(n), n);
        write_file((unsigned)(drawn(n) >> 32) % FILES, n);
        check_blocks(place_of(n + (1ull << 32)));
        check_file((unsigned)(drawn(n + (1ull << 33)) >> 32) % FILES);
        uint64_t now = clock_ns();
        if (now - said >= SAY_NS) {
            report("@disk %llu %llu %llu %llu", (u64)tsc(), rounds, syncs, compared);
            said = now;
        }
    }
    end();
    for (;;)
        pause();
}
