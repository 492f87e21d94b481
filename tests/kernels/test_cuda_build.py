"""Every CUDA kernel compiles for every architecture, without spills or serialized wgmma; the cache of machine code.

Compiling and disassembling need no GPU: NVRTC and nvdisasm come with the `dev` extra (Linux).
"""

import os
import re
import shutil
import stat
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from vlmquant import cache
from vlmquant.errors import KernelError
from vlmquant.kernels.cuda import build, catalog
from vlmquant.kernels.cuda.catalog import ENTRIES, Entry


def _missing() -> str | None:
    try:
        build.nvrtc_version()
    except KernelError as error:
        return str(error)
    return None


needs_nvrtc = pytest.mark.skipif(_missing() is not None, reason=f"no NVRTC here: {_missing()}")

FAMILIES = sorted({entry.family for entry in ENTRIES.values()})
ARCHS = [*build.EXACT_ARCHS.values(), build.PTX_ARCH]

BLOCKS_PER_SM = {"skinny_hopper": 2, "skinny_wide_hopper": 2, "w8_gemm": 2}
"""Blocks that must fit an SM; one for the other families."""
SM_REGISTERS = 65536

OPCODES = {
    "skinny": ("HMMA", "LDSM", "LDGSTS"),
    "gemm": ("HMMA", "LDSM", "LDGSTS"),
    "dequantize": ("LDG", "STG"),
    "skinny_hopper": ("HMMA", "LDSM", "UBLKCP", "UTMALDG", "ACQBULK", "SYNCS"),
    "skinny_wide_hopper": ("HMMA", "LDSM", "UBLKCP", "UTMALDG", "ACQBULK", "SYNCS"),
    "gemm_hopper": ("HGMMA", "UBLKCP", "UTMALDG", "ACQBULK", "SYNCS", "USETMAXREG"),
    "quantize_rows": ("LDG", "STG"),
    "w8_gemm": ("IMMA", "LDSM", "LDGSTS"),
    "round_block": ("LDG", "STG", "LDS", "FFMA", "FRND"),
    "w8_gemm_hopper": ("IGMMA", "UTMALDG", "ACQBULK", "SYNCS", "USETMAXREG"),
}
"""What the machine code of a family must contain: tensor cores, ldmatrix, asynchronous and bulk copies, barriers."""


def runs_on(entry: Entry, arch: str) -> bool:
    return ("sm_80" if arch == build.PTX_ARCH else arch) in entry.archs


def hot(entry: Entry) -> bool:
    """What a bfloat16 model with symmetric groups of 128, or int8 without an activation, runs; GPTQ's own."""
    grouped = not entry.groups or 128 in entry.groups
    return entry.dtype in ("bf16", "f32") and entry.symmetric and grouped and not entry.activation


def samples() -> list[tuple[str, str]]:
    """The default run: one entry of every family on each architecture."""
    chosen = []
    for family in FAMILIES:
        first = next(entry for entry in ENTRIES.values() if entry.family == family and hot(entry))
        chosen += [(first.name, arch) for arch in ARCHS if runs_on(first, arch)]
    return sorted(chosen)


def everything() -> list[tuple[str, str]]:
    return sorted({(name, arch) for name, entry in ENTRIES.items() for arch in ARCHS if runs_on(entry, arch)})


def check(name: str, arch: str) -> bytes:
    """Compile and hold the log against what a fast kernel must not do."""
    entry = ENTRIES[name]
    code, log = build.compile_program(build.program(entry, arch))
    assert not build.SERIALIZED.search(log), log
    if arch == build.PTX_ARCH:
        assert f".entry {name}(" in code.decode()
        return code
    assert code[:4] == b"\x7fELF"
    found = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log)
    assert found is not None, log
    assert set(found.groups()) == {"0"}, log
    registers = re.search(r"Used (\d+) registers", log)
    assert registers is not None, log
    per_thread = -(-int(registers[1]) // 8) * 8
    warps = -(-entry.threads // 32)
    assert per_thread * 32 * warps * BLOCKS_PER_SM.get(entry.family, 1) <= SM_REGISTERS, log
    if arch == "sm_90a":
        check_moved_registers(entry, per_thread)
    return code


def check_moved_registers(entry: Entry, per_thread: int) -> None:
    """What the producer's warpgroup gives up must be enough for the others: else they wait for registers forever."""
    text, _ = build.compile_program(build.program(entry, "compute_90a"))
    moved = dict(re.findall(r"setmaxnreg\.(dec|inc)\.sync\.aligned\.u32 *(\d+)", text.decode()))
    if moved:
        after = 128 * int(moved["dec"]) + (entry.threads - 128) * int(moved["inc"])
        assert after <= per_thread * entry.threads, (moved, per_thread)


@needs_nvrtc
@pytest.mark.parametrize(("name", "arch"), samples())
def test_kernel_compiles_without_spills(name: str, arch: str) -> None:
    check(name, arch)


@needs_nvrtc
@pytest.mark.slow
@pytest.mark.parametrize(("name", "arch"), everything())
def test_every_kernel_compiles_without_spills(name: str, arch: str) -> None:
    check(name, arch)


def nvdisasm() -> str | None:
    """From PATH, the CUDA toolkit, or the wheel of that name."""
    places = [os.environ.get("PATH", ""), "/usr/local/cuda/bin"]
    places += [str(path) for root in sys.path for path in Path(root).glob("nvidia/*/bin")]
    return shutil.which("nvdisasm", path=os.pathsep.join(places))


def opcodes(code: bytes, folder: Path) -> set[str]:
    tool = nvdisasm()
    assert tool is not None
    file = folder / "kernel.cubin"
    file.write_bytes(code)
    text = subprocess.run([tool, "-c", str(file)], check=True, capture_output=True, text=True).stdout
    return set(re.findall(r"^\s+(?:/\*\w+\*/\s+)?(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9]+)[ .;]", text, re.MULTILINE))


@needs_nvrtc
@pytest.mark.skipif(nvdisasm() is None, reason="no nvdisasm on PATH, in the CUDA toolkit or in a wheel")
@pytest.mark.parametrize("family", FAMILIES)
def test_machine_code_has_the_instructions_it_was_written_for(family: str, tmp_path: Path) -> None:
    entry = next(entry for entry in ENTRIES.values() if entry.family == family and hot(entry))
    arch = "sm_90a" if "hopper" in family else "sm_80"
    code, _ = build.compile_program(build.program(entry, arch))
    found = opcodes(code, tmp_path)
    assert set(OPCODES[family]) <= found, sorted(found)


def test_every_family_has_expected_opcodes() -> None:
    assert sorted(OPCODES) == FAMILIES


@needs_nvrtc
def test_exact_architectures_are_matched_exactly() -> None:
    assert build.arch_for((9, 0)) == "sm_90a"
    assert build.arch_for((8, 6)) == "sm_86"
    for newer in [(8, 7), (9, 9), (10, 3), (12, 1), (13, 0)]:
        assert build.arch_for(newer) == build.PTX_ARCH
    with pytest.raises(KernelError, match=r"capability 7\.5: the CUDA kernels need 8\.0"):
        build.arch_for((7, 5))


def test_a_compiler_too_old_for_an_architecture_gives_ptx(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "_compiler", lambda: ((12, 4), (80, 86, 89, 90)))
    assert build.arch_for((12, 0)) == build.PTX_ARCH
    assert build.arch_for((9, 0)) == "sm_90a"


SOURCE = '#include "outer.cuh"\nextern "C" __global__ void twice(int* x) { *x *= FACTOR; }\n'


@pytest.fixture
def entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Entry:
    """A small kernel of our own, with its sources and cache in folders of their own."""
    sources = tmp_path / "sources"
    sources.mkdir()
    (sources / "outer.cuh").write_text('#include "inner.cuh"\n#ifdef NEVER\n#include "not_there.h"\n#endif\n')
    (sources / "inner.cuh").write_text("#define FACTOR 2\n")
    monkeypatch.setattr(catalog, "SOURCES", sources)
    monkeypatch.setattr(catalog, "program", lambda entries: SOURCE)
    monkeypatch.setenv(build.CACHE, str(tmp_path / "cache"))
    build._read.cache_clear()
    build._included.cache_clear()
    return Entry("twice", "twice", "", ("sm_80",), "bf16", True, 32)


@pytest.fixture(autouse=True)
def _fresh_sources() -> None:
    build._read.cache_clear()
    build._included.cache_clear()


def compiled(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The entries that are compiled from now on."""
    done: list[str] = []

    def count(wanted: build.Program) -> tuple[bytes, str]:
        done.append(wanted.entry)
        return b"code of " + wanted.key().encode(), ""

    monkeypatch.setattr(build, "compile_program", count)
    monkeypatch.setattr(build, "_compiler", lambda: ((13, 0), (80, 90)))
    return done


def test_second_load_comes_from_the_cache(entry: Entry, monkeypatch: pytest.MonkeyPatch) -> None:
    done = compiled(monkeypatch)
    first = build.load(entry, "sm_80")
    assert build.load(entry, "sm_80") == first
    assert done == ["twice"]


def test_key_depends_on_everything_that_the_code_does(
    entry: Entry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled(monkeypatch)
    keys = [build.program(entry, "sm_80").key(), build.program(entry, "compute_80").key()]
    monkeypatch.setattr(build, "OPTIONS", (*build.OPTIONS, "-G"))
    keys.append(build.program(entry, "sm_80").key())
    monkeypatch.setattr(build, "_compiler", lambda: ((13, 2), (80, 90)))
    keys.append(build.program(entry, "sm_80").key())
    (tmp_path / "sources" / "inner.cuh").write_text("#define FACTOR 3\n")
    build._read.cache_clear()
    build._included.cache_clear()
    keys.append(build.program(entry, "sm_80").key())
    assert len(set(keys)) == len(keys)


@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty", "foreign"])
def test_damaged_cache_entry_is_rebuilt(
    entry: Entry, damage: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    done = compiled(monkeypatch)
    code = build.load(entry, "sm_80")
    path = build.cache_path(build.program(entry, "sm_80"))
    whole = path.read_bytes()
    flipped = whole[:-1] + bytes([whole[-1] ^ 1])
    path.write_bytes({"truncated": whole[:-5], "flipped": flipped, "empty": b"", "foreign": b"\x7fELF..."}[damage])
    assert build.load(entry, "sm_80") == code
    assert done == ["twice", "twice"]
    assert path.read_bytes() == whole
    assert "damaged" in caplog.text


def test_many_writers_leave_one_whole_file(entry: Entry, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled(monkeypatch)
    start, path = threading.Barrier(8), build.cache_path(build.program(entry, "sm_80"))
    codes = [bytes([number]) * 200_000 for number in range(8)]

    def write(code: bytes) -> bytes | None:
        start.wait()
        for _ in range(10):
            build.write_cached(path, code)
            assert build.read_cached(path) in codes
        return build.read_cached(path)

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(write, codes))
    assert all(code in codes for code in found)
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_a_failed_write_leaves_nothing(entry: Entry, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled(monkeypatch)
    path = build.cache_path(build.program(entry, "sm_80"))

    def full(self: Path, target: Path) -> Path:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    assert build.load(entry, "sm_80")
    assert list(path.parent.iterdir()) == []


def test_without_a_place_for_the_cache_it_works_all_the_same(
    entry: Entry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    done = compiled(monkeypatch)
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv(build.CACHE, str(tmp_path / "file"))
    for _ in range(2):
        build.load(entry, "sm_80")
    assert done == ["twice", "twice"]
    assert caplog.text.count("cannot be kept") == 1
    assert build.CACHE in caplog.text


@pytest.mark.skipif(os.name != "posix", reason="owners and modes are POSIX's")
@pytest.mark.parametrize("how", ["file", "folder", "cache", "owner of the file", "owner of the folder", "link", "pipe"])
def test_code_that_others_could_have_written_does_not_run(
    entry: Entry, how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Its checksum is right: whoever may write there can make one."""
    done = compiled(monkeypatch)
    code = build.load(entry, "sm_80")
    path = build.cache_path(build.program(entry, "sm_80"))
    build.write_cached(path, b"another user's code")
    places = {"file": path, "folder": path.parent, "cache": path.parent.parent}
    if how in places:
        places[how].chmod(0o666 if how == "file" else 0o777)
    elif how.startswith("owner"):
        real, foreign = os.stat, path if how.endswith("file") else path.parent
        inode = real(foreign).st_ino

        def owned(state: os.stat_result) -> os.stat_result:
            fields = list(state)
            fields[stat.ST_UID] = 4321 if state.st_ino == inode else os.geteuid()
            return os.stat_result(fields)

        real_fstat = os.fstat
        monkeypatch.setattr(cache.os, "stat", lambda place, **how: owned(real(place, **how)))
        monkeypatch.setattr(cache.os, "fstat", lambda number: owned(real_fstat(number)))
    else:
        content = path.read_bytes()
        path.unlink()
        if how == "pipe":
            os.mkfifo(path)
        else:
            (tmp_path / "elsewhere").write_bytes(content)
            path.symlink_to(tmp_path / "elsewhere")
    assert build.load(entry, "sm_80") == code
    assert done == ["twice", "twice"]
    assert how == "link" or "is not used" in caplog.text


def test_the_cache_is_made_for_one_user(entry: Entry, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled(monkeypatch)
    before = os.umask(0)
    try:
        build.load(entry, "sm_80")
    finally:
        os.umask(before)
    path = build.cache_path(build.program(entry, "sm_80"))
    for place, mode in ((path, 0o600), (path.parent, 0o700), (path.parent.parent, 0o700)):
        assert stat.S_IMODE(place.stat().st_mode) == mode


def test_nothing_is_kept_where_others_can_write(
    entry: Entry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    compiled(monkeypatch)
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache").chmod(0o777)
    build.load(entry, "sm_80")
    assert "cannot be kept" in caplog.text
    assert list((tmp_path / "cache").rglob("*.cubin")) == []


def test_cache_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(build.CACHE, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert build.cache_home() == tmp_path / "vlmquant"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert build.cache_home() == Path.home() / ".cache" / "vlmquant"


@needs_nvrtc
def test_code_that_does_not_compile_is_an_error_with_the_log(entry: Entry, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalog, "program", lambda entries: "int broken(")
    with pytest.raises(KernelError, match=r"(?s)twice for sm_80: NVRTC \d+\.\d+ refuses it: .*expected"):
        build.load(entry, "sm_80")


@needs_nvrtc
def test_an_empty_log_does_not_overwrite_what_python_shares(entry: Entry) -> None:
    _, log = build.compile_program(build.program(entry, build.PTX_ARCH))
    assert log == ""
    assert [bytes([number])[0] for number in range(256)] == list(range(256))


@needs_nvrtc
def test_headers_are_found_in_memory(entry: Entry) -> None:
    assert build.load(entry, "sm_80")[:4] == b"\x7fELF"


@needs_nvrtc
def test_serialized_wgmma_is_reported(
    entry: Entry, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    text = "ptxas info : (C7518) Potential Performance Loss: wgmma.mma_async instructions are serialized due to ..."
    monkeypatch.setattr(build, "_text", lambda size, read, handle: text.encode())
    build.compile_program(build.program(entry, "sm_80"))
    assert "waits after every wgmma" in caplog.text


def test_without_the_bindings_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    build._compiler.cache_clear()
    with pytest.raises(KernelError, match=r"need cuda-bindings .*pip install cuda-bindings"):
        build.nvrtc_version()
    build._compiler.cache_clear()
