"""The compiled CUDA library, where one was built: its kernels on every GPU, spills, widths of accesses, what it shows.

No GPU is needed. `make test` builds it wherever nvcc is found.
"""

from __future__ import annotations

import re
import subprocess
import sys
import textwrap
from collections import Counter
from pathlib import Path

import pytest
from build_tools import CUDA_LIBRARY, ROOT, build, dynamic_symbols, why_missing
from patience import HANGS

from benchmarks.tools import cuda_code
from benchmarks.tools.cuda_code import Access, Code, Resources

LIBRARY = ROOT / CUDA_LIBRARY
REPORTS = ROOT / "build/csrc/cuda"
GPUS = {80, 90, 100}

# What a kernel may spill, in bytes: (a pattern of its mangled name, the architecture): (stack, spill stores, spill
# loads), with the reason.
SPILLS: dict[tuple[str, int], tuple[int, int, int]] = {}

# The least number of 128-bit accesses of a kernel, for each of what FOR_EACH says. 'read' are loads and copies to
# shared memory.
HOT: dict[str, dict[str, int]] = {
    "edit_forward": {"read": 8, "store": 4},  # x and residual, z, of four rows
    "slab_backward": {"read": 2, "store": 1},  # dy and h, dx
    "norm_forward": {"read": 2, "store": 2},  # x and residual, z and y
    "norm_backward": {"read": 3, "store": 2},  # dy, z and h, dx and dresidual
    "norm_forward_exact": {"read": 5, "store": 2},  # and scale, bias and the weight
    "norm_backward_exact": {"read": 4, "store": 2},  # dy, dz, z and x
    "wide_forward": {"read": 3, "store": 2},
    "row_averages": {"read": 3},
    "mix_row_forward": {"read": 8, "store": 8},  # x and residual, z and y; four vectors of each, of fp32 eight
    "mix_row_backward": {"read": 8, "store": 4},  # dy, dz, z and h, dx and dresidual, two vectors of each
}
FOR_EACH = {
    "slab_backward": 1,
    "norm_forward": 0,
    "norm_backward": 0,
    "norm_forward_exact": 0,
    "norm_backward_exact": 0,
}  # that number of its template: rows, vectors
ALIGNED = (
    "norm_forward",
    "norm_backward",
    "norm_forward_exact",
    "norm_backward_exact",
    "mix_row_forward",
    "mix_row_backward",
)  # these have no code for rows that are not aligned
LOOPS = (  # over rows or columns
    "slab_backward",
    "norm_backward",
    "norm_backward_exact",
    "wide_forward",
    "row_averages",
    "mix_row_backward",
)


pytestmark = pytest.mark.xdist_group("the code of the CUDA library")  # one worker reads it, for more than a minute
built_only = pytest.mark.skipif(
    why_missing(CUDA_LIBRARY) is not None, reason=f"no CUDA library: {why_missing(CUDA_LIBRARY)}"
)


@pytest.fixture(scope="module")
def reports() -> list[Resources]:
    found = sorted(REPORTS.glob("*.ptxas.txt"))
    assert found, f"{REPORTS} has none of ptxas's reports; remedy: python csrc/build.py cuda"
    present = {path.stem for path in (ROOT / "csrc/cuda").glob("*.cu")}  # of files that are no more, none
    return [
        kernel
        for path in found
        if path.name.removesuffix(".ptxas.txt") in present
        for kernel in cuda_code.resources(path.read_text())
    ]


@pytest.fixture(scope="module")
def codes() -> list[Code]:
    if cuda_code.find_cuobjdump() is None:
        pytest.skip("cuobjdump was not found: neither Triton nor the CUDA toolkit has it here")
    return list(cuda_code.library_code(LIBRARY))


def spilling(kernels: list[Resources], known: dict[tuple[str, int], tuple[int, int, int]]) -> list[str]:
    """Kernels that spill and are not in ``known``, and what is there but no more true."""
    left, wrong = dict(known), []
    for kernel in kernels:
        takes = (kernel.stack, kernel.spill_stores, kernel.spill_loads)
        entry = next((key for key in known if kernel.arch == key[1] and re.search(key[0], kernel.name)), None)
        if takes != (known[entry] if entry is not None else (0, 0, 0)):
            wrong.append(f"{kernel.name} for sm_{kernel.arch}: stack, spill stores and loads {takes}")
        elif entry is not None:
            left.pop(entry, None)
    return wrong + [f"no kernel is as listed: {key}" for key in left]


@built_only
def test_no_kernel_spills(reports: list[Resources]) -> None:
    assert spilling(reports, SPILLS) == []


@built_only
def test_every_kernel_is_there_for_every_gpu(reports: list[Resources], codes: list[Code]) -> None:
    """By what the assembler said, and by what is in the library: the same."""
    said = {(kernel.name, kernel.arch) for kernel in reports}
    assert said == {(code.name, code.arch) for code in codes}
    archs = {arch for _, arch in said}
    assert said == {(name, arch) for name, _ in said for arch in archs}
    if archs < GPUS:
        pytest.skip(f"built for {sorted(archs)} only (RED_KERNELS_ARCHS, or the GPUs here), not for {sorted(GPUS)}")
    assert archs >= GPUS


@built_only
def test_hot_kernels_load_and_store_16_bytes(codes: list[Code]) -> None:
    seen: set[tuple[str, int]] = set()
    for code in codes:
        name = cuda_code.kernel_name(code.name)
        if name in HOT:
            seen.add((name, code.arch))
            assert narrow(code) == [], f"{code.name} for sm_{code.arch}: {dict(code.accesses())}"
    assert seen == {(name, arch) for name in HOT for arch in {code.arch for code in codes}}


def narrow(code: Code) -> list[str]:
    """What a hot kernel lacks of 128-bit accesses, and which it has that are too narrow."""
    name = cuda_code.kernel_name(code.name)
    found = code.accesses()
    times = cuda_code.template_numbers(code.name)[FOR_EACH[name]] if name in FOR_EACH else 1
    wrong = []
    for kind, least in HOT[name].items():
        kinds = ("load", "copy") if kind == "read" else (kind,)
        wide = Counter({a: n for a, n in found.items() if a.kind in kinds and a.bits >= 128})
        if wide.total() < least * times:
            wrong.append(f"{kind}: {wide.total()} of 128 bits, expected {least * times} or more")
        if name in LOOPS and not any(a.in_loop for a in wide):
            wrong.append(f"{kind}: none of 128 bits in a loop")
    if name in ALIGNED:  # an element by itself would have 16 bits in two of three dtypes
        wrong += [f"{n} {a.kind}s of {a.bits} bits" for a, n in found.items() if a.bits < 32]
    return wrong


# Of the kernels that most calls get, in bf16: how many instructions a row takes for each element of a thread at most,
# forward in all of the kernel and backward in its loop; registers; how many blocks of the most threads of a layout a
# multiprocessor has registers for. At d = 4096 it was 29 forward and 44 backward before there were these kernels.
FIGURES = {  # (kernel, vectors, with a mean): (instructions, registers, threads, blocks)
    ("norm_forward_exact", 1, 0): (29, 64, 256, 4),
    ("norm_forward_exact", 2, 0): (22, 64, 256, 4),
    ("norm_forward_exact", 3, 0): (19, 64, 256, 4),
    ("norm_forward_exact", 4, 0): (18, 72, 256, 3),
    ("norm_forward_exact", 6, 0): (16, 96, 256, 2),
    ("norm_forward_exact", 8, 0): (15, 104, 256, 2),  # d = 4096
    ("norm_forward_exact", 8, 1): (26, 128, 256, 2),  # with the turn that few rows take
    ("norm_backward_exact", 1, 0): (34, 128, 512, 1),
    ("norm_backward_exact", 2, 0): (26, 128, 512, 1),  # d = 4096
    ("norm_backward_exact", 3, 0): (28, 128, 512, 1),
    ("norm_backward_exact", 4, 0): (27, 168, 384, 1),
    ("norm_backward_exact", 2, 1): (33, 128, 512, 1),
    ("norm_backward_exact", 4, 1): (33, 168, 384, 1),
}


@built_only
def test_what_a_row_costs(reports: list[Resources], codes: list[Code]) -> None:
    """On sm_90, for the layouts in csrc/cuda/README.md."""
    registers = {kernel.name: kernel.registers for kernel in reports if kernel.arch == 90}
    found = {}
    for code in codes:
        name, numbers = cuda_code.kernel_name(code.name), cuda_code.template_numbers(code.name)
        key = (name, *numbers[:2])
        if code.arch != 90 or "BFloat16" not in code.name or key not in FIGURES:
            continue
        if name == "norm_backward_exact" and numbers[2]:
            continue  # for clusters
        count = code.row_loop() if name == "norm_backward_exact" else code.length()
        found[key] = (count / (8 * numbers[0]), registers[code.name])
    if not found:
        pytest.skip("built without code for sm_90 (RED_KERNELS_ARCHS)")
    assert found.keys() == FIGURES.keys()
    for key, (instructions, most, threads, blocks) in FIGURES.items():
        count, used = found[key]
        assert count <= instructions, (key, count)
        assert used <= most, (key, used)
        warps = -(-threads * blocks // 128)  # of each of four parts of a multiprocessor, each with its own registers
        assert -(-used // 8) * 8 * 32 * warps <= 16384, (key, used)


# Of the backward of post-norm models and of models with dropout (kMore), in bf16 on sm_90: vectors and whether there
# is a mean, and instructions for each element of a thread at most, dropout and z made again counted in.
MORE = {(3, 0): 89, (3, 1): 101, (4, 0): 89, (4, 1): 97}


@built_only
def test_post_norm_and_dropout_have_16_warps(reports: list[Resources], codes: list[Code]) -> None:
    """On every GPU 128 registers for each thread of 512; or 168 of 384 with 4 vectors and more, but of bf16."""
    kind = re.compile("norm_backwardI.*BackwardKindE2E")
    kernels = [kernel for kernel in reports if kind.search(kernel.name)]
    archs = {kernel.arch for kernel in kernels}
    assert archs
    assert len(kernels) == len(archs) * 2 * (
        4 + 4 + 6
    )  # with a mean or without; of 32 elements for each thread at most
    for kernel in kernels:
        vectors = cuda_code.template_numbers(kernel.name)[0]
        fewer = vectors >= 4 and "BFloat16" not in kernel.name  # warps: 12
        assert kernel.registers <= (168 if fewer else 128), kernel
    found = {
        cuda_code.template_numbers(code.name)[:2]: code.row_loop() / (8 * cuda_code.template_numbers(code.name)[0])
        for code in codes
        if code.arch == 90 and "BFloat16" in code.name and kind.search(code.name)
    }
    if found:
        assert {key: count for key, count in found.items() if count > MORE.get(key, count)} == {}, found


@built_only
def test_as_many_blocks_of_slabs_as_there_are_registers_for(reports: list[Resources]) -> None:
    """The host starts so many for each multiprocessor: slab_blocks in csrc/cuda/rules.h."""
    seen = set()
    for kernel in reports:
        if cuda_code.kernel_name(kernel.name) == "slab_backward":
            norm, _ = cuda_code.template_numbers(kernel.name)
            blocks = 65536 // (-(-kernel.registers // 8) * 8 * 256)
            assert blocks == (1 if norm else 2), kernel
            seen.add(norm)
    assert seen == {0, 1}


@built_only
def test_the_last_step_of_sums_may_start_early(codes: list[Code]) -> None:
    """From sm_90 on it waits, before it reads anything, for the kernels that say when it may start."""
    waiting: Counter[str] = Counter()
    for code in codes:
        texts = list(code.instructions.values())
        waits = [place for place, text in enumerate(texts) if text.startswith("ACQBULK")]
        says = any("PREEXIT" in text for text in texts)
        name = cuda_code.kernel_name(code.name)
        last, many = name in ("add_lines", "add_edits"), name.startswith(("norm_backward", "slab_", "mix_row_backward"))
        assert (len(waits), says) == ((int(last), many) if code.arch >= 90 else (0, False)), code
        if waits:
            reads = [place for place, text in enumerate(texts) if cuda_code.access(text) is not None]
            assert min(reads) > waits[0], code
            waiting[name] += 1
    assert code.arch < 90 or waiting.keys() == {"add_lines", "add_edits"}


@built_only
def test_library_loads_without_a_gpu(codes: list[Code]) -> None:
    """It registers its kernels and says what it was built for; what only a torch with CUDA has is looked up later."""
    code = f"""
        import ctypes, os
        import torch, red_kernels
        from red_kernels.backends import cpu
        assert cpu.load_error() is None, cpu.load_error()
        dll = ctypes.CDLL({str(LIBRARY)!r}, mode=os.RTLD_LAZY)
        has = torch._C._dispatch_has_kernel_for_dispatch_key
        for kind in ("edit", "edit_norm", "norm_edit", "mix", "mix_norm"):
            for way in ("forward", "backward"):
                assert has(f"red_kernels::{{kind}}_{{way}}", "CUDA"), (kind, way)
        text = ctypes.create_string_buffer(256)
        assert dll.red_kernels_cuda_architectures(text, ctypes.c_size_t(256)) == 1
        print(text.value.decode())
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=HANGS)
    assert done.returncode == 0, done.stderr
    archs = sorted({code.arch for code in codes})
    assert re.fullmatch(" ".join(f"sm_{arch}" for arch in archs) + r"( compute_\d+)+\n", done.stdout)
    assert f"compute_{archs[-1]}\n" in done.stdout  # for later GPUs


@built_only
def test_library_needs_torch_with_cuda_only_when_called() -> None:
    needed = subprocess.run(["readelf", "-d", str(LIBRARY)], capture_output=True, text=True, check=True).stdout
    assert "[libtorch.so]" in needed  # brings libtorch_cuda along
    assert "libtorch_cuda" not in needed
    assert "libcudart" not in needed
    assert "BIND_NOW" not in needed
    assert "aoti_torch_get_current_cuda_stream" in dynamic_symbols(CUDA_LIBRARY, "--undefined-only")


ENTRY = """\
ptxas info    : 28 bytes gmem, 224 bytes cmem[4]
ptxas info    : Compiling entry function '_ZN3red4cuda12norm_forwardIfLi4ELb1EEEvNS0_1AE' for 'sm_90'
ptxas info    : Function properties for _ZN3red4cuda12norm_forwardIfLi4ELb1EEEvNS0_1AE
    {} bytes stack frame, {} bytes spill stores, {} bytes spill loads
{}ptxas info    : Used 96 registers, used 1 barriers, 376 bytes cmem[0]
ptxas info    : Compile time = 8.727 ms
"""
CALLED = """\
ptxas info    : Function properties for _ZN3red4slowEv
    8 bytes stack frame, 4 bytes spill stores, 12 bytes spill loads
"""
SASS = """\
Fatbin elf code:
================
arch = sm_90
	code for sm_90
		Function : {name}
	.headerflags	@"EF_CUDA_SM90"
        /*0000*/                   LDC R1, c[0x0][0x28] ;               /* 0x00000a00ff017b82 */
                                                                        /* 0x000fe20000000800 */
        /*0010*/                   LDG.E.128.CONSTANT R4, desc[UR4][R2.64] ;  /* 0x0 */
        /*0020*/               @P0 BRA 0x60 ;                           /* 0x0 */
        /*0030*/                   LDGSTS.E.BYPASS.LTC128B.128 [R9], desc[UR4][R2.64] ;  /* 0x0 */
        /*0040*/                   LDG.E.U16 R4, desc[UR4][R2.64] ;     /* 0x0 */
        /*0050*/              @!P1 BRA 0x30 ;                           /* 0x0 */
        /*0060*/                   STG.E.64 desc[UR4][R2.64], R4 ;      /* 0x0 */
        /*0070*/                   STG.E desc[UR4][R2.64], R4 ;         /* 0x0 */
        /*0080*/                   STS.128 [R2], R4 ;                   /* 0x0 */
        /*0090*/                   EXIT ;                               /* 0x0 */
        /*00a0*/                   BRA 0xa0;                            /* 0x0 */
"""
NORM = "_ZN3red4cuda13norm_backwardIfLi1ELb1ELb0EEEvNS0_1AE"


def sass(name: str = NORM, **changes: str) -> Code:
    text = SASS.format(name=name)
    for old, new in changes.values():
        assert old in text
        text = text.replace(old, new)
    (found,) = cuda_code.code(text.splitlines())
    return found


def test_a_spill_is_found() -> None:
    (kernel,) = cuda_code.resources(ENTRY.format(16, 8, 24, ""))
    assert (kernel.registers, kernel.stack, kernel.spill_stores, kernel.spill_loads) == (96, 16, 8, 24)
    assert spilling([kernel], {}) == [f"{kernel.name} for sm_90: stack, spill stores and loads (16, 8, 24)"]
    assert spilling([kernel], {("norm_forward", 90): (16, 8, 24)}) == []
    assert len(spilling([kernel], {("norm_forward", 90): (16, 8, 23)})) == 2
    assert len(spilling([kernel], {("norm_forward", 80): (16, 8, 24)})) == 2
    (kernel,) = cuda_code.resources(ENTRY.format(0, 0, 0, CALLED))
    assert spilling([kernel], {}) == [f"{kernel.name} for sm_90: stack, spill stores and loads (8, 4, 12)"]
    (kernel,) = cuda_code.resources(ENTRY.format(0, 0, 0, ""))
    assert spilling([kernel], {}) == []
    assert spilling([kernel], {("norm_forward", 90): (16, 8, 24)}) != []  # is listed and no more true


@pytest.mark.parametrize(
    "text",
    [
        ENTRY.format(0, 0, 0, "").rsplit("ptxas info    : Used")[0],
        ENTRY.format(0, 0, 0, "").rsplit("ptxas info    : Used")[0] + ENTRY.format(0, 0, 0, ""),
        CALLED,
        ENTRY.format(0, 0, 0, "").replace("bytes spill stores", "kilobytes spill stores"),
        "ptxas info    : Used 96 registers",
    ],
)
def test_reports_that_are_not_understood(text: str) -> None:
    with pytest.raises(ValueError, match="ptxas"):
        cuda_code.resources(text)


def test_a_spill_of_the_compiler_is_found(tmp_path: Path) -> None:
    try:
        nvcc = build.find_nvcc()
    except build.BuildError as error:
        pytest.skip(str(error))
    source = tmp_path / "squeezed.cu"
    source.write_text(
        "__global__ void squeezed(float* x) { float v[64]; for (int i = 0; i < 64; ++i) v[i] = x[i * 32];\n"
        "__syncthreads(); for (int i = 0; i < 64; ++i) x[i] = v[63 - i] * v[i]; }\n"
    )
    command = [nvcc, "-cubin", "-arch=sm_90", "-Xptxas=-v", "-o", str(tmp_path / "squeezed.cubin"), str(source)]
    (tight,) = cuda_code.resources(build.run([*command, "-maxrregcount=24"], "squeezed.cu"))
    (free,) = cuda_code.resources(build.run(command, "squeezed.cu"))
    assert spilling([free], {}) == []
    assert len(spilling([tight], {})) == 1


def test_accesses_are_counted_by_width_and_loop() -> None:
    assert dict(sass().accesses()) == {
        Access("load", 128, False): 1,
        Access("copy", 128, True): 1,
        Access("load", 16, True): 1,
        Access("store", 64, False): 1,
        Access("store", 32, False): 1,
    }
    assert sass(branch=("@!P1 BRA 0x30", "@!P1 BRA 0x60")).looping() == {0xA0}
    assert sass(branch=("     BRA 0xa0", "     BRA 0x60")).looping() == {0x30, 0x40, 0x50}  # from where nothing comes
    table = sass(end=("STG.E desc[UR4][R2.64], R4", "BRX R8 -0x80"))  # a `switch` over what is behind it alone
    assert table.looping() == {0x30, 0x40, 0x50, 0xA0}
    again = sass(
        end=("STG.E desc[UR4][R2.64], R4", "BRX R8 -0x80"), first=("EXIT ;", "BRA 0x20 ;"), last=("BRA 0xa0", "EXIT")
    )
    assert again.looping() == set(range(0x20, 0xA0, 0x10))
    together = sass(branch=("@P0 BRA 0x60", "BSSY B0, 0x60"), end=("STS.128 [R2], R4", "BSYNC B0"))
    assert 0x60 in together.looping()  # threads that wait there go on at 0x60


def test_instructions_of_a_row_are_counted() -> None:
    """The longest loop; and neither what nothing leads to nor what a warp does whose threads have come apart."""
    assert (sass().row_loop(), sass().length()) == (3, 10)
    longer = sass(last=("BRA 0xa0", "BRA 0x10"), end=("EXIT ;", "BRA 0xa0 ;"), more=("STS.128 [R2], R4", "EXIT"))
    assert (longer.row_loop(), longer.length()) == (3, 9)
    apart = sass(branch=("@P0 BRA 0x60", "BRA.DIV UR4, 0x90"), end=("@!P1 BRA 0x30", "NOP"))
    assert (apart.row_loop(), apart.length()) == (1, 10)


def test_narrow_accesses_are_found() -> None:
    good = {"read": ("LDG.E.U16 ", "LDG.E.128 "), "more": ("STS.128 [R2], R4", "LDG.E.128 R4, desc[UR4][R2.64]")}
    stores = ("STG.E.64 ", "STG.E.128 "), ("STG.E desc", "STG.E.128 desc")
    wide = sass(**good, a=stores[0], b=stores[1])
    assert narrow(wide) == ["store: none of 128 bits in a loop"]
    assert "1 loads of 16 bits" in narrow(sass())
    assert "store: 0 of 128 bits, expected 2 or more" in narrow(sass())
    assert "read: 2 of 128 bits, expected 3 or more" in narrow(sass())
    assert "read: 2 of 128 bits, expected 6 or more" in narrow(sass(name=NORM.replace("Li1E", "Li2E")))


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("@P0 BRA 0x60", "@P0 BRA 0x6000", "leaves it"),
        ("@P0 BRA 0x60", "@P0 BRX R2 -0x60", "branches to an unknown"),
        ("@P0 BRA 0x60", "@P0 BRA R2", "not understood"),
        ("STS.128 [R2], R4", "UBLKCP.S.G [UR4], [UR6], UR8", "bulk copy"),
        ("EXIT", "NOP", "has no end"),
        ("\t\tFunction : {name}\n", "", "of no kernel"),
    ],
)
def test_machine_code_that_is_not_understood(old: str, new: str, reason: str) -> None:
    assert old in SASS
    lines = SASS.replace(old, new).format(name=NORM).splitlines()
    with pytest.raises(ValueError, match=reason):
        [code.accesses() for code in cuda_code.code(lines)]


def test_names_of_kernels() -> None:
    assert cuda_code.kernel_name(NORM) == "norm_backward"
    assert cuda_code.kernel_name("_ZN3red4cuda9add_linesENS0_8AddLinesE") == "add_lines"
    assert cuda_code.kernel_name("_Z5spillPf") == "spill"
    assert cuda_code.template_numbers(NORM) == (1, 1, 0)
