"""The shape that many models share: two streams, joint attention, an MLP for each."""

from collections.abc import Mapping

from .spec import Branch, JointAttention, Mlp, Modulation, Norm, Part


def joint_parts(
    *,
    attention: str = "attn",
    norms: tuple[str, str] = ("norm1.norm", "norm1_context.norm"),
    mlp_norms: tuple[str, str] = ("norm2", "norm2_context"),
    mlps: tuple[str, str] = ("ff", "ff_context"),
    passes: Mapping[str, str],
    is_text_first: bool = True,
) -> tuple[Part, ...]:
    """The parts of a block of two streams, modulated by ``image`` and ``text``.

    Args:
        attention: the path of the joint attention.
        norms: the paths of the norms before it, of image and text.
        mlp_norms: those before the MLPs.
        mlps: the paths of the MLPs.
        passes: the attention's arguments, and the block's arguments that they are given.
        is_text_first: whether the text's tokens come first in the attention's sequence.
    """
    image, text = "hidden_states", "encoder_hidden_states"
    return (
        JointAttention(
            attention,
            image=Branch(attention, "attn", image, Norm(norms[0]), Modulation("image", 0, 1, 2)),
            text=Branch(attention, "attn", text, Norm(norms[1]), Modulation("text", 0, 1, 2)),
            passes=passes,
            is_text_first=is_text_first,
        ),
        Mlp(mlps[0], "mlp", image, Norm(mlp_norms[0]), Modulation("image", 3, 4, 5)),
        Mlp(mlps[1], "text_mlp", text, Norm(mlp_norms[1]), Modulation("text", 3, 4, 5)),
    )
