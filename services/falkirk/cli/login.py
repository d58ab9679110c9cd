"""`falkirk login`, `falkirk logout` and `falkirk authority`: who may administer a mesh from afar.

`login` reads a token from the terminal, or from a file (`-` is standard input), never from its arguments, where others could see it. The token has the
fingerprint of the mesh's root in it: its secret is sent to nobody else.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Final, Literal

import grpc
import typer

from falkirk.api.net.v1 import access_pb2
from falkirk.api.registry.v1 import authority_service_pb2 as pb
from falkirk.api.registry.v1 import authority_service_pb2_grpc as pb_grpc
from falkirk.cli import logins
from falkirk.cli.connection import ADDRESS, Json, RunDir, calling, fail, told
from falkirk.cli.output import print_json, print_table, timestamp
from falkirk.runtime import remote

SECONDS: Final = 15.0
_PREFIX: Final = "fk-login-"

authority = typer.Typer(help="The mesh's certificates, and who may have one.", no_args_is_help=True)

Tenant = Annotated[str, typer.Option(help="The tenant; without it the whole mesh.")]
Name = Annotated[str, typer.Argument(help="Its name: letters, digits and ._@+-; of an owner the user's.")]


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command("login")(login)
    app.command("logout")(logout)
    app.add_typer(authority, name="authority")


def login(
    address: Annotated[str, typer.Option(envvar=ADDRESS, help="host:port of the mesh's registry.")],
    token_file: Annotated[
        Path | None, typer.Option(help="Holds the login token; - is standard input. Without it you are asked.")
    ] = None,
    oidc_token_file: Annotated[
        Path | None,
        typer.Option(help="Holds an ID token of an issuer that the mesh trusts instead; - is standard input."),
    ] = None,
    fingerprint: Annotated[
        str, typer.Option(help="With an ID token: SHA-256 of the mesh's root, as `falkirk authority show` has it.")
    ] = "",
    tenant: Annotated[str, typer.Option(help="With an ID token: your tenant, where the issuer serves several.")] = "",
) -> None:
    """Log in to a mesh over TCP with a login token, or with an ID token of an OIDC issuer."""
    if oidc_token_file is not None:
        if not fingerprint:
            fail("an ID token doesn't say which mesh is meant", "INVALID_FINGERPRINT", "give --fingerprint too")
        with told():
            roots = remote.roots(address, fingerprint)
            _greet(address, logins.log_in(address, roots, oidc_token=_token(oidc_token_file), tenant=tenant))
        return
    token = _token(token_file)
    secret, _, mark = token.removeprefix(_PREFIX).partition("-")
    if not token.startswith(_PREFIX) or not secret or not mark:
        fail(
            "that is no login token",
            "INVALID_TOKEN",
            "one begins with fk-login- and is made by `falkirk authority token NAME`",
        )
    with told():
        _greet(address, logins.log_in(address, remote.roots(address, mark), secret=secret))


def _greet(address: str, principal: pb.Principal) -> None:
    role = access_pb2.Role.Name(principal.role).removeprefix("ROLE_").lower()
    where = f" of tenant {principal.tenant}" if principal.tenant else ""
    print(f"logged in to {address} as {principal.name}, {role}{where}")
    print(f"  export {ADDRESS}={address}")


def logout(
    address: Annotated[str, typer.Option(envvar=ADDRESS, help="host:port of the mesh's registry.")],
) -> None:
    """Forget a login on this machine. `falkirk authority revoke` takes the access itself away."""
    with told():
        if not logins.log_out(address):
            fail(f"there is no login for {address}", "NOT_LOGGED_IN", "there is nothing to forget")


@authority.command()
def show(run_dir: RunDir, json: Json = False) -> None:
    """Show which roots are trusted."""
    with calling(run_dir, "registry") as channel:
        answer = _stub(channel).Show(pb.AuthorityServiceShowRequest(), timeout=SECONDS)
    _roots(answer, answer.trust, json)


@authority.command()
def rotate(run_dir: RunDir, json: Json = False) -> None:
    """Make the next root now. What the older ones have signed stays good until it ends."""
    with calling(run_dir, "registry") as channel:
        answer = _stub(channel).Rotate(pb.AuthorityServiceRotateRequest(), timeout=SECONDS)
    _roots(answer, answer.trust, json)


@authority.command()
def token(
    name: Name,
    run_dir: RunDir,
    role: Annotated[
        Literal["administrator", "auditor", "owner", "connector"], typer.Option(help="What it may do.")
    ] = "administrator",
    tenant: Tenant = "",
    valid: Annotated[int, typer.Option(min=60, max=604_800, help="Seconds that the token is good.")] = 86_400,
    json: Json = False,
) -> None:
    """Make a token with which somebody can log in once. It is shown here and kept nowhere."""
    with calling(run_dir, "registry") as channel:
        request = pb.AuthorityServiceCreateLoginRequest(
            tenant=tenant, name=name, role=f"ROLE_{role.upper()}", valid_seconds=valid
        )
        answer = _stub(channel).CreateLogin(request, timeout=SECONDS)
    if json:
        print_json(answer)
    else:
        print(answer.token)


@authority.command("list")
def list_(run_dir: RunDir, tenant: Tenant = "", json: Json = False) -> None:
    """List who may log in, and whose access was revoked."""
    with calling(run_dir, "registry") as channel:
        request = pb.AuthorityServiceListPrincipalsRequest(tenant=tenant)
        answer = _stub(channel).ListPrincipals(request, timeout=SECONDS)
    if json:
        print_json(answer)
        return
    print_table(
        ["name", "role", "tenant", "made", "last login", "revoked"],
        [
            (
                one.name,
                access_pb2.Role.Name(one.role).removeprefix("ROLE_").lower(),
                one.tenant,
                timestamp(one.create_time),
                timestamp(one.login_time),
                timestamp(one.revoke_time),
            )
            for one in answer.principals
        ],
    )


@authority.command()
def revoke(name: Name, run_dir: RunDir, tenant: Tenant = "") -> None:
    """Take somebody's access away, at once."""
    with calling(run_dir, "registry") as channel:
        request = pb.AuthorityServiceRevokeRequest(tenant=tenant, name=name)
        _stub(channel).Revoke(request, timeout=SECONDS)
    print(f"{name} revoked")


def _token(file: Path | None) -> str:
    if file is None:
        return str(typer.prompt("login token", hide_input=True)).strip()
    try:
        return (sys.stdin.read() if str(file) == "-" else file.read_text()).strip()
    except (OSError, UnicodeDecodeError) as error:
        return fail(f"{file}: {error}", "UNREADABLE", "name a file that holds a login token")


def _stub(channel: grpc.Channel) -> pb_grpc.AuthorityServiceStub:
    return pb_grpc.AuthorityServiceStub(channel)


def _roots(
    answer: pb.AuthorityServiceShowResponse | pb.AuthorityServiceRotateResponse, trust: pb.Trust, json: bool
) -> None:
    if json:
        print_json(answer)
        return
    print_table(
        ["root", "made", "trusted until", "sha-256"],
        [
            (root.number, timestamp(root.create_time), timestamp(root.retire_time) or "signs", root.fingerprint)
            for root in trust.roots
        ],
    )
