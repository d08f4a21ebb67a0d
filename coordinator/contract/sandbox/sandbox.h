/*
 * What confines an island: prctl(2), seccomp(2), landlock(7), capabilities(7). Which system calls a role may make is
 * in policy.h, which files it may see in files.py. Functions return 0 or a number of their own, or -errno.
 */
enum role { ROLE_VCPU = 1, ROLE_DEVHOST = 2, ROLE_BLOCKD = 4 };

/* Nothing that is executed from now on gains privileges; the other steps need it. */
int sandbox_no_new_privileges(void);

/* Give up all capabilities of this thread but those in `keep` (bit n: capability n). */
int sandbox_keep_capabilities(uint64_t keep);

/* Version of Landlock's interface in this kernel, or -errno where there is none. */
int sandbox_landlock_version(void);

/* A rule set that denies `files` (LANDLOCK_ACCESS_FS_*) everywhere, and TCP, abstract sockets and signals to others as
 * far as `version` knows them. A descriptor. */
int sandbox_landlock_rules(int version, uint64_t files);

/* Allow `access` to the file `fd`, or to all below the folder `fd`. */
int sandbox_landlock_allow(int rules, int fd, uint64_t access);

/* This thread, and all that it starts, is bound by the rules from now on. */
int sandbox_landlock_enforce(int rules);

/* All threads of the process are bound by the role's system calls from now on. `name` is whom refused calls are logged
 * as, into descriptor 2. */
int sandbox_seccomp(enum role role, const char *name);
