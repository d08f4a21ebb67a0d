/*
 * The policy: which system calls an island makes once it serves. One row a call, or one for each of its arguments that is
 * allowed; what has no row is refused with EPERM and a line in the log.
 *
 * DENY refuses without a line, UNKNOWN says ENOSYS. KILL is for calls that only somebody who has taken the process over makes. Of others it cannot be told: a C library of
 * another version tries a newer call, and falls back to an older one when it is refused.
 *
 * Who needs what:
 *   vcpu     is in the guest; its host stubs are code made at run time (memfd mapped twice), so it alone may map
 *            executable memory. No files.
 *   devhost  sockets, timers, guest memory. No files.
 *   blockd   reads and writes images, as far as Landlock lets it see them, and starts a thread for each client.
 * connect(2) is for the reconnection to sockets in the machine's folder; addresses cannot be told apart here.
 */
#define V ROLE_VCPU
#define D ROLE_DEVHOST
#define B ROLE_BLOCKD
#define ALL (V | D | B)

/* call, roles, test, number of the argument, value */
static const struct rule policy[] = {
    /* descriptors that are there */
    ROW(read, ALL, ALLOW, 0, 0),
    ROW(write, ALL, ALLOW, 0, 0),
    ROW(readv, ALL, ALLOW, 0, 0),
    ROW(writev, ALL, ALLOW, 0, 0),
    ROW(close, ALL, ALLOW, 0, 0),
    ROW(lseek, ALL, ALLOW, 0, 0),
    ROW(fstat, ALL, ALLOW, 0, 0),
    ROW(dup, ALL, ALLOW, 0, 0),
    ROW(poll, ALL, ALLOW, 0, 0),
    ROW(ppoll, ALL, ALLOW, 0, 0),
    ROW(select, ALL, ALLOW, 0, 0),
    ROW(pselect6, ALL, ALLOW, 0, 0),
    ROW(epoll_create1, ALL, ALLOW, 0, 0),
    ROW(epoll_ctl, ALL, ALLOW, 0, 0),
    ROW(epoll_wait, ALL, ALLOW, 0, 0),
    ROW(epoll_pwait, ALL, ALLOW, 0, 0),
    ROW(epoll_pwait2, ALL, ALLOW, 0, 0),
    ROW(eventfd2, ALL, ALLOW, 0, 0),
    ROW(timerfd_create, ALL, ALLOW, 0, 0),
    ROW(timerfd_settime, ALL, ALLOW, 0, 0),
    ROW(timerfd_gettime, ALL, ALLOW, 0, 0),
    ROW(pipe2, ALL, ALLOW, 0, 0),
    ROW(fcntl, ALL, ARGUMENT_IS, 1, F_GETFD),
    ROW(fcntl, ALL, ARGUMENT_IS, 1, F_SETFD),
    ROW(fcntl, ALL, ARGUMENT_IS, 1, F_GETFL),
    ROW(fcntl, ALL, ARGUMENT_IS, 1, F_SETFL),
    ROW(fcntl, ALL, ARGUMENT_IS, 1, F_DUPFD_CLOEXEC),
    ROW(fcntl, ALL, ARGUMENT_IS, 1, F_GET_SEALS),
    ROW(fcntl, B, ARGUMENT_IS, 1, F_OFD_SETLK),
    ROW(fcntl, B, ARGUMENT_IS, 1, F_OFD_GETLK),
    ROW(ioctl, ALL, ARGUMENT_IS, 1, FIONBIO),
    ROW(ioctl, ALL, ARGUMENT_IS, 1, FIONREAD),
    ROW(ioctl, ALL, ARGUMENT_IS, 1, FIOCLEX),
    ROW(ioctl, ALL, ARGUMENT_IS, 1, TCGETS),
    ROW(ioctl, ALL, ARGUMENT_IS, 1, TIOCGWINSZ),
    ROW(ioctl, B, ARGUMENT_IS, 1, BLKGETSIZE64),
    ROW(ioctl, B, ARGUMENT_IS, 1, BLKSSZGET),

    /* sockets: of the machine, in its own folder */
    ROW(socket, ALL, ARGUMENT_IS, 0, AF_UNIX),
    ROW(socketpair, ALL, ARGUMENT_IS, 0, AF_UNIX),
    ROW(connect, ALL, ALLOW, 0, 0),
    ROW(accept4, D | B, ALLOW, 0, 0),
    ROW(bind, B, ALLOW, 0, 0), /* when its images are open */
    ROW(listen, B, ALLOW, 0, 0),
    ROW(sendto, ALL, ALLOW, 0, 0),
    ROW(sendmsg, ALL, ALLOW, 0, 0),
    ROW(recvfrom, ALL, ALLOW, 0, 0),
    ROW(recvmsg, ALL, ALLOW, 0, 0),
    ROW(shutdown, ALL, ALLOW, 0, 0),
    ROW(getsockname, ALL, ALLOW, 0, 0),
    ROW(getpeername, ALL, ALLOW, 0, 0),
    ROW(getsockopt, ALL, ALLOW, 0, 0),
    ROW(setsockopt, ALL, ALLOW, 0, 0),

    /* memory; executable for the vCPU's stubs alone */
    ROW(brk, ALL, ALLOW, 0, 0),
    ROW(mmap, V, ALLOW, 0, 0),
    ROW(mprotect, V, ALLOW, 0, 0),
    ROW(mmap, D | B, ARGUMENT_LACKS, 2, PROT_EXEC),
    ROW(mprotect, D | B, ARGUMENT_LACKS, 2, PROT_EXEC),
    ROW(munmap, ALL, ALLOW, 0, 0),
    ROW(mremap, ALL, ALLOW, 0, 0),
    ROW(madvise, ALL, ALLOW, 0, 0),
    ROW(msync, ALL, ALLOW, 0, 0),
    ROW(mincore, ALL, ALLOW, 0, 0),
    ROW(membarrier, ALL, ALLOW, 0, 0),
    ROW(memfd_create, V, ALLOW, 0, 0),
    ROW(ftruncate, V | B, ALLOW, 0, 0),

    /* threads: blockd has one for each client, the others start none any more */
    ROW(clone, B, ARGUMENT_HAS, 0, CLONE_THREAD),
    ROW(clone3, ALL, UNKNOWN, 0, 0), /* flags behind a pointer: the C library asks clone instead */
    /* what a thread that is there begins with, which may be late; ZeroMQ's set their priority. They block signals, so a
     * refusal would be the end of the process. */
    ROW(set_robust_list, ALL, ALLOW, 0, 0),
    ROW(sched_getparam, ALL, ALLOW, 0, 0),
    ROW(sched_getscheduler, ALL, ALLOW, 0, 0),
    ROW(sched_setscheduler, ALL, ALLOW, 0, 0),
    ROW(sched_setparam, ALL, ALLOW, 0, 0),
    ROW(setpriority, ALL, ALLOW, 0, 0),
    ROW(rseq, ALL, ALLOW, 0, 0),
    ROW(futex, ALL, ALLOW, 0, 0),
    ROW(sched_yield, ALL, ALLOW, 0, 0),
    ROW(sched_getaffinity, ALL, ALLOW, 0, 0),
    ROW(getcpu, ALL, ALLOW, 0, 0),
    ROW(prctl, ALL, ARGUMENT_IS, 0, PR_SET_NAME),
    ROW(prctl, ALL, ARGUMENT_IS, 0, PR_SET_VMA),
    ROW(exit, ALL, ALLOW, 0, 0),
    ROW(exit_group, ALL, ALLOW, 0, 0),
    ROW(restart_syscall, ALL, ALLOW, 0, 0),

    /* signals: to ourselves alone */
    ROW(rt_sigaction, ALL, ALLOW, 0, 0),
    ROW(rt_sigprocmask, ALL, ALLOW, 0, 0),
    ROW(rt_sigreturn, ALL, ALLOW, 0, 0),
    ROW(rt_sigtimedwait, ALL, ALLOW, 0, 0),
    ROW(sigaltstack, ALL, ALLOW, 0, 0),
    ROW(tgkill, ALL, ARGUMENT_IS_ME, 0, 0),
    ROW(kill, ALL, ARGUMENT_IS_ME, 0, 0),

    /* what time it is, who we are */
    ROW(clock_gettime, ALL, ALLOW, 0, 0),
    ROW(clock_getres, ALL, ALLOW, 0, 0),
    ROW(clock_nanosleep, ALL, ALLOW, 0, 0),
    ROW(nanosleep, ALL, ALLOW, 0, 0),
    ROW(gettimeofday, ALL, ALLOW, 0, 0),
    ROW(time, ALL, ALLOW, 0, 0),
    ROW(getrandom, ALL, ALLOW, 0, 0),
    ROW(getpid, ALL, ALLOW, 0, 0),
    ROW(gettid, ALL, ALLOW, 0, 0),
    ROW(getppid, ALL, ALLOW, 0, 0),
    ROW(getuid, ALL, ALLOW, 0, 0),
    ROW(geteuid, ALL, ALLOW, 0, 0),
    ROW(getgid, ALL, ALLOW, 0, 0),
    ROW(getegid, ALL, ALLOW, 0, 0),
    ROW(getrusage, ALL, ALLOW, 0, 0),
    ROW(times, ALL, ALLOW, 0, 0),
    ROW(uname, ALL, ALLOW, 0, 0),
    ROW(sysinfo, ALL, ALLOW, 0, 0),
    ROW(prlimit64, ALL, ARGUMENT_IS, 2, 0), /* looks, and changes nothing */

    /* names of files. Those who see none are refused without a line: ZeroMQ removes its sockets at the end, and the
     * allocator looks at /sys from threads that block signals */
    ROW(openat, B, ALLOW, 0, 0),
    ROW(openat, V | D, DENY, 0, 0),
    ROW(open, B, ALLOW, 0, 0),
    ROW(newfstatat, V | D, ARGUMENT_HAS, 3, AT_EMPTY_PATH), /* the C library's fstat */
    ROW(newfstatat, B, ALLOW, 0, 0),
    ROW(stat, B, ALLOW, 0, 0),
    ROW(lstat, B, ALLOW, 0, 0),
    ROW(statx, B, ALLOW, 0, 0),
    ROW(access, B, ALLOW, 0, 0),
    ROW(faccessat, B, ALLOW, 0, 0),
    ROW(faccessat2, B, ALLOW, 0, 0),
    ROW(readlink, B, ALLOW, 0, 0),
    ROW(readlinkat, B, ALLOW, 0, 0),
    ROW(getcwd, B, ALLOW, 0, 0),
    ROW(getdents64, B, ALLOW, 0, 0),
    ROW(unlink, B, ALLOW, 0, 0),
    ROW(unlink, V | D, DENY, 0, 0),
    ROW(unlinkat, B, ALLOW, 0, 0),
    ROW(link, B, ALLOW, 0, 0),
    ROW(linkat, B, ALLOW, 0, 0),
    ROW(fchmod, B, ALLOW, 0, 0),
    ROW(umask, B, ALLOW, 0, 0),

    /* contents of images */
    ROW(pread64, B, ALLOW, 0, 0),
    ROW(pwrite64, B, ALLOW, 0, 0),
    ROW(preadv, B, ALLOW, 0, 0),
    ROW(pwritev, B, ALLOW, 0, 0),
    ROW(preadv2, B, ALLOW, 0, 0),
    ROW(pwritev2, B, ALLOW, 0, 0),
    ROW(fsync, B, ALLOW, 0, 0),
    ROW(fdatasync, B, ALLOW, 0, 0),
    ROW(sync_file_range, B, ALLOW, 0, 0),
    ROW(fallocate, B, ALLOW, 0, 0),
    ROW(fadvise64, B, ALLOW, 0, 0),
    ROW(readahead, B, ALLOW, 0, 0),
    ROW(sendfile, B, ALLOW, 0, 0),
    ROW(splice, B, ALLOW, 0, 0),
    ROW(tee, B, ALLOW, 0, 0),
    ROW(vmsplice, B, ALLOW, 0, 0),
    ROW(copy_file_range, B, ALLOW, 0, 0),
    ROW(fstatfs, B, ALLOW, 0, 0),
    ROW(statfs, B, ALLOW, 0, 0),

    /* other programs, other processes, the system */
    ROW(execve, ALL, KILL, 0, 0),
    ROW(execveat, ALL, KILL, 0, 0),
    ROW(fork, ALL, KILL, 0, 0),
    ROW(vfork, ALL, KILL, 0, 0),
    ROW(ptrace, ALL, KILL, 0, 0),
    ROW(process_vm_readv, ALL, KILL, 0, 0),
    ROW(process_vm_writev, ALL, KILL, 0, 0),
    ROW(pidfd_getfd, ALL, KILL, 0, 0),
    ROW(pidfd_send_signal, ALL, KILL, 0, 0),
    ROW(io_uring_setup, ALL, KILL, 0, 0),
    ROW(io_uring_enter, ALL, KILL, 0, 0),
    ROW(io_uring_register, ALL, KILL, 0, 0),
    ROW(bpf, ALL, KILL, 0, 0),
    ROW(userfaultfd, ALL, KILL, 0, 0),
    ROW(perf_event_open, ALL, KILL, 0, 0),
    ROW(keyctl, ALL, KILL, 0, 0),
    ROW(add_key, ALL, KILL, 0, 0),
    ROW(request_key, ALL, KILL, 0, 0),
    ROW(mount, ALL, KILL, 0, 0),
    ROW(umount2, ALL, KILL, 0, 0),
    ROW(move_mount, ALL, KILL, 0, 0),
    ROW(open_tree, ALL, KILL, 0, 0),
    ROW(fsopen, ALL, KILL, 0, 0),
    ROW(pivot_root, ALL, KILL, 0, 0),
    ROW(chroot, ALL, KILL, 0, 0),
    ROW(unshare, ALL, KILL, 0, 0),
    ROW(setns, ALL, KILL, 0, 0),
    ROW(init_module, ALL, KILL, 0, 0),
    ROW(finit_module, ALL, KILL, 0, 0),
    ROW(kexec_load, ALL, KILL, 0, 0),
    ROW(reboot, ALL, KILL, 0, 0),
    ROW(open_by_handle_at, ALL, KILL, 0, 0),
};
