"""The problems: one cached layer of each model at each size."""

from dataclasses import dataclass, replace
from math import isqrt


@dataclass(frozen=True)
class Shape:
    """One cached layer: of ``N`` tokens ``S`` are fresh; ``B`` counts guidance's second half.

    Attributes:
        name: the model, its size, and ``B``.
        B: samples.
        N: tokens of each.
        S: fresh ones.
        D: channels.
        M: of the MLP's hidden layer.
        L: layers that one selection is for.
        T: tokens of the text, where the model attends to it by itself.
        extra: the further inputs of fc2 beside the hidden channels, in the single blocks of FLUX.
    """

    name: str
    B: int
    N: int
    S: int
    D: int
    M: int
    L: int = 1
    T: int = 0
    extra: int = 0

    @property
    def head_dim(self) -> int:
        """The heads' width of DiT, and of FLUX and the video models; the last is for the tiny
        layer.
        """
        return next(head_dim for head_dim in (72, 128, 8) if self.D % head_dim == 0)

    @property
    def heads(self) -> int:
        """The number of heads."""
        return self.D // self.head_dim

    @property
    def grid(self) -> tuple[int, int] | None:
        """Rows and columns of an image's tokens; of no other sequence."""
        side = isqrt(self.N)
        return (side, side) if side * side == self.N and side % 2 == 0 else None

    def shrink(self, factor: int) -> "Shape":
        """The same layer with so many times fewer tokens and channels."""
        fewer = {name: max(getattr(self, name) // factor, 1) for name in ("N", "S", "D", "M", "L")}
        name = f"{self.name}-over-{factor}"
        return replace(self, name=name, T=self.T // factor, extra=self.extra // factor, **fewer)

    def at(self, percent: int) -> "Shape":
        """The same layer with so many percent of its tokens fresh."""
        return replace(self, name=f"{self.name}-{percent}%", S=round(self.N * percent / 100))


# the most telling first
SHAPES = (
    Shape("dit-xl-256px-16", 16, 256, 43, 1152, 4608, L=28),
    Shape("flux-1024px-single", 1, 4608, 614, 3072, 12288, L=57, extra=3072),
    Shape("dit-xl-256px-2", 2, 256, 43, 1152, 4608, L=28),
    Shape("flux-1024px-double", 1, 4096, 191, 3072, 12288, L=19),
    Shape("dit-xl-256px-32", 32, 256, 43, 1152, 4608, L=28),
    Shape("pixart-1024px-2", 2, 4096, 1024, 1152, 4608, L=28, T=120),
    Shape("opensora-480p-2", 2, 23850, 3565, 1152, 4608, L=28, T=300),
    Shape("dit-xl-256px-2-109", 2, 256, 109, 1152, 4608, L=28),
    Shape("pixart-256px-32", 32, 256, 111, 1152, 4608, L=28, T=120),
    Shape("dit-xl-512px-8", 8, 1024, 172, 1152, 4608, L=28),
    Shape("wan-1.3b-480p", 1, 32760, 4914, 1536, 8960, L=30, T=512),
    Shape("hunyuan-720p", 1, 118800, 11880, 3072, 12288, L=60),
    Shape("wan-14b-720p", 1, 75600, 30240, 5120, 13824, L=40, T=512),
)
LEADING = SHAPES[:4]
# of these in other shares, that of the fresh tokens alone is another
RATIOS = tuple(shape.at(percent) for percent in (10, 30, 50) for shape in LEADING)

# the shapes for a processor: DiT-XL/2, few fresh tokens and many
CPU_SHAPES = (
    Shape("dit-xl-256px-2-64", 2, 256, 64, 1152, 4608, L=28),
    Shape("dit-xl-256px-2-26", 2, 256, 26, 1152, 4608, L=28),
    Shape("dit-xl-256px-2-128", 2, 256, 128, 1152, 4608, L=28),
    Shape("dit-xl-512px-2", 2, 1024, 102, 1152, 4608, L=28),
    *(Shape(f"dit-xl-256px-8-{S}", 8, 256, S, 1152, 4608, L=28) for S in (26, 64, 128)),
)

# of attention: fresh queries, all of them, and many over a text
ATTENTION_SHAPES = (
    *(shape for shape in LEADING[:2]),
    *(shape.at(100) for shape in LEADING[:2]),
    Shape("pixart-1024px-2-text", 2, 120, 1024, 1152, 4608),
    SHAPES[2],
    SHAPES[2].at(100),
    *SHAPES[3:],
)
CPU_ATTENTION_SHAPES = (
    *(CPU_SHAPES[0], CPU_SHAPES[0].at(100), CPU_SHAPES[3], CPU_SHAPES[3].at(100)),
    *(LEADING[3], ATTENTION_SHAPES[4]),
)

TINY = Shape("tiny", 2, 16, 5, 32, 64, L=2, T=6)
