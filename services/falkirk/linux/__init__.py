"""The privileged kernel surface: namespaces, TUN devices, descriptor passing, socket options. No decisions."""
