"""The NBD server: handshake, transmission, and the connections that go through both."""
