"""What a caller with the role of an owner may have: devices whose user is that owner. Everybody else isn't narrowed.

The tenant has been judged by the gate (`falkirk.runtime.gates`); what isn't the owner's is answered as if it weren't there. An owner's certificate has the
user's name of when it was made: after a rename it sees nothing until it is renewed, or what is
the next user's who gets that name.
"""

from __future__ import annotations

from falkirk.api.registry.v1.device_service_pb2 import Device
from falkirk.decide.callers import Caller, Role
from falkirk.registry.kinds import Value
from falkirk.runtime import callers


def narrow() -> bool:
    """Whether the call that is being answered is an owner's."""
    caller = callers.current.get()
    return caller is not None and caller.role is Role.OWNER


def may(value: Value) -> bool:
    """Whether the caller may have to do with a resource of its tenant. In a transaction: see `may_caller`."""
    return may_caller(value, callers.current.get())


def may_caller(value: Value, caller: Caller | None) -> bool:
    """The same for a caller that was taken along, since another thread doesn't know it."""
    if caller is None or caller.role is not Role.OWNER:
        return True
    return isinstance(value, Device) and value.user == caller.name
