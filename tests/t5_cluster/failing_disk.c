/* Preloaded into a process: reads, writes and syncs of files below $KVFS_FAILING_DIRECTORY fail with
 * EIO for as long as the file $KVFS_FAILING_WHILE exists, as on a disk that died. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/sendfile.h>
#include <sys/uio.h>
#include <unistd.h>

static int fails(int fd) {
    const char *directory = getenv("KVFS_FAILING_DIRECTORY");
    const char *control = getenv("KVFS_FAILING_WHILE");
    char link[64], path[PATH_MAX];
    int kept = errno;
    if (directory == NULL || control == NULL || access(control, F_OK) != 0) {
        errno = kept;
        return 0;
    }
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, path, sizeof path - 1);
    errno = kept;
    if (length < 0)
        return 0;
    path[length] = 0;
    size_t prefix = strlen(directory);
    return strncmp(path, directory, prefix) == 0 && (path[prefix] == '/' || path[prefix] == 0);
}

#define WRAP(result, name, parameters, arguments, fd)                                             \
    result name parameters {                                                                      \
        static result(*real) parameters;                                                          \
        if (real == NULL)                                                                         \
            *(void **)&real = dlsym(RTLD_NEXT, #name);                                            \
        if (fails(fd)) {                                                                          \
            errno = EIO;                                                                          \
            return -1;                                                                            \
        }                                                                                         \
        return real arguments;                                                                    \
    }

typedef const struct iovec *vectors;

WRAP(ssize_t, preadv, (int fd, vectors v, int n, off_t at), (fd, v, n, at), fd)
WRAP(ssize_t, preadv64, (int fd, vectors v, int n, off64_t at), (fd, v, n, at), fd)
WRAP(ssize_t, preadv2, (int fd, vectors v, int n, off_t at, int flags), (fd, v, n, at, flags), fd)
WRAP(ssize_t, preadv64v2, (int fd, vectors v, int n, off64_t at, int f), (fd, v, n, at, f), fd)
WRAP(ssize_t, pwritev, (int fd, vectors v, int n, off_t at), (fd, v, n, at), fd)
WRAP(ssize_t, pwritev64, (int fd, vectors v, int n, off64_t at), (fd, v, n, at), fd)
WRAP(ssize_t, pwritev2, (int fd, vectors v, int n, off_t at, int flags), (fd, v, n, at, flags), fd)
WRAP(ssize_t, pwritev64v2, (int fd, vectors v, int n, off64_t at, int f), (fd, v, n, at, f), fd)
WRAP(ssize_t, pread, (int fd, void *to, size_t n, off_t at), (fd, to, n, at), fd)
WRAP(ssize_t, pread64, (int fd, void *to, size_t n, off64_t at), (fd, to, n, at), fd)
WRAP(ssize_t, pwrite, (int fd, const void *from, size_t n, off_t at), (fd, from, n, at), fd)
WRAP(ssize_t, pwrite64, (int fd, const void *from, size_t n, off64_t at), (fd, from, n, at), fd)
WRAP(ssize_t, sendfile, (int to, int fd, off_t *at, size_t n), (to, fd, at, n), fd)
WRAP(ssize_t, sendfile64, (int to, int fd, off64_t *at, size_t n), (to, fd, at, n), fd)
WRAP(int, fsync, (int fd), (fd), fd)
WRAP(int, fdatasync, (int fd), (fd), fd)
