/* The program of Shoal's demo: answers GET /version with the commit that it was built from.
 *
 * Started, it listens on a free port of 127.0.0.1 and writes the port into $SHOAL_RUN_DIR/port. Started with
 * --health, it asks the one that runs, and exits 0 when that has its own version. */
#include <arpa/inet.h>
#include <netinet/in.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <unistd.h>

static int fail(const char *what) {
    perror(what);
    return 1;
}

static int path_of(char *out, size_t size, const char *name) {
    const char *dir = getenv("SHOAL_RUN_DIR");
    if (dir == NULL) {
        fprintf(stderr, "SHOAL_RUN_DIR is not set\n");
        return -1;
    }
    int written = snprintf(out, size, "%s/%s", dir, name);
    return written > 0 && (size_t)written < size ? 0 : -1;
}

static void limit_waiting(int socket) {
    struct timeval wait = {.tv_sec = 5};
    setsockopt(socket, SOL_SOCKET, SO_RCVTIMEO, &wait, sizeof wait);
    setsockopt(socket, SOL_SOCKET, SO_SNDTIMEO, &wait, sizeof wait);
}

static int check(void) {
    char path[4096], answer[4096];
    unsigned port = 0;
    if (path_of(path, sizeof path, "port") != 0) return 1;
    FILE *file = fopen(path, "r");
    if (file == NULL) return fail(path);
    int read_port = fscanf(file, "%u", &port);
    fclose(file);
    if (read_port != 1) return 1;

    int socket_fd = socket(AF_INET, SOCK_STREAM, 0);
    struct sockaddr_in addr = {.sin_family = AF_INET, .sin_port = htons((unsigned short)port)};
    addr.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    if (socket_fd < 0) return fail("socket");
    limit_waiting(socket_fd);
    if (connect(socket_fd, (struct sockaddr *)&addr, sizeof addr) != 0) return fail("connect");
    const char *request = "GET /version HTTP/1.0\r\n\r\n";
    if (write(socket_fd, request, strlen(request)) < 0) return fail("write");
    size_t have = 0;
    ssize_t got;
    while (have < sizeof answer - 1 &&
           (got = read(socket_fd, answer + have, sizeof answer - 1 - have)) > 0)
        have += (size_t)got;
    answer[have] = 0;
    close(socket_fd);
    return strstr(answer, "\r\n\r\n" VERSION "\n") == NULL;
}

static int serve(void) {
    char path[4096], temporary[4096];
    if (path_of(path, sizeof path, "port") != 0) return 1;
    if (path_of(temporary, sizeof temporary, "port.new") != 0) return 1;
    signal(SIGPIPE, SIG_IGN);

    int listener = socket(AF_INET, SOCK_STREAM, 0);
    struct sockaddr_in addr = {.sin_family = AF_INET};
    socklen_t len = sizeof addr;
    addr.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    if (listener < 0) return fail("socket");
    if (bind(listener, (struct sockaddr *)&addr, sizeof addr) != 0) return fail("bind");
    if (listen(listener, 16) != 0) return fail("listen");
    if (getsockname(listener, (struct sockaddr *)&addr, &len) != 0) return fail("getsockname");

    FILE *file = fopen(temporary, "w");
    if (file == NULL) return fail(temporary);
    fprintf(file, "%u\n", (unsigned)ntohs(addr.sin_port));
    if (fclose(file) != 0 || rename(temporary, path) != 0) return fail(path);

    for (;;) {
        int client = accept(listener, NULL, NULL);
        if (client < 0) continue;
        limit_waiting(client);
        char request[1024];
        ssize_t got = read(client, request, sizeof request - 1);
        request[got > 0 ? got : 0] = 0;
        int known = strncmp(request, "GET /version ", 13) == 0;
        char answer[512];
        int size = snprintf(answer, sizeof answer,
                            "HTTP/1.0 %s\r\nContent-Type: text/plain\r\nConnection: close\r\n\r\n%s\n",
                            known ? "200 OK" : "404 Not Found", known ? VERSION : "not found");
        if (write(client, answer, (size_t)size) < 0) perror("write");
        close(client);
    }
}

int main(int argc, char **argv) {
    if (argc > 1 && strcmp(argv[1], "--health") == 0) return check();
    return serve();
}
