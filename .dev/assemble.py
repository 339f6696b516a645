"""Compiles CUDA C++ kernels without a GPU and prints what they cost.

NVRTC and ptxas come from PyPI (see `ensure_cuda_compilers` in setup.sh). Each FILE.ARCH.cu of the folder becomes a row:
registers per thread, spilled bytes, static shared memory, and what ptxas had to say. With --table, the rows are compared
with a checked-in table and any difference fails; with --update, the table is written.
"""

import argparse
import concurrent.futures
import ctypes
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile

import nvidia.cu13

ROOT = pathlib.Path(list(nvidia.cu13.__path__)[0])


def nvrtc():
    # The library finds its builtins beside itself only once they are loaded.
    for name in ("libnvrtc-builtins.so.13.0", "libnvrtc.so.13"):
        library = ctypes.CDLL(str(ROOT / "lib" / name), mode=ctypes.RTLD_GLOBAL)
    return library


def to_ptx(library, source, arch):
    """What the CUDA runtime of CubeCL asks of NVRTC."""
    options = [f"--gpu-architecture={arch}", f"--include-path={ROOT / 'include'}", f"--include-path={ROOT / 'include/cccl'}"]
    program = ctypes.c_void_p()
    check = library.nvrtcCreateProgram(ctypes.byref(program), source.encode(), None, 0, None, None)
    if check:
        raise RuntimeError(f"nvrtcCreateProgram: {check}")
    encoded = (ctypes.c_char_p * len(options))(*[option.encode() for option in options])
    failed = library.nvrtcCompileProgram(program, len(options), encoded)
    kind = "ProgramLog" if failed else "PTX"
    size = ctypes.c_size_t()
    getattr(library, f"nvrtcGet{kind}Size")(program, ctypes.byref(size))
    text = ctypes.create_string_buffer(size.value)
    getattr(library, f"nvrtcGet{kind}")(program, text)
    if failed:
        raise RuntimeError(text.value.decode())
    return text.value.decode()


def assemble(ptx, arch, cubin=None):
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        command = [str(ROOT / "bin/ptxas"), f"-arch={arch}", "-v", "-O3", file.name, "-o", cubin or "/dev/null"]
        result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(result.stderr)
    return result.stderr


def cost(report):
    def number(pattern):
        found = re.search(pattern, report)
        return int(found.group(1)) if found else 0

    return {
        "registers": number(r"Used (\d+) registers"),
        "spill_bytes": number(r"(\d+) bytes spill stores") + number(r"(\d+) bytes spill loads"),
        "stack_bytes": number(r"(\d+) bytes stack frame"),
        # Products that ptxas put one after the other, which would cost the overlap that kernels are built for.
        "serialised": "C7510" in report or "serialized" in report.lower(),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--table", type=pathlib.Path)
    parser.add_argument("--update", action="store_true")
    parser.add_argument("--keep", type=pathlib.Path, help="leave PTX and machine code in this folder")
    arguments = parser.parse_args()
    library = nvrtc()
    if arguments.keep:
        arguments.keep.mkdir(parents=True, exist_ok=True)

    def compile(file):
        name, arch = file.stem.rsplit(".", 1)
        ptx = to_ptx(library, file.read_text(), arch)
        cubin = None
        if arguments.keep:
            (arguments.keep / f"{file.stem}.ptx").write_text(ptx)
            cubin = str(arguments.keep / f"{file.stem}.cubin")
        return assemble(ptx, arch, cubin)

    found = {}
    files = sorted(arguments.folder.glob("*.cu"))
    # Both compilers leave Python's lock alone while they work.
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        for file, report in zip(files, pool.map(compile, files)):
            found[file.stem] = cost(report)
            costs = "  ".join(f"{key} {value}" for key, value in found[file.stem].items())
            print(f"{file.stem:<60} {costs}", flush=True)
            if found[file.stem]["serialised"]:
                print(report)
    if not found:
        sys.exit(f"no .cu file in {arguments.folder}")
    if arguments.update:
        arguments.table.write_text(json.dumps(found, indent=1) + "\n")
    elif arguments.table:
        expected = json.loads(arguments.table.read_text())
        differing = [name for name in sorted(found.keys() | expected.keys()) if found.get(name) != expected.get(name)]
        for name in differing:
            print(f"{name}: expected {expected.get(name)}, found {found.get(name)}", file=sys.stderr)
        if differing:
            sys.exit("kernels cost other than the table says; if that is meant, update it with --update")


if __name__ == "__main__":
    main()
