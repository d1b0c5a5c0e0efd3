"""Reading listings of machine code: each rule on a few lines of them."""

from tokencache_kernels.commands.machine_code import (
    count_hazards,
    find_hot_loop,
    parse_instructions,
    read_hopper,
)


def listing(*lines):
    return "\n".join(
        f"        /*{16 * i:04x}*/  {line} ;  /* 0x0 */" for i, line in enumerate(lines)
    )


QUERY_KEY = "HGMMA.64x64x16.F32.BF16 R88, gdesc[UR4], R88, gsb0"
# its left factor comes from R120 to R123
PROBABILITY_VALUE = "HGMMA.64x128x16.F32.BF16 R24, R120, gdesc[UR8].tnspB, R24, gsb0"
WAIT_ALL = "WARPGROUP.DEPBAR.LE gsb0, 0x0"
WAIT_BUT_ONE = "WARPGROUP.DEPBAR.LE gsb0, 0x1"
ROUND = "F2FP.BF16.F32.PACK_AB R121, R9, R8"


def hazards(*lines):
    return count_hazards(parse_instructions(listing(*lines)))


def test_a_listing_is_parsed_without_its_padding():
    code = parse_instructions(
        listing("@!P0 LDG.E.128 R4, desc[UR4][R2.64]", "EXIT", "BRA 0x20", "NOP", "NOP")
    )

    assert [one.name for one in code] == ["LDG", "EXIT"]
    assert list(code[0].written) == [4, 5, 6, 7]


def test_destinations_are_found_behind_predicates_and_not_in_stores():
    code = parse_instructions(
        listing(
            "SHFL.BFLY PT, R14, R15, 0x1, 0x1f",
            "ISETP.GE.AND P0, PT, R1, R2, PT",
            "STG.E.128 desc[UR4][R2.64], R8",
            "IMAD.WIDE R6, R1, 0x2, R8",
            "LDGSTS.E.BYPASS.128 [R7], desc[UR4][R2.64]",
        )
    )

    assert [list(one.written) for one in code] == [[14], [], [], [6, 7], []]


def test_the_hot_loop_has_the_most_products():
    code = parse_instructions(
        listing("MOV R1, R2", "MOV R1, R2", "BRA 0x10", QUERY_KEY, WAIT_ALL, "@P0 BRA 0x30")
    )

    assert [one.name for one in find_hot_loop(code)] == ["HGMMA", "WARPGROUP", "BRA"]


def test_a_write_before_the_wait_is_a_hazard_and_behind_it_none():
    assert hazards(PROBABILITY_VALUE, ROUND, WAIT_ALL) == 1
    assert hazards(PROBABILITY_VALUE, WAIT_ALL, ROUND) == 0
    assert hazards(PROBABILITY_VALUE, "MOV R124, R1", WAIT_ALL) == 0
    # factors in shared memory lie in no register
    assert hazards(QUERY_KEY, ROUND, WAIT_ALL) == 0


def test_a_wait_that_leaves_groups_under_way_guards_the_older_ones_only():
    assert hazards(PROBABILITY_VALUE, QUERY_KEY, WAIT_BUT_ONE, ROUND) == 0
    assert hazards(QUERY_KEY, PROBABILITY_VALUE, WAIT_BUT_ONE, ROUND) == 1


def test_a_hazard_in_the_next_turn_of_a_loop_is_found():
    assert hazards(ROUND, PROBABILITY_VALUE, "@P0 BRA 0x0", WAIT_ALL) == 1
    assert hazards(WAIT_ALL, ROUND, PROBABILITY_VALUE, "@P0 BRA 0x0", WAIT_ALL) == 0


def test_a_kernel_is_summed_up():
    code = read_hopper(
        listing(
            "MOV R1, R2",
            "LDGSTS.E.BYPASS.128 [R7], desc[UR4][R2.64]",
            QUERY_KEY,
            WAIT_BUT_ONE,
            "@P0 BRA 0x10",
            "EXIT",
        ),
        num_warps=4,
    )

    assert code.instructions == 6
    assert code.loop == {"BRA": 1, "HGMMA": 1, "LDGSTS": 1, "WARPGROUP": 1}
    assert (code.in_flight, code.copy_bytes, code.hazards) == (1, 16, 0)
    # 128 threads copy 16 bytes each, while 64 x 64 x 16 products take 32 clocks
    assert code.l2_bytes == 64
