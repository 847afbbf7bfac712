"""Build stand-ins for NVIDIA's libraries, with which ONNX Runtime's CUDA provider loads where there is no GPU.

Each function that the provider imports is there. Most return 0, which is success; the few whose answer is looked at
describe one device of compute capability 9.0 whose memory is the host's. No kernel is there, so nothing can be run.
"""

from __future__ import annotations

import re
import subprocess
from collections import defaultdict
from pathlib import Path
from typing import Final

_ALLOCATE: Final = "*p = aligned_alloc(256, (n + 511) & ~255ul); return *p ? 0 : 2;"
#: Result, parameters and body of the functions that must answer something, by name.
_ANSWERS: Final = {
    "cudaGetDeviceCount": ("int", "int *n", "*n = 1; return 0;"),
    "cudaGetDevice": ("int", "int *n", "*n = 0; return 0;"),
    "cudaDriverGetVersion": ("int", "int *v", "*v = 13000; return 0;"),
    "cudaRuntimeGetVersion": ("int", "int *v", "*v = 13000; return 0;"),
    # struct cudaDeviceProp of CUDA 12 and 13: memory, shared memory, warp, threads, capability, multiprocessors.
    "cudaGetDeviceProperties": (
        "int",
        "char *p",
        'memset(p, 0, 1008); strcpy(p, "stand-in"); *(size_t *)(p + 288) = 1ul << 36; *(size_t *)(p + 296) = 49152; '
        "*(int *)(p + 308) = 32; *(int *)(p + 320) = 1024; *(int *)(p + 360) = 9; *(int *)(p + 364) = 0; "
        "*(int *)(p + 384) = 132; return 0;",
    ),
    # Attributes 75 and 76 are the capability, 16 multiprocessors, 97 shared memory.
    "cudaDeviceGetAttribute": (
        "int",
        "int *v, int a, int d",
        "*v = a == 75 ? 9 : a == 76 ? 0 : a == 16 ? 132 : a == 97 ? 232448 : 1024; return 0;",
    ),
    "cudaMemGetInfo": ("int", "size_t *a, size_t *b", "*a = *b = 1ul << 36; return 0;"),
    "cudaMalloc": ("int", "void **p, size_t n", _ALLOCATE),
    "cudaMallocHost": ("int", "void **p, size_t n", _ALLOCATE),
    "cudaHostAlloc": ("int", "void **p, size_t n, unsigned f", _ALLOCATE),
    "cudaMallocAsync": ("int", "void **p, size_t n, void *s", _ALLOCATE),
    "cudaMallocFromPoolAsync": ("int", "void **p, size_t n, void *q, void *s", _ALLOCATE),
    "cudaFree": ("int", "void *p", "free(p); return 0;"),
    "cudaFreeAsync": ("int", "void *p, void *s", "free(p); return 0;"),
    "cudaFreeHost": ("int", "void *p", "free(p); return 0;"),
    "cudaMemcpy": ("int", "void *a, void *b, size_t n, int k", "memcpy(a, b, n); return 0;"),
    "cudaMemcpyAsync": ("int", "void *a, void *b, size_t n, int k, void *s", "memcpy(a, b, n); return 0;"),
    "cudaMemset": ("int", "void *a, int v, size_t n", "memset(a, v, n); return 0;"),
    "cudaMemsetAsync": ("int", "void *a, int v, size_t n, void *s", "memset(a, v, n); return 0;"),
    "cudaFuncGetAttributes": ("int", "char *a, void *k", "memset(a, 0, 64); return 0;"),
    "__cudaRegisterFatBinary": ("void **", "void *x", "static void *h; return &h;"),
    "cublasLtGetVersion": ("size_t", "void", "return 130000;"),
    "cudnnGetVersion": ("size_t", "void", "return 91300;"),
    "cudnnGetCudartVersion": ("size_t", "void", "return 13000;"),
    **dict.fromkeys(
        (
            "cudaGetErrorString",
            "cudaGetErrorName",
            "cudnnGetErrorString",
            "cublasGetStatusString",
            "cublasGetStatusName",
        ),
        ("const char *", "int e", 'return "stand-in";'),
    ),
}
#: Functions that give a handle through their first parameter.
_MAKES_HANDLE: Final = re.compile(
    r"cudaStreamCreate|cudaEventCreate|cublas(Lt)?Create|curandCreateGenerator|cudaMemPoolCreate|cudnnCreate"
    r"|cudaStreamGetCaptureInfo|cublasLtMatmul\w*Create$"
)
#: Symbols without a version belong to the library of their prefix.
_PREFIXES: Final = {
    "curand": "libcurand",
    "cudnn": "libcudnn",
    "cufft": "libcufft",
    "nvrtc": "libnvrtc",
    "cu": "libcuda.",
}
#: cuDNN is opened by name while a program runs, so that what it must have is not among the imported symbols.
_CUDNN: Final = (
    "Create Destroy SetStream GetVersion GetCudartVersion GetErrorString GetLastErrorString CreateTensorDescriptor "
    "DestroyTensorDescriptor SetTensorNdDescriptor CreateFilterDescriptor DestroyFilterDescriptor "
    "CreateConvolutionDescriptor DestroyConvolutionDescriptor CreateDropoutDescriptor DestroyDropoutDescriptor "
    "CreateRNNDescriptor CreateReduceTensorDescriptor CreateActivationDescriptor DestroyActivationDescriptor "
    "CreatePoolingDescriptor CreateLRNDescriptor BackendCreateDescriptor BackendDestroyDescriptor "
    "BackendSetAttribute BackendFinalize BackendGetAttribute BackendExecute"
)


def build(provider: Path, folder: Path) -> None:
    """Compile a stand-in for each of NVIDIA's libraries that the provider's library needs, into ``folder``.

    Raises:
        subprocess.CalledProcessError: gcc, nm or readelf fails.
        FileNotFoundError: one of them is not installed.
    """
    if folder.exists():
        return
    folder.mkdir(parents=True)
    for library, symbols in _imports(provider).items():
        _compile(folder / library, symbols)


def _imports(provider: Path) -> dict[str, set[tuple[str, str]]]:
    """The names and versions of the symbols that the provider imports, by library."""
    libraries = re.findall(r"NEEDED.*\[(lib(?:cu|nv)[^\]]+)\]", _output("readelf", "-d", provider))
    wanted: dict[str, set[tuple[str, str]]] = defaultdict(set, {library: set() for library in libraries})
    for line in _output("nm", "-D", "--undefined-only", provider).splitlines():
        name, _, version = line.split()[-1].partition("@")
        version = version.lstrip("@")
        if version.startswith(("libcu", "libnv")):
            wanted[version].add((name, version))
        elif not version and re.match(r"cu[A-Z]|curand|cudnn|cufft|nvrtc", name):
            prefix = next(prefix for prefix in _PREFIXES if name.startswith(prefix))
            home = next((library for library in libraries if library.startswith(_PREFIXES[prefix])), None)
            if home:
                wanted[home].add((name, ""))
    cudnn = next((library for library in wanted if library.startswith("libcudnn")), "libcudnn.so.9")
    known = {name for name, _ in wanted[cudnn]}
    wanted[cudnn] |= {(f"cudnn{name}", "") for name in _CUDNN.split() if f"cudnn{name}" not in known}
    return wanted


def _compile(library: Path, symbols: set[tuple[str, str]]) -> None:
    source, versions = ["#include <stdlib.h>", "#include <string.h>"], defaultdict[str, list[str]](list)
    for name, version in sorted(symbols):
        answer = _ANSWERS.get(name) or _ANSWERS.get(re.sub(r"_v\d+$", "", name))
        if answer:
            result, parameters, body = answer
            source.append(f"{result} {name}({parameters}) {{ {body} }}")
        elif _MAKES_HANDLE.match(name):
            source.append(f"int {name}(void **h) {{ static int x[64]; *h = x; return 0; }}")
        else:
            source.append(f"long {name}(void) {{ return 0; }}")
        versions[version].append(name)
    code, script = library.with_name(f"{library.name}.c"), library.with_name(f"{library.name}.map")
    code.write_text("\n".join(source) + "\n")
    script.write_text("".join(f"{v or 'PLAIN'} {{ global: {'; '.join(names)}; }};\n" for v, names in versions.items()))
    versioned = [f"-Wl,--version-script={script}"] if any(versions) else []
    flags = ("-shared", "-fPIC", "-w", "-fno-builtin", f"-Wl,-soname,{library.name}", *versioned)
    subprocess.run(["gcc", *flags, "-o", library, code], check=True)


def _output(*command: str | Path) -> str:
    return subprocess.check_output(command, text=True)
