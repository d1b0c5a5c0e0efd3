"""The block shape of a kernel that moves rows: several rows by some of their channels a program."""

from dataclasses import dataclass

import triton

# the widest rows that are supported: beyond them a whole row no longer fits one program's registers
MAX_WIDTH = 8192


@dataclass(frozen=True)
class TileSetting:
    """``rows`` rows by ``block_d`` channels a program."""

    rows: int
    block_d: int
    num_warps: int

    @classmethod
    def for_pieces(cls, width: int) -> "TileSetting":
        """For rows that may be cut anywhere: four 16-byte pieces of bfloat16 a thread.

        The widest block that leaves at most an eighth of its lanes idle, else the narrowest.
        """
        block_d = 128
        for wider in (256, 512, 1024):
            if triton.cdiv(width, wider) * wider <= 1.125 * width:
                block_d = wider
        return cls(rows=4096 // block_d, block_d=block_d, num_warps=4)

    @classmethod
    def for_whole_rows(cls, width: int) -> "TileSetting":
        """For rows that are reduced, at most ``MAX_WIDTH`` wide: 16 channels a thread."""
        block_d = max(triton.next_power_of_2(width), 64)
        rows = max(2048 // block_d, 1)
        return cls(rows=rows, block_d=block_d, num_warps=rows * block_d // 512)


def piece_settings() -> list[TileSetting]:
    """All that ``for_pieces`` may return."""
    return [TileSetting.for_pieces(width) for width in (128, 256, 512, 1024)]


def whole_row_candidates(width: int) -> list[TileSetting]:
    """Settings worth trying for whole rows of this width: 8 to 32 channels a thread."""
    block_d = TileSetting.for_whole_rows(width).block_d
    return [
        TileSetting(rows, block_d, num_warps)
        for rows in (1, 2, 4, 8)
        for num_warps in (1, 2, 4, 8, 16)
        if 8 <= rows * block_d // (32 * num_warps) <= 32
    ]


def whole_row_settings() -> list[TileSetting]:
    """All that ``for_whole_rows`` may return."""
    return [TileSetting.for_whole_rows(1 << bits) for bits in range(6, MAX_WIDTH.bit_length())]
