"""`falkirk lower`: any command's TCP streams become IP packets on a connected tunnel.

The tool connects to the on-ramp's socket, says whom it speaks for (`admission`), moves itself into a new user and
network namespace whose only way out is a TUN device with the admitted addresses (`namespace`), starts the command
there, and either hands the device over to the flow worker (`carried`) or moves packets between it and the tunnel's socket itself (`pump`), until
the command has ended (`run`). The command's connections are ordinary kernel TCP: what leaves by the tunnel is what any client would send.

It runs in a process of its own (`python -m falkirk.linux.lower`), exec'ed by the CLI: only a process of one thread may
make a user namespace, and the pump needs none of the CLI's memory.

Limits: IP only within the namespace (no unix sockets of the abstract kind, no /sys of it); resolv.conf stays as it is,
so names are resolved over the tunnel, if at all; what a background process has open when the command ends is cut.
"""
