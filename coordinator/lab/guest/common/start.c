#define _GNU_SOURCE
#include "start.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "report.h"

enum { TRIES = 6000, PAUSE_US = 10000 };

static char command_line[4096];

static void load_modules(void)
{
    FILE *order = fopen("/modules/order", "r");
    char name[64], path[96];
    if (order == NULL)
        give_up("/modules/order");
    while (fscanf(order, "%63s", name) == 1) {
        snprintf(path, sizeof path, "/modules/%s.ko", name);
        int fd = open(path, O_RDONLY | O_CLOEXEC);
        if (fd < 0 || (syscall(SYS_finit_module, fd, "", 0) != 0 && errno != EEXIST))
            give_up(path);
        close(fd);
    }
    fclose(order);
}

void begin_beside(void)
{
    int fd = open("/proc/cmdline", O_RDONLY | O_CLOEXEC);
    if (fd < 0 || read(fd, command_line, sizeof command_line - 1) < 0)
        give_up("/proc/cmdline");
    close(fd);
}

void begin(void)
{
    mount("dev", "/dev", "devtmpfs", 0, NULL);
    mount("proc", "/proc", "proc", 0, NULL);
    mount("sys", "/sys", "sysfs", 0, NULL);
    begin_beside();
    load_modules();
}

const char *word(const char *name, const char *otherwise)
{
    static char values[16][128];
    static unsigned used;
    size_t length = strlen(name);
    for (const char *at = command_line; (at = strstr(at, name)) != NULL; at += length)
        if (at[length] == '=' && used < 16) {
            sscanf(at + length + 1, "%127s", values[used]);
            return values[used++];
        }
    return otherwise;
}

unsigned number(const char *name, unsigned otherwise)
{
    const char *text = word(name, NULL);
    return text == NULL ? otherwise : (unsigned)strtoul(text, NULL, 10);
}

int open_soon(const char *path, int flags)
{
    for (int tries = 0; tries < TRIES; tries++) {
        int fd = open(path, flags | O_CLOEXEC);
        if (fd >= 0)
            return fd;
        usleep(PAUSE_US);
    }
    give_up(path);
}

void start_beside(const char *path)
{
    char *const arguments[] = {(char *)path, NULL}, *const environment[] = {NULL};
    pid_t child = vfork();
    if (child == 0) {
        execve(path, arguments, environment);
        _exit(127);
    }
    if (child < 0)
        give_up(path);
}
