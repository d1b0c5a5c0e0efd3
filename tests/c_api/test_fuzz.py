"""Hostile calls of the C API: each is refused with a sentence, or matches the reference.

A call is drawn as an honest one, and then some of its fields are spoiled. The documentation's
promise for it is worked out here, in Python's integers and sets. A size or stride that leaves the
memory which is really there is the one lie that no library can see: such calls are not made.

Whatever happens, only the elements of the results may change. Under AddressSanitizer (`make
sanitize`) everything that belongs to no tensor is poisoned, so that a stray read shows as well.
"""

import copy
import ctypes
import importlib.util
import math
import os
import re
import shutil
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from tokencache_kernels.backends import reference
from tokencache_kernels.testing import error_budget
from tokencache_kernels.version import __version__

CSRC = Path(__file__).parents[2] / "csrc"
HEADER = CSRC / "include" / "tokencache.h"

# the kernels compiled for the CPU
_spec = importlib.util.spec_from_file_location(
    "cuda_emulator", Path(__file__).parents[1] / "backends" / "test_cuda_kernels.py"
)
cuda_emulator = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(cuda_emulator)
emulated_library = cuda_emulator.emulated_library  # a fixture

_TYPES = {
    "int64_t": ctypes.c_int64,
    "int32_t": ctypes.c_int32,
    "tokencache_dtype": ctypes.c_int32,
    "float": ctypes.c_float,
    "double": ctypes.c_double,
}


def read_structures():
    """Name and class of every structure; the name without its tokencache_ and _args."""
    text = re.sub(r"/\*.*?\*/", "", HEADER.read_text(), flags=re.DOTALL)
    structures = {}
    for name, body in re.findall(r"typedef struct tokencache_(\w+) \{(.*?)\}", text, re.DOTALL):
        fields = []
        for line in filter(None, map(str.strip, body.split(";"))):
            kind, names = re.fullmatch(r"(?:const )?(\w+)(\*? .+)", line).groups()
            kind = ctypes.c_void_p if "*" in names else _TYPES[kind]
            fields += [(field, kind) for field in re.findall(r"\w+", names)]
        name = name.removesuffix("_args")
        structures[name] = type(name, (ctypes.Structure,), {"_fields_": fields})
    return structures


STRUCTURES = read_structures()
OPS = [name for name in STRUCTURES if name != "branch"]
RESULTS = {
    "gather_rows": {"out"}, "scatter_rows": {"cache"}, "add_branches": {"out"},
    "gather_modulate": {"packed"}, "row_pass": {"out", "packed"}, "blend": {"out"},
    "select_tokens": {"staleness", "indices", "positions"}, "invert_indices": {"positions"},
}  # fmt: skip
MOVED = {1: torch.int32, 2: torch.int16, 3: torch.int16, 4: torch.int64}  # bit for bit
DTYPES = {1: torch.float32, 2: torch.float16, 3: torch.bfloat16, 4: torch.float64}
OK, INVALID, UNSUPPORTED = 0, 1, 2
CPU, CUDA = 0, 1
FLOAT64 = 4
INSTRUCTIONS = ["portable", "avx2", "avx512"]
# the same calls in every run, unless more are asked for
FUZZ = settings(
    deadline=None,
    max_examples=int(os.environ.get("TOKENCACHE_FUZZ_EXAMPLES", "100")),
    derandomize="TOKENCACHE_FUZZ_EXAMPLES" not in os.environ,
    suppress_health_check=list(HealthCheck),
)
GUARD = 64  # bytes around every tensor
HOSTILE = [-1, 0, 1, 2, 3, 7, 255, 257, -(2**31), 2**31 - 1, 2**31, 2**32, 2**52, 2**62, -(2**62),
           2**63 - 1, -(2**63)]  # fmt: skip


@dataclass
class Tensor:
    """One tensor argument: rows [outer, inner] of width elements."""

    name: str
    outer: int
    inner: int
    width: int
    strides: tuple[int, int]
    dtype: torch.dtype
    is_written: bool
    home: "np.ndarray | None" = None  # the bytes that it lies in
    address: int = 0

    @property
    def is_empty(self):
        return 0 in (self.outer, self.inner, self.width)

    @property
    def moving_strides(self):
        """A stride along which there is one element is never taken."""
        sizes = (self.outer, self.inner)
        return tuple(s if size > 1 else 0 for s, size in zip(self.strides, sizes, strict=True))

    @property
    def span(self):
        outer, inner = self.moving_strides
        elements = (self.outer - 1) * outer + (self.inner - 1) * inner + self.width
        return elements * self.dtype.itemsize

    @property
    def is_inside(self):
        begin = self.home.ctypes.data
        return begin + GUARD <= self.address <= begin + self.home.size - GUARD - self.span

    def bytes_of_rows(self):
        """Address of every byte, row by row."""
        outer, inner = self.moving_strides
        places = np.arange(self.outer)[:, None] * outer + np.arange(self.inner) * inner
        row = np.arange(self.width * self.dtype.itemsize)
        return self.address + places[..., None] * self.dtype.itemsize + row

    def view(self, home):
        """The tensor, if its bytes were those of home."""
        offset = self.address - self.home.ctypes.data
        elements = torch.from_numpy(home[offset : offset + self.span]).view(self.dtype)
        return elements.as_strided((self.outer, self.inner, self.width), (*self.moving_strides, 1))


@dataclass
class Call:
    """One call: scalars and addresses by field, as they will be passed."""

    op: str
    values: dict[str, int | float | None]
    branches: list[dict[str, int | None]] = field(default_factory=list)

    def tensors(self):
        """The tensors that these values describe."""
        v, op = self.values, self.op
        B, N, S, D, L, P = (v.get(letter, 0) for letter in "BNSDLP")
        kinds = MOVED if op in ("gather_rows", "scatter_rows") else DTYPES
        kind = kinds.get(v.get("dtype"), torch.float32)
        int32, wide = torch.int32, kind if kind == torch.float64 else torch.float32
        modulated = 0 if S == 0 else D
        contiguous = {
            ("out", "gather_rows"): (B, S, D, kind),
            ("out", "blend"): (B, N, D, kind),
            ("packed", op): (B, S, D, kind),
            ("scores", op): (L if P else 0, B, N, torch.float32),
            ("num_fresh", op): (1, P, L, int32),
            ("indices", "select_tokens"): (P * L, B, v.get("max_fresh"), int32),
            ("positions", "select_tokens"): (P * L, B, N, int32),
            ("positions", "invert_indices"): (1, B, N, int32),
            ("positions", "row_pass"): (1, B, N, int32),
        }
        strided = {
            "x": (B, N, D, kind), "rows": (B, S, D, kind), "cache": (B, N, D, kind),
            "out": (B, N, D, kind), "cached": (B, N, D, kind), "fresh": (B, N, D, kind),
            "shift": (B, 1, modulated, kind), "scale": (B, 1, modulated, kind),
            "indices": (B, 1, S, int32), "weight": (B, N, 1 if D else 0, wide),
            "staleness": (L if P else 0, B, N, int32),
        }  # fmt: skip
        found = {}
        for name in (n for n, kind_ in STRUCTURES[op]._fields_ if kind_ is ctypes.c_void_p):
            if name in ("branches", "workspace"):
                continue
            if (name, op) in contiguous:
                outer, inner, width, dtype = contiguous[name, op]
                strides = (inner * width, width)
            else:
                outer, inner, width, dtype = strided[name]
                strides = tuple(
                    v.get(f"stride_{name}_{letter}", 0)
                    for letter in {"rows": "bs", "staleness": "lb"}.get(name, "bn")
                )
            found[name] = Tensor(name, outer, inner, width, strides, dtype, name in RESULTS[op])
        for j, one in enumerate(self.branches[: max(0, v.get("num_branches", 0))]):
            strides = one["stride_branch_b"], one["stride_branch_n"]
            found[f"branch{j}"] = Tensor("branch", B, N, D, strides, kind, False)
            found[f"gate{j}"] = Tensor("gate", B, 1, D, (one["stride_gate_b"], 0), kind, False)
        return found

    def place(self, name):
        """The dictionary and the key that hold a tensor's address."""
        match = re.fullmatch(r"(branch|gate)(\d+)", name)
        return (self.branches[int(match[2])], match[1]) if match else (self.values, name)


def may_be_null(op, name):
    return name in ("gate", "num_fresh") or (op, name) == ("row_pass", "positions")


@st.composite
def honest_calls(draw, op):
    """A call within the documentation, and the memory of its tensors."""
    size = st.sampled_from([0, 1, 2, 2, 3, 3, 5])
    fields = dict(STRUCTURES[op]._fields_)
    values = {name: draw(size) for name in "BNSDLP" if name in fields}
    values["N"] = draw(st.integers(1, 9))
    for name in ("S", "max_fresh"):
        if name in fields:
            values[name] = draw(st.integers(0, values["N"]))
    if op == "select_tokens":
        divisors = [n for n in range(1, values["N"] + 1) if values["N"] % n == 0]
        height = draw(st.sampled_from([0, *divisors]))
        values["grid_height"], values["grid_width"] = height, height and values["N"] // height
        values |= {"tile": draw(st.integers(1, 4)), "bonus": 0.5}
        # scores are compared exactly: either is exact in float32, both together are not
        values["normalize"] = draw(st.integers(0, 1))
        values["staleness_weight"] = 0.0 if values["normalize"] else 0.25
    if "dtype" in fields:
        values["D"] = draw(st.integers(0, 20))
        values["dtype"] = draw(st.sampled_from(list(DTYPES)))
    if "eps" in fields:
        values["eps"] = 1e-5
    call = Call(op, values)
    if "num_branches" in fields:
        values["num_branches"] = draw(st.integers(0, 3))
        empty = {"stride_branch_b": 0, "stride_branch_n": 0, "stride_gate_b": 0}
        call.branches = [dict(empty) for _ in range(values["num_branches"])]

    for name, tensor in call.tensors().items():
        holder, key = call.place(name)
        letters = "lb" if key == "staleness" else "bs" if key == "rows" else "bn"
        gap = st.sampled_from([0, 0, 1, 4])
        inner = tensor.width + draw(gap)
        outer = max(tensor.inner, 1) * inner + draw(gap)
        if draw(st.booleans()) and tensor.inner > 1:  # the other way round in memory
            outer = tensor.width + draw(gap)
            inner = max(tensor.outer, 1) * outer + draw(gap)
        if not tensor.is_written and draw(st.integers(0, 4)) == 0:
            outer = 0
        for letter, stride in zip(letters, (outer, inner), strict=True):
            if f"stride_{key}_{letter}" in {**fields, **dict(STRUCTURES["branch"]._fields_)}:
                holder[f"stride_{key}_{letter}"] = stride
    homes = {}
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    for name, tensor in call.tensors().items():
        holder, key = call.place(name)
        if may_be_null(op, key) and draw(st.booleans()):
            holder[key] = None
            continue
        homes[name] = fresh_memory(tensor, key, values["N"], rng)
        holder[key] = homes[name].ctypes.data + GUARD
    if fields.keys() >= {"x", "out", "branches"} and draw(st.booleans()):
        values |= {"x": values["out"]}
        values |= {f"stride_x_{n}": values[f"stride_out_{n}"] for n in "bn"}
        del homes["x"]
    return call, homes


def fresh_memory(tensor, key, num_tokens, rng):
    """Guards around as many bytes as the tensor spans, filled with values of its type."""
    span = 0 if tensor.is_empty else tensor.span
    home = np.full(GUARD + (span + 7) // 8 * 8 + GUARD, 0xA5, np.uint8)
    if span == 0:
        return home
    count = span // tensor.dtype.itemsize
    if key in ("indices", "num_fresh", "positions", "staleness"):
        near = rng.integers(-1, num_tokens + 1, count)
        far = rng.integers(-(2**31), 2**31, count)
        data = torch.from_numpy(np.where(rng.random(count) < 0.2, far, near)).int()
    elif key == "scores":
        data = torch.from_numpy(rng.integers(-9, 9, count) / 2).float()
    elif tensor.dtype.is_floating_point:
        data = torch.from_numpy(rng.standard_normal(count)).to(tensor.dtype)
    else:
        data = torch.from_numpy(rng.integers(0, 256, span, np.uint8))
    home[GUARD : GUARD + span] = data.view(torch.uint8).numpy()
    return home


@st.composite
def hostile_calls(draw, op):
    """An honest call, of which up to three fields are spoiled."""
    call, homes = draw(honest_calls(op))
    pointers = {
        name
        for struct in (op, "branch")
        for name, kind in STRUCTURES[struct]._fields_
        if kind is ctypes.c_void_p
    }
    for _ in range(draw(st.integers(0, 3))):
        holder = draw(st.sampled_from([call.values, call.values, *call.branches]))
        names = sorted(holder)
        strides = [name for name in names if name.startswith("stride")]
        name = draw(st.sampled_from([*names, *strides]))
        value = holder[name]
        if isinstance(value, float):
            holder[name] = draw(st.sampled_from([0.0, 1e300, -1.0, math.inf, math.nan]))
        elif name in pointers:
            shift = draw(st.sampled_from([-8, 1, 2, 4, 8, 12]))
            others = [home.ctypes.data + GUARD for home in homes.values()]
            moved = [] if value is None else [value + shift]
            holder[name] = draw(st.sampled_from([None, *moved, *others]))
        elif value is not None:
            holder[name] = draw(
                st.one_of(st.sampled_from(HOSTILE), st.integers(value - 3, value + 3))
            )
    if "dtype" in call.values:
        call.values["dtype"] = (call.values["dtype"] + 2**31) % 2**32 - 2**31
    if "normalize" in call.values:
        call.values["normalize"] = int(call.values["normalize"] != 0)
    return call, homes


def breaks_a_rule(call, tensors):
    """Tell whether the documentation refuses this call; overlaps are left out."""
    v = call.values
    N = v["N"]
    grid = v.get("grid_height", 0), v.get("grid_width", 0)
    rules = [
        all(v.get(letter, 0) >= 0 for letter in "BSDLP"),
        0 <= N < 2**31,
        v.get("S", 0) <= N,
        0 <= v.get("max_fresh", 0) <= N,
        v.get("dtype", 1) in DTYPES,
        0 <= v.get("eps", 0) < math.inf,
        0 <= v.get("num_branches", 0) <= 256,
        grid == (0, 0) or (min(grid) >= 0 and grid[0] * grid[1] == N and v["tile"] >= 1),
    ]
    if not all(rules):
        return True
    for tensor in tensors.values():
        if tensor.is_empty or (tensor.address == 0 and may_be_null(call.op, tensor.name)):
            continue
        if (
            min(tensor.moving_strides) < 0
            or tensor.span >= 2**52
            or tensor.address == 0
            or tensor.address % tensor.dtype.itemsize
        ):
            return True
    return False


def overlaps(tensors):
    """Tell whether written bytes belong to another tensor as well, or to two rows."""
    used = [t for t in tensors.values() if not t.is_empty and t.address]
    for tensor in (t for t in used if t.is_written):
        own = tensor.bytes_of_rows()
        if np.unique(own).size < own.size:
            return True
        for other in used:
            in_place = (
                (other.name, tensor.name) == ("x", "out")
                and other.address == tensor.address
                and other.moving_strides == tensor.moving_strides
            )
            if other is not tensor and not in_place and np.isin(own, other.bytes_of_rows()).any():
                return True
    return False


def run_reference(call, views):
    """Compute the expected results: (out, exact, rounded) within a budget, or equal to out."""
    v = call.values
    op = call.op

    def with_type(convert):
        t = {name: convert(view) for name, view in views.items()}
        flat = {name: t[name][:, 0] for name in ("indices", "shift", "scale") if name in t}
        count = v.get("num_branches", 0)
        branches = [t[f"branch{j}"] for j in range(count)]
        gates = [t[f"gate{j}"][:, 0] if f"gate{j}" in t else None for j in range(count)]

        def modulate(x):
            if v["S"] == 0:  # then shift and scale may be missing
                return x[:, :0]
            return reference.gather_modulate(
                x, flat["indices"], flat["shift"], flat["scale"], reference.RowNorm(eps=v["eps"])
            )

        if op == "gather_rows":
            return {"out": reference.gather_rows(t["x"], flat["indices"])}
        if op == "scatter_rows":
            cache = t["cache"].clone()
            for b, s in np.ndindex(v["B"], v["S"]):
                token = int(flat["indices"][b, s])
                if 0 <= token < v["N"]:
                    cache[b, token] = t["rows"][b, s]
            return {"cache": cache}
        if op == "add_branches":
            return {"out": reference.sum_branches(t["x"], branches, gates)}
        if op == "gather_modulate":
            return {"packed": modulate(t["x"])}
        if op == "row_pass":
            out = reference.sum_branches(t["x"], branches, gates)
            # the row that is normalised is the one that was stored
            rounded = out.to(views["x"].dtype).to(out.dtype)
            return {"out": out, "packed": modulate(rounded)}
        if op == "blend":
            out = reference.blend(t["cached"], t["fresh"], t["weight"][..., 0])
            return {"out": out.to(t["fresh"].dtype)}
        positions = reference.invert_indices(flat["indices"], v["N"])
        for b, s in np.ndindex(v["B"], v["S"]):  # of a token's slots, the last one stays
            if 0 <= (token := int(flat["indices"][b, s])) < v["N"]:
                positions[b, token] = s
        return {"positions": positions[None]}

    if op == "select_tokens":
        staleness = views["staleness"].clone()
        fresh = views["num_fresh"][0] if "num_fresh" in views else None
        if fresh is None:
            fresh = torch.full((v["P"], v["L"]), v["max_fresh"], dtype=torch.int32)
        grid = (v["grid_height"], v["grid_width"]) if v["grid_height"] else None
        indices, positions = reference.select_tokens_(
            views["scores"], staleness, fresh, v["max_fresh"], v["staleness_weight"],
            bool(v["normalize"]), grid, min(v["tile"], v["N"]), v["bonus"],
        )  # fmt: skip
        shape = (v["P"] * v["L"], v["B"], -1)
        return {
            "staleness": (staleness, staleness),
            "indices": (indices.reshape(*shape[:2], v["max_fresh"]),) * 2,
            "positions": (positions.reshape(*shape[:2], v["N"]),) * 2,
        }
    exact = with_type(lambda t: t.double() if t.is_floating_point() else t.clone())
    rounded = with_type(lambda t: t.clone())
    return {name: (exact[name], rounded[name]) for name in exact}


@pytest.mark.skipif(shutil.which("cc") is None, reason="there is no C compiler")
def test_the_header_is_plain_c_and_its_structures_are_read_rightly(tmp_path):
    program = tmp_path / "sizes.c"
    program.write_text(
        '#include <stddef.h>\n#include <stdio.h>\n#include "tokencache.h"\nint main(void) {\n'
        + "".join(
            f'printf("{name} {field} %d\\n", (int)offsetof(struct tokencache_{name}'
            f"{'' if name == 'branch' else '_args'}, {field}));\n"
            for name, structure in STRUCTURES.items()
            for field, _ in structure._fields_
        )
        + "return 0;\n}\n"
    )

    flags = ["-std=c99", "-Wall", "-Wextra", "-pedantic", "-Werror", f"-I{HEADER.parent}"]
    subprocess.run(["cc", *flags, program, "-o", tmp_path / "sizes"], check=True)
    offsets = subprocess.check_output([tmp_path / "sizes"], text=True).splitlines()

    assert len(STRUCTURES) == 9
    assert offsets == [
        f"{name} {field} {getattr(structure, field).offset}"
        for name, structure in STRUCTURES.items()
        for field, _ in structure._fields_
    ]


@pytest.fixture(scope="module")
def library(library_path):
    library = ctypes.CDLL(str(library_path))
    library.tokencache_error.restype = ctypes.c_char_p
    return library


@pytest.fixture(params=INSTRUCTIONS)
def instructions(library, request):
    """Each instruction set in turn that the processor has."""
    if library.tokencache_set_cpu_instructions(request.param.encode()) != OK:
        pytest.skip(library.tokencache_error().decode())
    yield request.param
    library.tokencache_set_cpu_instructions(None)


def call_library(library, call, device=CPU):
    branches = (STRUCTURES["branch"] * len(call.branches))(
        *(STRUCTURES["branch"](**one) for one in call.branches)
    )
    args = STRUCTURES[call.op](**call.values)
    if call.branches:
        args.branches = ctypes.addressof(branches)
    function = getattr(library, f"tokencache_{call.op}")
    return function(ctypes.byref(args), ctypes.c_int32(device), None)


class Poison:
    """Memory beside the tensors must not even be read, which only AddressSanitizer can tell."""

    def __init__(self, homes, tensors):
        self.homes = list(homes.values())
        self.spans = []
        used = [t.bytes_of_rows().ravel() for t in tensors.values() if not t.is_empty and t.address]
        used = np.unique(np.concatenate(used)) if used else np.empty(0, int)
        for home in self.homes:
            begin, end = home.ctypes.data, home.ctypes.data + home.size
            inside = used[(used >= begin) & (used < end)]
            edges = [begin, *(edge for byte in inside for edge in (byte, byte + 1)), end]
            for start, stop in zip(edges[::2], edges[1::2], strict=True):
                if start < stop:
                    self.spans.append((int(start), int(stop - start)))

    def __enter__(self):
        poison = getattr(ctypes.CDLL(None), "__asan_poison_memory_region", None)
        for address, size in self.spans if poison else ():
            poison(ctypes.c_void_p(address), ctypes.c_size_t(size))

    def __exit__(self, *_):
        unpoison = getattr(ctypes.CDLL(None), "__asan_unpoison_memory_region", None)
        for home in self.homes if unpoison else ():
            unpoison(ctypes.c_void_p(home.ctypes.data), ctypes.c_size_t(home.size))


def find_homes(call, tensors, homes):
    """Tell every tensor its address, and in whose bytes that is."""
    for name, tensor in tensors.items():
        holder, key = call.place(name)
        tensor.address = holder.get(key) or 0
        offsets = ((home, tensor.address - home.ctypes.data) for home in homes.values())
        tensor.home = next((home for home, offset in offsets if 0 <= offset < home.size), None)


@pytest.mark.usefixtures("instructions")
@pytest.mark.parametrize("op", OPS)
@FUZZ
@given(data=st.data())
def test_a_hostile_call_is_refused_or_does_what_the_reference_does(library, op, data):
    call, homes = data.draw(hostile_calls(op))
    tensors = call.tensors()
    find_homes(call, tensors, homes)
    before = {name: home.copy() for name, home in homes.items()}
    must_refuse = breaks_a_rule(call, tensors)
    seen = {name: t for name, t in tensors.items() if not t.is_empty and t.address}
    if not must_refuse:
        assume(all(t.home is not None and t.is_inside for t in seen.values()))
        # one row may stand for any number of rows: more than the reference can hold
        assume(all(t.outer * t.inner * t.width < 2**20 for t in seen.values()))
        assume(call.values.get("num_branches", 0) <= len(call.branches))
        must_refuse = overlaps(tensors)

    with Poison(homes, {} if must_refuse else seen):
        status = call_library(library, call)

    sentence = library.tokencache_error().decode() if status else ""
    if status:
        assert status == INVALID
        assert re.fullmatch(rf"{op}: [\w* ]+ must .+, got .+", sentence), sentence
        assert all(np.array_equal(homes[name], before[name]) for name in homes)
        # rows that interlock in some other way than as columns of one array may be refused as well
        assert must_refuse or "overlap" in sentence, sentence
        return
    assert not must_refuse
    check_results(call, tensors, homes, before)


def check_results(call, tensors, homes, before):
    """The results are the reference's, and no other byte has changed."""
    if all(tensor.is_empty for tensor in tensors.values() if tensor.is_written):
        assert all(np.array_equal(homes[name], before[name]) for name in homes)
        return
    name_of = {id(home): name for name, home in homes.items()}
    views = {}
    for name, tensor in tensors.items():
        sizes = (tensor.outer, tensor.inner, tensor.width)
        if tensor.is_empty:
            views[name] = torch.zeros(sizes, dtype=tensor.dtype)
        elif tensor.address:
            views[name] = tensor.view(before[name_of[id(tensor.home)]])
    results = run_reference(call, views)
    # memory read as another type, or from another byte on, holds any number; NaN compares as False
    floats = [view for view in views.values() if view.is_floating_point()]
    is_tame = all(bool((view.abs() < 1e3).all()) for view in floats)
    # and without eps, a row of one number is divided by 0
    is_tame = is_tame and call.values.get("eps") != 0
    is_exact = is_tame or not call.values.get("normalize")
    assert results.keys() == RESULTS[call.op]
    for name, (exact, rounded) in results.items():
        tensor = tensors[name]
        if tensor.is_empty:
            continue
        home = before[name_of[id(tensor.home)]]
        out = tensor.view(tensor.home)
        if not tensor.dtype.is_floating_point:
            assert not is_exact or torch.equal(out, rounded)
        elif is_tame and tensor.dtype == torch.float64:  # in which the reference is not exact
            torch.testing.assert_close(out, exact, rtol=1e-12, atol=1e-12)
        elif is_tame:
            # of so few numbers the reference may be exact by chance: a few roundings more
            slack = 8 * torch.finfo(out.dtype).eps * exact.abs().max().item()
            error = (out.double() - exact).abs().max().item()
            assert error <= error_budget(exact, rounded) + slack
        tensor.view(home).copy_(out)
    assert all(np.array_equal(homes[name], before[name]) for name in homes)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("op", OPS)
@settings(FUZZ, max_examples=5)
@given(data=st.data())
def test_a_device_that_is_not_there_is_unsupported(library, op, data):
    call, homes = data.draw(honest_calls(op))
    before = {name: home.copy() for name, home in homes.items()}

    assert call_library(library, call, device=CUDA) == UNSUPPORTED

    sentence = library.tokencache_error().decode()
    assert sentence.startswith(f"{op}: device must be one that can be used here, got TOKENCACHE_CU")
    # the kernels are there or not, but there is no GPU: each is said plainly
    assert re.search("there is no driver|shows no GPU|no kernels were built", sentence)
    assert all(np.array_equal(homes[name], before[name]) for name in homes)


@pytest.fixture(scope="module")
def kernels(request, library_path, tmp_path_factory):
    """The library, the device where its kernels run, a GPU or the emulator's, and torch's name."""
    if torch.cuda.is_available():
        return request.getfixturevalue("library"), "cuda"
    emulated = request.getfixturevalue("emulated_library")
    folder = tmp_path_factory.mktemp("emulated")
    shim = folder / "shim.cpp"
    shim.write_text(
        "#include <cuda_runtime_api.h>\n"
        "cudaError_t cudaGetDeviceCount(int* count) { *count = 1; return cudaSuccess; }\n"
    )
    version = __version__.rpartition(".")[0]
    cuda_emulator.run(
        shutil.which(os.environ.get("CXX", "g++")), "-std=c++20", "-shared", "-fPIC",
        f"-I{CSRC}", f"-I{CSRC}/include", f"-I{cuda_emulator.find_cuda_headers()}",
        '-DTOKENCACHE_CUDA_VERSION=""', '-DTOKENCACHE_CUDA_ARCHITECTURES=""',
        CSRC / "c_api" / "cuda_launches.cpp", shim, emulated, f"-Wl,-rpath,{emulated.parent}",
        "-o", folder / f"libtokencache_cuda.so.{version}",
    )  # fmt: skip
    library = ctypes.CDLL(str(shutil.copy(library_path, folder)))
    library.tokencache_error.restype = ctypes.c_char_p
    return library, "cpu"


@pytest.fixture
def nothing_undefined(capfd):
    """The reports of the sanitizer in the emulated kernels."""
    yield
    assert "runtime error" not in capfd.readouterr().err


@pytest.mark.usefixtures("nothing_undefined")
@pytest.mark.parametrize("op", OPS)
@settings(FUZZ, max_examples=FUZZ.max_examples // 4)
@given(data=st.data())
def test_kernels_do_what_the_reference_does(kernels, op, data):
    library, device = kernels
    call, homes = data.draw(honest_calls(op))
    tensors = call.tensors()
    find_homes(call, tensors, homes)
    name_tokens_once(call, tensors)
    before = {name: home.copy() for name, home in homes.items()}
    on_device = {n: torch.from_numpy(home).to(device, copy=True) for n, home in homes.items()}

    moved = copy.deepcopy(call)
    shift = {
        id(home): on_device[name].data_ptr() - home.ctypes.data for name, home in homes.items()
    }
    for name, tensor in tensors.items():
        holder, key = moved.place(name)
        holder[key] = tensor.address and tensor.address + shift[id(tensor.home)]
    status = call_library(library, moved, device=CUDA)
    for name, home in homes.items():
        home[:] = on_device[name].cpu().numpy()

    if call.values.get("dtype") == FLOAT64 and op not in ("gather_rows", "scatter_rows"):
        assert status == UNSUPPORTED
        assert all(np.array_equal(homes[name], before[name]) for name in homes)
    else:
        assert status == OK, library.tokencache_error().decode()
        check_results(call, tensors, homes, before)


def name_tokens_once(call, tensors):
    """Meet the kernels' preconditions: no token twice in a sample, positions as the inverse."""
    indices = tensors.get("indices")
    if indices is None or indices.is_written or indices.is_empty:
        return
    view = indices.view(indices.home)[:, 0]
    for row in view:
        seen = set()
        for slot, token in enumerate(row.tolist()):
            row[slot] = -1 if token in seen else token
            seen.add(token)
    positions = tensors.get("positions")
    if positions is not None and not positions.is_written and positions.address:
        inverse = reference.invert_indices(view.contiguous(), call.values["N"])
        positions.view(positions.home)[0].copy_(inverse)


@pytest.mark.usefixtures("nothing_undefined")
def test_a_long_selection_works_in_the_workspace_that_it_asks_for(kernels):
    library, device = kernels
    B, N, S = 2, 9001, 700
    scores = torch.rand(1, B, N, device=device)
    staleness = torch.randint(9, (1, B, N), dtype=torch.int32, device=device)
    indices = torch.empty(1, 1, B, S, dtype=torch.int32, device=device)
    positions = torch.empty(1, 1, B, N, dtype=torch.int32, device=device)
    values = {"L": 1, "B": B, "N": N, "P": 1, "max_fresh": S, "staleness_weight": 0.25}
    values |= {name: tensor.data_ptr() for name, tensor in (
        ("scores", scores), ("staleness", staleness), ("indices", indices), ("positions", positions)
    )}  # fmt: skip
    args = STRUCTURES["select_tokens"](**values, stride_staleness_b=N)
    expected = reference.select_tokens_(
        scores.cpu(), staleness.to("cpu", copy=True), None, S, 0.25, False, None, 1, 0.0
    )

    needed = ctypes.c_int64()
    library.tokencache_select_tokens_workspace(ctypes.byref(args), CUDA, ctypes.byref(needed))
    without = library.tokencache_select_tokens(ctypes.byref(args), CUDA, None)
    workspace = torch.empty(needed.value, dtype=torch.uint8, device=device)
    args.workspace, args.workspace_bytes = workspace.data_ptr(), needed.value
    status = library.tokencache_select_tokens(ctypes.byref(args), CUDA, None)

    assert needed.value > 0
    assert (without, status) == (INVALID, OK)
    for mine, wanted in zip((indices, positions), expected, strict=True):
        assert torch.equal(mine[0, 0].cpu(), wanted.reshape(B, -1))
