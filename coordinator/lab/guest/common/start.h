/* What a first program does: file systems of the kernel's own, modules, and the words of the command line. */
#ifndef LAB_START_H
#define LAB_START_H

/* Mounts /dev, /proc and /sys, loads the modules of the archive in their order. Gives up where it cannot. */
void begin(void);

/* Mounts nothing: for a program that another one has started. */
void begin_beside(void);

/* The value of a word of the kernel's command line, or what stands in for it. */
const char *word(const char *name, const char *otherwise);
unsigned number(const char *name, unsigned otherwise);

/* Opens a device, as soon as its driver has found it (libata probes its ports in the background). */
int open_soon(const char *path, int flags);

/* Starts another program of the archive beside this one. */
void start_beside(const char *path);

#endif
