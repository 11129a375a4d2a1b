# Tells gdb of the frames that Flea puts between a function and its caller, where programs run
# when the function returns. Without this, a backtrace ends at the first such function.
#
#   flea gdb-script > flea.py
#   gdb -x flea.py -p PID         or, in a running gdb or in ~/.gdbinit: source flea.py
#
# Works on processes and on core files, also after the flea that attached has gone.

import struct

import gdb
from gdb.FrameDecorator import FrameDecorator
from gdb.unwinder import Unwinder, register_unwinder

# Stands in front of what Flea's code calls from its frame, and nowhere else.
MARKER = b"\x0f\x1f\x84\x00flea"
# A call with a 32-bit distance.
CALL = 0xE8
CALL_BYTES = 5
# Registers that keep the caller's value while the function runs.
KEPT = ("rbx", "r12", "r13", "r14", "r15")


def read(address, n_bytes):
    try:
        return gdb.selected_inferior().read_memory(address, n_bytes).tobytes()
    except gdb.MemoryError:
        return b""


def called_original(pc):
    """The address that the call before `pc` leads to, if Flea made that call; else None."""
    call = read(pc - CALL_BYTES, CALL_BYTES)
    if len(call) != CALL_BYTES or call[0] != CALL:
        return None
    target = (pc + struct.unpack("<i", call[1:])[0]) & (1 << 64) - 1
    if target < len(MARKER) or read(target - len(MARKER), len(MARKER)) != MARKER:
        return None
    return target


class FrameId:
    def __init__(self, sp, pc):
        self.sp = sp
        self.pc = pc


class FleaUnwinder(Unwinder):
    """The caller of a frame of Flea's: CFA = rbp + 16, in all of them."""

    def __init__(self):
        super().__init__("flea")

    def __call__(self, pending):
        if pending.architecture().name() != "i386:x86-64":
            return None
        pc = int(pending.read_register("rip")) & (1 << 64) - 1
        target = called_original(pc)
        if target is None:
            return None
        rbp = int(pending.read_register("rbp")) & (1 << 64) - 1
        saved = read(rbp, 16)
        if len(saved) != 16:
            return None
        caller_rbp, caller_pc = struct.unpack("<QQ", saved)
        info = pending.create_unwind_info(FrameId(gdb.Value(rbp + 16), gdb.Value(target)))
        for name, value in (("rip", caller_pc), ("rsp", rbp + 16), ("rbp", caller_rbp)):
            kind = pending.read_register(name).type
            info.add_saved_register(name, gdb.Value(value).cast(kind))
        for name in KEPT:
            info.add_saved_register(name, pending.read_register(name))
        return info


class FleaFrame(FrameDecorator):
    def function(self):
        return "[flea]"


class FleaFilter:
    """Gives Flea's frames a name in backtraces."""

    def __init__(self):
        self.name = "flea"
        self.enabled = True
        self.priority = 100
        gdb.frame_filters[self.name] = self

    def filter(self, frames):
        for frame in frames:
            ours = called_original(frame.inferior_frame().pc()) is not None
            yield FleaFrame(frame) if ours else frame


register_unwinder(None, FleaUnwinder(), replace=True)
FleaFilter()
