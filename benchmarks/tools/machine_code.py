"""What a compiled Triton kernel is made of: its registers, what it spills, and how wide its accesses to memory are.

Accesses are looked up in the LLVM IR, where every address can be followed back to the argument it comes from; that the
assembler's text has no others, and none that were split, is checked. Each of these readers raises ValueError for a text
that it does not understand: what is not seen must not pass for good.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import triton


@dataclass(frozen=True)
class Resources:
    """What a program of a kernel takes.

    ``spills`` are the bytes of memory that each thread has for registers put aside, on AMD also counting the registers.
    ``scalar_spills`` are AMD's scalar registers put aside into lanes of vector registers: that is no memory.
    """

    registers: int
    spills: int
    scalar_spills: int
    shared: int


@dataclass(frozen=True)
class Access:
    """One instruction that reads or writes global memory, by one thread."""

    arguments: tuple[str, ...]  # the pointers it may go through, one but where a kernel chooses
    store: bool
    bytes: int
    in_loop: bool


@dataclass(frozen=True)
class Conversions:
    """How many times a tensor of several elements changes its layout, mostly through shared memory with a barrier.

    ``in_loops`` are those at every turn of a loop, ``in_branches`` those within an `if` there.
    """

    in_loops: int
    in_branches: int
    elsewhere: int


def resources(compiled: Any) -> Resources:
    """Read from the binary by the `cuobjdump` in Triton's package, for AMD from the metadata in the assembly."""
    shared = compiled.metadata.shared
    if "cubin" in compiled.asm:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "kernel.cubin"
            path.write_bytes(compiled.asm["cubin"])
            command: list[str | Path] = [_CUOBJDUMP, "--dump-resource-usage", path]
            text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        return Resources(
            _number(r"REG:(\d+)", text), _number(r"STACK:(\d+)", text) + _number(r"LOCAL:(\d+)", text), 0, shared
        )
    found = {name: _number(rf"\.{name}: +(\d+)", compiled.asm["amdgcn"]) for name in _AMD_METADATA}
    scratch = found["vgpr_spill_count"] + found["private_segment_fixed_size"]
    return Resources(found["vgpr_count"], scratch, found["sgpr_spill_count"], shared)


def accesses(compiled: Any, arguments: list[str]) -> list[Access]:
    """Every access to global memory; ``arguments`` are the names of the tensors, which the kernel takes first."""
    found = _Function(compiled.asm["llir"]).accesses(arguments)
    expected = Counter((a.store, a.bytes) for a in found)
    if "ptx" in compiled.asm:
        written = Counter(_ptx(match) for match in _PTX.finditer(compiled.asm["ptx"]))
        wrong = written != expected
    else:
        text = compiled.asm["amdgcn"]
        written = Counter((kind == "store", _AMD_BYTES[size]) for kind, size in _AMD_ACCESS.findall(text))
        wrong = any(size < 16 for _, size in written - expected)  # the assembler joins some, and must split none
    if wrong:
        raise ValueError(
            f"the assembly has other accesses than the LLVM IR: {dict(written)}, expected {dict(expected)}"
        )
    return found


def conversions(compiled: Any) -> Conversions:
    """Read from Triton's own IR."""
    found: Counter[str] = Counter()
    depth = 0
    around: list[tuple[str, int]] = []  # loops and branches, with the depth that ends them
    for line in compiled.asm["ttgir"].splitlines():
        if "ttg.convert_layout" in line:
            shape = re.search(r"tensor<((?:\d+x)+)", line)
            if shape is None:
                raise ValueError(f"a layout conversion that is not understood: {line}")
            if prod(int(n) for n in shape[1].split("x")[:-1]) > 1:
                kinds = [kind for kind, _ in around]
                inside = kinds[kinds.index("loop") :] if "loop" in kinds else None
                found["elsewhere" if inside is None else "in_branches" if "if" in inside else "in_loops"] += 1
        opens = re.search(r"\bscf\.(for|while|if)\b", line)
        if opens:
            around.append(("if" if opens[1] == "if" else "loop", depth))
        depth += line.count("{") - line.count("}")
        while around and depth <= around[-1][1]:
            around.pop()
    return Conversions(found["in_loops"], found["in_branches"], found["elsewhere"])


class _Function:
    """The kernel in a module of LLVM IR: one function, everything inlined."""

    def __init__(self, text: str) -> None:
        kernels = re.findall(r"^define \w+_kernel void @\w+\((.*?)\)[^()]*\{\n(.*?)^\}", text, re.M | re.S)
        if len(kernels) != 1:
            raise ValueError(f"the LLVM IR has {len(kernels)} kernels, expected 1")
        parameters, body = kernels[0]
        self.parameters = re.findall(rf"{_NAME}(?:,|$)", parameters)
        block = ""
        self.blocks: dict[str, list[str]] = {block: []}
        for line in body.splitlines():
            label = re.match(r"([\w.$-]+):", line)
            if label:
                block = label[1]
                self.blocks[block] = []
            elif line.strip():
                self.blocks[block].append(line.strip())

    def accesses(self, arguments: list[str]) -> list[Access]:
        if len(self.parameters) < len(arguments):
            raise ValueError(f"the kernel has parameters {self.parameters}, expected {arguments}")
        origins = self._origins(arguments)
        looping = self._looping()
        found = []
        for name, block in self.blocks.items():
            for line in block:
                access = _access(line)
                if access is None:
                    continue
                pointer, store, size = access
                through = tuple(sorted(origins.get(pointer, frozenset())))
                if not through:
                    raise ValueError(f"an access to global memory through none of the arguments: {line}")
                found.append(Access(through, store, size, name in looping))
        return found

    def _origins(self, arguments: list[str]) -> dict[str, frozenset[str]]:
        """The arguments that each value was made of, but not by way of memory."""
        origins = {value: frozenset([name]) for value, name in zip(self.parameters, arguments, strict=False)}
        steps = []
        for line in (line for block in self.blocks.values() for line in block):
            result = re.match(rf"{_NAME} = ", line)
            if result and "= load " not in line and _access(line) is None:
                steps.append((result[1], re.findall(rf"(?<!label ){_NAME}", line[result.end() :])))
        changed = True
        while changed:  # what comes around a loop is known only after it
            changed = False
            for result_name, operands in steps:
                of = frozenset().union(*(origins.get(operand, frozenset()) for operand in operands))
                if of != origins.get(result_name, frozenset()):
                    origins[result_name] = of
                    changed = True
        return origins

    def _looping(self) -> set[str]:
        """The blocks that can be reached from themselves."""
        after = {name: re.findall(rf"label {_NAME}", "\n".join(block)) for name, block in self.blocks.items()}
        found = set()
        for name in self.blocks:
            seen: set[str] = set()
            left = list(after[name])
            while left:
                block = left.pop()
                if block not in seen:
                    seen.add(block)
                    left += after[block]
            if name in seen:
                found.add(name)
        return found


def _access(line: str) -> tuple[str, bool, int] | None:
    """The pointer, whether it is a store, and the bytes of an access to global memory in LLVM IR; None for others."""
    if not re.search(r"ptr addrspace\([18]\)", line) or _ADDRESS.search(line):
        return None
    if " asm " in line and (match := _PTX.search(line)) is not None:
        store, size = _ptx(match)
    elif ".buffer.load" in line:
        store, size = False, _llvm_bytes(_matched(rf"call {_TYPE} @", line))
    elif ".buffer.store" in line:
        store, size = True, _llvm_bytes(_matched(rf"\({_TYPE} ", line))
    elif "= load " in line:
        store, size = False, _llvm_bytes(_matched(rf"load (?:volatile )?{_TYPE},", line))
    elif line.startswith("store "):
        store, size = True, _llvm_bytes(_matched(rf"store (?:volatile )?{_TYPE} ", line))
    else:
        raise ValueError(f"an instruction on global memory that is not understood: {line}")
    return _matched(rf"ptr addrspace\([18]\) {_NAME}", line), store, size


def _ptx(match: re.Match[str]) -> tuple[bool, int]:
    """Whether an instruction of PTX is a store, and its bytes, as in `ld.global.v4.b32` or `cp.async ..., 0x10`."""
    if match["copied"]:
        return False, int(match["copied"], 16)
    width = re.search(r"(?:\.v(\d))?\.[bfus](\d+)$", match["qualifiers"])
    if width is None:
        raise ValueError(f"an access in PTX that is not understood: {match[0]}")
    return match["kind"] == "st", int(width[1] or 1) * int(width[2]) // 8


def _llvm_bytes(kind: str) -> int:
    match = re.fullmatch(r"(?:<(\d+) x )?(i(?=\d)|half|bfloat|float|double)(\d*)>?", kind)
    if match is None:
        raise ValueError(f"an access in LLVM IR of a type that is not understood: {kind}")
    return int(match[1] or 1) * int(match[3] or _LLVM_BITS[match[2]]) // 8


def _matched(pattern: str, text: str) -> str:
    match = re.search(pattern, text)
    if match is None:
        raise ValueError(f"expected {pattern!r} in {text[-200:]!r}")
    return match[1]


def _number(pattern: str, text: str) -> int:
    return int(_matched(pattern, text))


_CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
_NAME = r"%([\w.$-]+)"  # of a value in LLVM IR
_TYPE = r"(<[^>]*>|\w+)"
_ADDRESS = re.compile(
    r"= (?:getelementptr|phi|select|inttoptr|ptrtoint|icmp|freeze)\b|\.make\.buffer\.rsrc"
)  # no access
_LLVM_BITS = {"half": 16, "bfloat": 16, "float": 32, "double": 64}
_PTX = re.compile(  # also within LLVM IR, where \09 is a tab
    r"(?:\b|\\09)(?:(?P<kind>ld|st)\.global(?P<qualifiers>[.:\w]*)"
    r"|cp\.async\.c[ag]\.shared\.global[.:\w]* \[[^]]*\], \[[^]]*\], 0x(?P<copied>\w+))"
)
_AMD_ACCESS = re.compile(r"\b(?:global|buffer|flat)_(load|store)_(dwordx[234]|[a-z]+)")
_AMD_BYTES = {"dwordx4": 16, "dwordx3": 12, "dwordx2": 8, "dword": 4, "ushort": 2, "sshort": 2, "short": 2, "ubyte": 1}
_AMD_METADATA = ("vgpr_count", "vgpr_spill_count", "sgpr_spill_count", "private_segment_fixed_size")
