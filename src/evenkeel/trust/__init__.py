"""Says who may use a server and whom a client believes: keys, certificates, and TLS in front of any protocol."""
