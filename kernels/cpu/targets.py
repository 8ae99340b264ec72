"""The CPU that a library is compiled for, and whether this machine has one: asked before the
library is loaded, since an instruction that a CPU does not have ends the process."""

import platform
import re
from functools import cache
from pathlib import Path
from typing import NamedTuple

# What a compiler may use without being asked, by the macro that it then defines: the name that
# Linux has for it in /proc/cpuinfo.
X86 = {
    "SSE3": "pni",
    "SSSE3": "ssse3",
    "SSE4_1": "sse4_1",
    "SSE4_2": "sse4_2",
    "SSE4A": "sse4a",
    "POPCNT": "popcnt",
    "MOVBE": "movbe",
    "LZCNT": "abm",
    "BMI": "bmi1",
    "BMI2": "bmi2",
    "ADX": "adx",
    "TBM": "tbm",
    "XOP": "xop",
    "FMA": "fma",
    "FMA4": "fma4",
    "F16C": "f16c",
    "GFNI": "gfni",
    "AVX": "avx",
    "AVX2": "avx2",
    "AVXVNNI": "avx_vnni",
    "AVX512F": "avx512f",
    "AVX512CD": "avx512cd",
    "AVX512BW": "avx512bw",
    "AVX512DQ": "avx512dq",
    "AVX512VL": "avx512vl",
    "AVX512IFMA": "avx512ifma",
    "AVX512VBMI": "avx512vbmi",
    "AVX512VBMI2": "avx512_vbmi2",
    "AVX512VNNI": "avx512_vnni",
    "AVX512BITALG": "avx512_bitalg",
    "AVX512VPOPCNTDQ": "avx512_vpopcntdq",
    "AVX512BF16": "avx512_bf16",
    "AVX512FP16": "avx512_fp16",
}
ARM = {
    "ARM_FEATURE_ATOMICS": "atomics",
    "ARM_FEATURE_BF16_VECTOR_ARITHMETIC": "bf16",
    "ARM_FEATURE_DOTPROD": "asimddp",
    "ARM_FEATURE_FP16_VECTOR_ARITHMETIC": "asimdhp",
    "ARM_FEATURE_MATMUL_INT8": "i8mm",
    "ARM_FEATURE_QRDMX": "asimdrdm",
    "ARM_FEATURE_RCPC": "lrcpc",
    "ARM_FEATURE_SVE": "sve",
    "ARM_FEATURE_SVE2": "sve2",
}
FEATURES = {f"__{macro}__": name for macro, name in X86.items()}
FEATURES |= {f"__{macro}": name for macro, name in ARM.items()}
CPUINFO = Path("/proc/cpuinfo")
# As it stands in a library.
MARK = re.compile(rb"fused_rnn is for ([\w-]+) with((?: \w+)*)\0")


class Target(NamedTuple):
    """A kind of machine, as `platform.machine` says it, and what its CPU has to have."""

    machine: str
    features: tuple[str, ...]


def target_of_macros(macros: str) -> Target:
    """What a compiler on this machine compiles for, by the macros that it defines."""
    defined = re.findall(r"^#define (\w+)", macros, re.M)
    return Target(platform.machine(), tuple(FEATURES[name] for name in defined if name in FEATURES))


def mark(target: Target) -> str:
    """The C++ that puts the target into a library."""
    text = " ".join(["fused_rnn is for", target.machine, "with", *target.features])
    return f'extern "C" {{ extern const char target[]; const char target[] = "{text}"; }}\n'


def target_of_library(content: bytes) -> Target | None:
    """None for a library without a mark, as those are that a machine compiles for itself."""
    found = MARK.search(content)
    if found is None:
        return None
    return Target(found[1].decode(), tuple(found[2].decode().split()))


@cache
def cpu_features() -> frozenset[str]:
    """Of this machine's CPU, as Linux tells them: of all its cores. None elsewhere."""
    try:
        text = CPUINFO.read_text()
    except OSError:
        return frozenset()
    cores = [set(line.split()) for line in re.findall(r"^(?:flags|Features)\s*:(.*)$", text, re.M)]
    return frozenset(set.intersection(*cores)) if cores else frozenset()


def refusal(target: Target | None) -> str:
    """Why a library for that target may not be loaded here; "" if it may."""
    if target is None:
        return "does not say which CPU it is for"
    if target.machine != platform.machine():
        return f"is for {target.machine}, and this machine is {platform.machine()}"
    missing = [name for name in target.features if name not in cpu_features()]
    return f"is for a CPU with {', '.join(missing)}, which this one lacks" if missing else ""
