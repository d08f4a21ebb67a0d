/* port OPERATION...: port accesses from a guest's user space, in the order given.
 *
 * wPORT=VALUE writes a byte, rPORT reads one and prints it; all numbers are hexadecimal. For example
 * `port w70=7e r71` prints byte 7Eh of the CMOS memory, `port wcf9=06` resets a PIIX3 machine.
 */
#include <stdio.h>
#include <sys/io.h>

int main(int argc, char **argv)
{
    if (iopl(3) != 0) {
        perror("port: iopl");
        return 1;
    }
    for (int i = 1; i < argc; i++) {
        unsigned port, value;
        if (sscanf(argv[i], "w%x=%x", &port, &value) == 2) {
            outb((unsigned char)value, (unsigned short)port);
        } else if (sscanf(argv[i], "r%x", &port) == 1) {
            printf("%02x\n", inb((unsigned short)port));
        } else {
            fprintf(stderr, "port: %s is neither wPORT=VALUE nor rPORT\n", argv[i]);
            return 2;
        }
    }
    return 0;
}
