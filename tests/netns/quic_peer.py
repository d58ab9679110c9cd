"""A QUIC server, or a client that gets something from it: `python quic_peer.py serve|get ADDRESS PORT SIZE DATAGRAM [DIRECTORY]`.

The server answers each stream with SIZE bytes; the client prints how many it got and their CRC. DATAGRAM is the UDP payload of a full packet.
"""

from __future__ import annotations

import asyncio
import ssl
import sys
import zlib
from datetime import UTC, datetime, timedelta
from pathlib import Path

from aioquic.asyncio.client import connect
from aioquic.asyncio.server import serve
from aioquic.quic.configuration import QuicConfiguration
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID


def configuration(datagram: int, *, client: bool) -> QuicConfiguration:
    """QUIC as both speak it."""
    made = QuicConfiguration(is_client=client, alpn_protocols=["falkirk-test"], max_datagram_size=datagram)
    made.verify_mode = ssl.CERT_NONE
    return made


def certificate(directory: Path) -> tuple[Path, Path]:
    """A certificate that nobody checks, and its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "server")])
    now = datetime.now(UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .sign(key, hashes.SHA256())
    )
    paths = directory / "certificate.pem", directory / "key.pem"
    paths[0].write_bytes(made.public_bytes(serialization.Encoding.PEM))
    paths[1].write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return paths


async def server(address: str, port: int, size: int, datagram: int, directory: Path) -> None:
    """Until it is killed."""
    settings = configuration(datagram, client=False)
    settings.load_cert_chain(*certificate(directory))

    def answer(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(bytes(range(256)) * (size // 256))
        writer.write_eof()

    await serve(address, port, configuration=settings, stream_handler=answer)
    print("ready", flush=True)
    await asyncio.Event().wait()


async def client(address: str, port: int, datagram: int) -> None:
    """One stream."""
    async with connect(address, port, configuration=configuration(datagram, client=True)) as connection:
        reader, writer = await connection.create_stream()
        writer.write(b"get")
        writer.write_eof()
        data = await reader.read()
        print(len(data), zlib.crc32(data), flush=True)


if __name__ == "__main__":
    what, where, number, length, full, *more = sys.argv[1:]
    if what == "serve":
        asyncio.run(server(where, int(number), int(length), int(full), Path(more[0])))
    else:
        asyncio.run(client(where, int(number), int(full)))
