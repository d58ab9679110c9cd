"""What an interface's driver takes off the processor, by the ethtool ioctl. The same names as `ethtool -k` prints."""

from __future__ import annotations

import json
import sys

from tools.netlab import LabError, Namespace

# <linux/ethtool.h>: commands that read one flag into struct ethtool_value.
FLAGS = {
    "rx-checksumming": 0x14,
    "tx-checksumming": 0x16,
    "scatter-gather": 0x18,
    "tcp-segmentation-offload": 0x1E,
    "generic-segmentation-offload": 0x23,
    "generic-receive-offload": 0x2B,
}
# Runs inside the namespace, on the standard library alone. SIOCETHTOOL 0x8946; struct ifreq is 40 bytes on 64-bit machines.
READER = """
import array, fcntl, json, socket, struct, sys
name, flags = sys.argv[1].encode(), json.loads(sys.argv[2])
found = {}
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
    for label, command in flags.items():
        value = array.array("I", [command, 0])
        fcntl.ioctl(sock, 0x8946, struct.pack("16sP16x", name, value.buffer_info()[0]))
        found[label] = bool(value[1])
print(json.dumps(found))
"""


def read(namespace: Namespace, interface: str) -> dict[str, bool]:
    """By name; empty where the driver doesn't say."""
    try:
        found: dict[str, bool] = json.loads(namespace.run(sys.executable, "-c", READER, interface, json.dumps(FLAGS)))
    except LabError:
        return {}
    return found
