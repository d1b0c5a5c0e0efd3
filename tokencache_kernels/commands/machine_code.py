"""Read the machine code of Hopper as the disassembler prints it: loops, copies, wgmma, hazards."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

_INSTRUCTION = re.compile(
    r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9]*)((?:\.\w+)*)([^;]*);"
)
_REGISTER = re.compile(r"\bR(\d+)\b")
# threads of a group that multiplies together, and its multiply-adds of 16-bit operands in a clock
_GROUP, _PRODUCTS_PER_CLOCK = 128, 2048
# the first operand of these is no destination
_STORES = frozenset(("ST", "STG", "STS", "STL", "LDGSTS", "RED", "SYNCS", "UTMASTG", "BAR"))


@dataclass(frozen=True)
class Instruction:
    """One instruction: its name, the words after its dots, its operands."""

    address: int
    name: str
    modifiers: tuple[str, ...]
    operands: tuple[str, ...]

    @property
    def target(self) -> int | None:
        """The address that a branch goes to."""
        if self.name != "BRA":
            return None
        return next((int(o, 16) for o in self.operands if o.startswith("0x")), None)

    @property
    def written(self) -> range:
        """The registers that it writes, by number."""
        if self.name in _STORES:
            return range(0)
        # a predicate may come first, as in a shuffle
        for operand in self.operands[:2]:
            if match := _REGISTER.match(operand):
                return range(int(match[1]), int(match[1]) + self._width)
            if not re.match(r"!?U?P[\dT]", operand):
                break
        return range(0)

    @property
    def _width(self) -> int:
        if "128" in self.modifiers or (self.name == "LDSM" and "4" in self.modifiers):
            return 4
        return 2 if {"64", "WIDE", "2"} & {*self.modifiers} else 1


@dataclass(frozen=True)
class HopperCode:
    """The facts of one kernel's machine code for sm_90.

    Attributes:
        instructions: of the kernel.
        loop: the instructions of its hot loop, by name; empty without a loop.
        in_flight: groups of wgmma that the hot loop leaves under way at its waits, at most.
        copy_bytes: the least bytes of one asynchronous copy, 0 without any.
        l2_bytes: bytes copied in the hot loop per clock of its wgmma at full rate, for one program.
        hazards: writes to registers that a wgmma under way still reads.
    """

    instructions: int = 0
    loop: Mapping[str, int] = field(default_factory=dict)
    in_flight: int = 0
    copy_bytes: int = 0
    l2_bytes: float = 0.0
    hazards: int = 0


def parse_instructions(printed: str) -> list[Instruction]:
    """The instructions of a listing by cuobjdump or nvdisasm, without the padding at its end."""
    found = []
    for address, name, modifiers, operands in _INSTRUCTION.findall(printed):
        parts = tuple(part.strip() for part in operands.split(","))
        found.append(Instruction(int(address, 16), name, tuple(modifiers.split(".")[1:]), parts))
    while found and (found[-1].name == "NOP" or found[-1].target == found[-1].address):
        found.pop()
    return found


def find_loops(code: Sequence[Instruction]) -> list[Sequence[Instruction]]:
    """The loops: from the target of each branch backwards to the branch."""
    place = {one.address: index for index, one in enumerate(code)}
    return [
        code[place[one.target] : index + 1]
        for index, one in enumerate(code)
        if one.target is not None and one.target in place and place[one.target] <= index
    ]


def find_hot_loop(code: Sequence[Instruction]) -> Sequence[Instruction]:
    """The loop with the most wgmma, and of those that have as many the shortest."""
    loops = find_loops(code)
    return max(loops, key=lambda loop: (count(loop, "HGMMA"), -len(loop)), default=())


def count(code: Sequence[Instruction], name: str) -> int:
    """Count the instructions of that name."""
    return sum(one.name == name for one in code)


def read_hopper(printed: str, num_warps: int) -> HopperCode:
    """Read the listing of one kernel whose programs have ``num_warps`` warps."""
    code = parse_instructions(printed)
    loop = find_hot_loop(code)
    copies = [_copied(one) for one in code if one.name == "LDGSTS"]
    waits = [wait for one in loop if (wait := _groups_left(one)) is not None]
    products = sum(_products(one) for one in loop) * 32 * num_warps // _GROUP
    copied = sum(_copied(one) for one in loop if one.name == "LDGSTS") * 32 * num_warps
    return HopperCode(
        instructions=len(code),
        loop=dict(sorted(Counter(one.name for one in loop).items())),
        in_flight=max(waits, default=0),
        copy_bytes=min(copies, default=0),
        l2_bytes=round(copied * _PRODUCTS_PER_CLOCK / products, 1) if products else 0.0,
        hazards=count_hazards(code),
    )


def _copied(one: Instruction) -> int:
    """Bytes that one thread copies."""
    return next((int(bits) // 8 for bits in ("128", "64") if bits in one.modifiers), 4)


def _groups_left(one: Instruction) -> int | None:
    """The groups of wgmma that a wait for them leaves under way, or None of other instructions."""
    if one.name != "WARPGROUP" or "DEPBAR" not in one.modifiers:
        return None
    return int(one.operands[-1], 16)


def _products(one: Instruction) -> int:
    """The multiply-adds of a wgmma: ``HGMMA.64x128x16`` does 64 * 128 * 16."""
    if one.name != "HGMMA":
        return 0
    m, n, k = (int(size) for size in one.modifiers[0].split("x"))
    return m * n * k


def count_hazards(code: Sequence[Instruction]) -> int:
    """The writes to registers that a wgmma reads its left factor from and may not have read yet.

    An assembler before CUDA 13.3 may make such (triton-lang/triton#9433). The instructions are
    followed in their order, each loop twice.
    """
    loop_twice: list[Instruction] = []
    ends = {id(loop[-1]): loop for loop in find_loops(code)}
    for one in code:
        loop_twice.append(one)
        if (loop := ends.get(id(one))) is not None and count(loop, "HGMMA"):
            loop_twice.extend(loop)
    hazards: set[int] = set()
    under_way: list[set[int]] = []
    group: set[int] = set()
    for one in loop_twice:
        if one.name == "HGMMA":
            if match := _REGISTER.match(one.operands[1]):
                # 16 bits of a 64 x 16 tile lie in four registers of each thread
                group |= {*range(int(match[1]), int(match[1]) + 4)}
            if "gsb0" in one.operands:
                under_way.append(group)
                group = set()
        elif (left := _groups_left(one)) is not None:
            under_way = under_way[len(under_way) - left :] if left else []
        elif any(register in read for read in (*under_way, group) for register in one.written):
            hazards.add(one.address)
    return len(hazards)
