"""csrc/cuda/rules.h, compiled by the host: every layout holds its row, fits its device, and each n is in use."""

from __future__ import annotations

import ctypes
import itertools
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest
from build_tools import ROOT

COMPILER = shutil.which("g++") or shutil.which("c++") or shutil.which("clang++")
if COMPILER is None:
    pytest.skip("no C++ compiler here: neither g++, c++ nor clang++ is on PATH", allow_module_level=True)

SOURCE = """
#include "csrc/cuda/rules.h"
#include <vector>
using namespace red;
using namespace red::cuda;
static Device device(int capability, int shared) { return {0, capability, 108, shared, capability >= 90}; }
static void write(const RowLayout& l, int* to) {
  to[0] = l.n, to[1] = l.warps, to[2] = l.groups, to[3] = l.cluster, to[4] = l.stages;
}
extern "C" {
void forward(long d, int type, int capability, int shared, int* to) {
  write(norm_forward_layout(d, static_cast<Type>(type), device(capability, shared)), to);
}
long backward(long d, int type, int capability, int shared, int kind, int arrays, int* to) {
  const auto l = norm_backward_layout(d, static_cast<Type>(type), device(capability, shared),
                                      static_cast<BackwardKind>(kind), arrays);
  write(l, to);
  return l ? norm_backward_shared(l, static_cast<Type>(type), arrays) : 0;
}
void mix_forward(long d, int type, long blocks, int* to) {
  const auto l = mix_forward_layout(d, static_cast<Type>(type), blocks);
  write(l, to);
  to[5] = l.lanes, to[6] = mix_exact(d, static_cast<Type>(type), blocks, kMixForwardColumns);
}
long mix_backward(long d, int type, int capability, int shared, long blocks, int plain, int arrays, int* to) {
  const auto l = mix_backward_layout(d, static_cast<Type>(type), device(capability, shared), blocks, plain, arrays);
  write(l, to);
  to[5] = l.lanes, to[6] = mix_exact(d, static_cast<Type>(type), blocks, kMixBackwardColumns);
  return l ? norm_backward_shared(l, static_cast<Type>(type), arrays) : 0;
}
// The most rows that one block, or cluster, gets of `rows`.
long most_rows(long rows, int groups, int blocks) {
  std::vector<long> of(blocks, 0);
  const long workers = static_cast<long>(blocks) * groups;
  for (int block = 0; block < blocks; ++block)
    for (int group = 0; group < groups; ++group) {
      const long worker = worker_number(group, block, blocks);
      of[block] += worker < rows ? (rows - worker + workers - 1) / workers : 0;
    }
  return *std::max_element(of.begin(), of.end());
}
long slab_programs(long room, long slabs) { return blocks_of_slab(room, slabs); }
int lanes(long d, int type) { return slab_lanes(d, static_cast<Type>(type)); }
int threads(long d, int type) { return wide_threads(d, static_cast<Type>(type)); }
}
"""
FLOAT16 = 2
VECTOR = {0: 4, 1: 8}  # elements of 16 bytes in fp32, and in bf16 and fp16
DEVICES = [(80, 163 << 10), (86, 99 << 10), (90, 227 << 10), (100, 227 << 10)]
# Exact, plain, more, options, full: elements of a thread and warps of a block at most.
KINDS = {0: (32, 16), 1: (32, 16), 2: (32, 16), 3: (32, 8), 4: (16, 8)}
EXACT, MORE, FULL = 0, 2, 4
WIDTHS = [*range(8, 4096, 8), *range(4096, 70_000, 136), 5120, 8192, 11008, 14336, 16384, 32768, 65536]


class Layout(NamedTuple):
    n: int
    warps: int
    groups: int
    cluster: int
    stages: int


@pytest.fixture(scope="module")
def rules(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    folder: Path = tmp_path_factory.mktemp("rules")
    (folder / "rules.cpp").write_text(SOURCE)
    command = [COMPILER, "-std=c++17", "-O2", "-shared", "-fPIC", f"-I{ROOT}", "-o", "rules.so", "rules.cpp"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    dll = ctypes.CDLL(str(folder / "rules.so"))
    dll.backward.restype = dll.mix_backward.restype = dll.most_rows.restype = ctypes.c_long
    dll.slab_programs.restype = ctypes.c_long
    return dll


def _layout(function: object, *arguments: int) -> tuple[Layout | None, int]:
    to = (ctypes.c_int * 5)()
    shared = function(ctypes.c_long(arguments[0]), *arguments[1:], to)  # type: ignore[operator]
    return (Layout(*to) if to[0] else None), shared


def _mix_layout(function: object, *arguments: int) -> tuple[Layout | None, int, bool, int]:
    """The layout, the threads for each block of columns, whether they share it exactly, and the shared memory."""
    to = (ctypes.c_int * 7)()
    shared = function(*map(ctypes.c_long, arguments), to)  # type: ignore[operator]
    return (Layout(*to[:5]) if to[0] else None), to[5], bool(to[6]), shared


def _holds_mix(layout: Layout, lanes: int, exact: bool, d: int, blocks: int, columns: int, size: int) -> None:
    threads = 32 * layout.warps
    assert layout.n * size == columns
    if not blocks:
        assert threads * columns >= d > (threads - 32) * columns
        assert not exact or (d % columns == 0 and d // columns % (32 // size) == 0)
        return
    width = d // blocks
    assert lanes * columns >= width
    assert threads >= lanes * blocks > threads - 32
    assert lanes in (1, 2, 4, 8, 16) or lanes % 32 == 0
    assert exact == (width % columns == 0)


@pytest.mark.parametrize("dtype", VECTOR)
@pytest.mark.parametrize("blocks", [0, 1, 2, 3, 4, 5, 8, 16, 32, 96])
def test_mixes(rules: ctypes.CDLL, dtype: int, blocks: int) -> None:
    """Forward to 16,384 columns and backward to 8,192, where blocks are powers of 2 and begin on 16 bytes."""
    size, power = VECTOR[dtype], blocks & (blocks - 1) == 0
    for d in range(64, 20_000, 64):
        if blocks and d % blocks:
            continue
        begin = not blocks or d // blocks % size == 0
        layout, lanes, exact, _ = _mix_layout(rules.mix_forward, d, dtype, blocks)
        assert layout is not None or not (begin and power and d <= 16_384), d
        if layout is not None:
            assert begin
            assert d <= 16_384
            _holds_mix(layout, lanes, exact, d, blocks, 32, size)
            assert layout.warps * layout.groups <= 16
            assert layout.warps == 1 or layout.groups <= 2  # kMixForwardGroups
        for (capability, shared), plain, arrays in itertools.product(DEVICES, (0, 1), (1, 4)):
            given = (d, dtype, capability, shared, blocks, plain, arrays)
            layout, lanes, exact, taken = _mix_layout(rules.mix_backward, *given)
            most = 8192 if plain or not blocks else 4096
            assert layout is not None or not (begin and power and d <= most and shared > 99 << 10), given
            if layout is not None:
                assert d <= 8192
                _holds_mix(layout, lanes, exact, d, blocks, 16, size)
                assert layout.warps * layout.groups <= (16 if plain or not blocks else 12)
                assert 1 <= layout.stages <= 4
                assert taken + 2064 <= shared


def holds(layout: Layout, d: int, size: int) -> bool:
    """Whether the row fits, and half of the blocks of its cluster would not do."""
    block = layout.n * layout.warps * 32 * size
    return d <= layout.cluster * block and (layout.cluster == 1 or d > layout.cluster // 2 * block // 2)


@pytest.mark.parametrize(("capability", "shared"), DEVICES)
@pytest.mark.parametrize("dtype", VECTOR)
def test_forward(rules: ctypes.CDLL, dtype: int, capability: int, shared: int) -> None:
    seen, size = set(), VECTOR[dtype]
    for d in WIDTHS:
        layout, _ = _layout(rules.forward, d, dtype, capability, shared)
        if layout is None:
            assert d > 8 * 8 * 32 * size * (8 if capability >= 90 else 1)
            continue
        seen.add(layout.n)
        assert holds(layout, d, size), (d, layout)
        assert layout.warps * layout.groups <= 8
        assert layout.cluster == 1 or (capability >= 90 and layout.groups == 1)
        assert layout.warps == 1 or layout.groups <= 2  # the kernel has two barriers: kForwardGroups
    assert seen == {1, 2, 3, 4, 6, 8}


@pytest.mark.parametrize("arrays", [2, 4, 5])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("capability", "shared"), DEVICES)
@pytest.mark.parametrize("dtype", VECTOR)
def test_backward(rules: ctypes.CDLL, dtype: int, capability: int, shared: int, kind: int, arrays: int) -> None:
    seen, size = set(), VECTOR[dtype]
    elements, warps = KINDS[kind]
    for d in WIDTHS:
        layout, taken = _layout(rules.backward, d, dtype, capability, shared, kind, arrays)
        if kind == EXACT and arrays != 4:
            continue  # it always has dy, dz, z and x
        if kind == EXACT:
            plain, _ = _layout(rules.backward, d, dtype, capability, shared, EXACT + 1, arrays)
            if layout is None:  # then that of kPlain leaves lanes idle, or has many columns in a cluster
                idle = plain is not None and plain.n * plain.warps * 32 * size * plain.cluster > d
                many = plain is not None and plain.cluster > 1 and plain.n * size > 16
                assert plain is None or idle or many, (d, plain)
                continue
            assert layout.n * layout.warps * 32 * size * layout.cluster == d
            assert layout.cluster == 1 or layout.n * size <= 16
            assert plain is not None
        if layout is None:
            full = (
                4096 if kind == FULL or dtype == 0 else 8192
            )  # columns of a block, where shared memory holds four arrays
            assert d > full * min(4, shared // (41 << 10)) // max(arrays, 4)
            continue
        seen.add(layout.n)
        assert holds(layout, d, size), (d, layout)
        assert layout.n * size <= elements
        assert layout.warps * layout.groups <= warps
        assert layout.cluster == 1 or (capability >= 90 and layout.groups == 1)
        assert layout.cluster * layout.warps <= 128  # kGroupParts
        assert 2 <= layout.stages <= 4  # wait_all_but knows of three groups that are left
        assert taken + 2064 <= shared
    assert seen <= {n for n in (1, 2, 3, 4, 6, 8) if n * size <= elements}


def test_every_backward_that_is_compiled_is_used(rules: ctypes.CDLL) -> None:
    for dtype, size in VECTOR.items():
        for kind, (elements, _) in KINDS.items():
            cases = (
                (d, c, s, a) for d in WIDTHS for c, s in DEVICES for a in ((4,) if kind == EXACT else (2, 3, 4, 5))
            )
            found = {_layout(rules.backward, d, dtype, c, s, kind, a)[0] for d, c, s, a in cases}
            seen = {layout.n for layout in found if layout is not None}
            assert seen == {n for n in (1, 2, 3, 4, 6, 8)[: 5 if kind == EXACT else 6] if n * size <= elements}, (
                dtype,
                kind,
            )


@pytest.mark.parametrize("elements", [1 << 24, 1 << 26])
@pytest.mark.parametrize("d", [768, 1024, 2048, 4096, 5120, 8192, 16384])
def test_multiprocessors_share_the_rows(rules: ctypes.CDLL, d: int, elements: int) -> None:
    """No block of a backward has more of the rows than the others by more than one; with 132 multiprocessors each has
    98% of the most at least, but where the rows left over have too few others beside them."""
    layout, _ = _layout(rules.backward, d, 1, 90, 227 << 10, EXACT, 4)
    assert layout is not None, "no width that models have leaves lanes idle"
    rows, blocks = elements // d, 132 // layout.cluster
    most = rules.most_rows(ctypes.c_long(rows), layout.groups, blocks)
    assert most == -(-rows // blocks)
    assert rows / blocks / most >= (0.98 if rows >= 50 * blocks else 0.96)


# Of the backward that most calls get, on a multiprocessor of an H200 in bf16: vectors of a thread, warps of a row, rows
# at once, blocks of a row, and KiB on their way while a row is computed; as in csrc/cuda/README.md.
USUAL = {
    768: (3, 1, 16, 1, 96),
    1024: (4, 1, 12, 1, 96),
    2048: (2, 4, 4, 1, 128),
    4096: (2, 8, 2, 1, 128),
    5120: (4, 5, 2, 1, 80),
    8192: (2, 16, 1, 1, 128),
    16384: (2, 16, 1, 2, 128),
}


@pytest.mark.parametrize("d", USUAL)
def test_usual_widths(rules: ctypes.CDLL, d: int) -> None:
    layout, _ = _layout(rules.backward, d, 1, 90, 227 << 10, EXACT, 4)
    assert layout is not None
    row = layout.n * layout.warps * 32 * 16 * 4
    on_the_way = (layout.stages - 1) * layout.groups * row >> 10
    assert (layout.n, layout.warps, layout.groups, layout.cluster, on_the_way) == USUAL[d]


@pytest.mark.parametrize("arrays", [3, 4])
@pytest.mark.parametrize("d", [768, 1024])
def test_post_norm_and_dropout(rules: ctypes.CDLL, d: int, arrays: int) -> None:
    """Where z is made again (dy, x and residual) a multiprocessor has 16 warps, one for each row; with dropout (dy, dz,
    z and x) as many as have two rows in shared memory."""
    layout, _ = _layout(rules.backward, d, 1, 90, 227 << 10, MORE, arrays)
    assert layout is not None
    assert layout.warps == 1
    assert layout.groups == (16 if arrays == 3 or d == 768 else 13)
    assert layout.stages >= 2
    halves, _ = _layout(rules.backward, d, FLOAT16, 90, 227 << 10, MORE, arrays)  # which have room for 12 of 4 vectors
    assert halves is not None
    assert halves[:3] == (layout.n, 1, 16 if d == 768 else 12)


@pytest.mark.parametrize("rows", [1, 17, 132, 1000])
@pytest.mark.parametrize("groups", [1, 2, 3, 16])
def test_every_worker_has_a_number(rules: ctypes.CDLL, rows: int, groups: int) -> None:
    """Its own, so that each row has one worker: all rows are dealt when one block alone is asked."""
    assert rules.most_rows(ctypes.c_long(rows), groups, 1) == rows
    assert rules.most_rows(ctypes.c_long(rows), groups, 132) == -(-rows // 132)


@pytest.mark.parametrize("room", [1, 108, 132, 264])
def test_blocks_of_slabs(rules: ctypes.CDLL, room: int) -> None:
    """They fill a device in the fewest turns that leave a tenth of it idle at most, where four turns can."""
    for slabs in range(1, 300):
        blocks = rules.slab_programs(ctypes.c_long(room), ctypes.c_long(slabs))
        assert 1 <= blocks <= max(1, 4 * room // slabs)
        filled = {turns: turns * room // slabs * slabs / (turns * room) for turns in range(1, 5)}
        turns = next((turns for turns in filled if filled[turns] >= 0.9), 4)
        assert blocks == max(1, turns * room // slabs)
        if slabs <= room // 2:
            assert blocks * slabs >= 0.8 * turns * room
    assert rules.slab_programs(ctypes.c_long(132), ctypes.c_long(3)) == 44  # d = 768: all at once


@pytest.mark.parametrize("dtype", VECTOR)
def test_slabs_and_pieces(rules: ctypes.CDLL, dtype: int) -> None:
    for d in (1, 3, 7, 8, 9, 31, 64, 255, 256, 257, 4096, 65536, 1 << 20):
        lanes, threads = rules.lanes(ctypes.c_long(d), dtype), rules.threads(ctypes.c_long(d), dtype)
        vectors = -(-d // VECTOR[dtype])
        assert lanes in (1, 2, 4, 8, 16, 32)
        assert lanes == 32 or lanes >= vectors > lanes // 2
        assert threads % 32 == 0
        assert threads == 256 or vectors <= threads < vectors + 32
