"""Attention over image and text together, each with its own residual stream."""

from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import Tensor

from ..ops import RowNorm
from ..policies import Action, Site
from .runner import Runner
from .stream import Modulation, ResidualStream
from .sublayers import add_output


@dataclass(frozen=True)
class JointAttention:
    """Self-attention over image and text together, each with its own norm, projections and gate.

    Attributes:
        site: decides for both; their outputs, each after its projection, are two features.
        gates: of image and text, see ``SubLayer``.
        modulations: one for each stream.
        module: the normalised image and text to the outputs of both.
        post_norms: of image and text, see ``SubLayer``.
    """

    site: Site
    gates: tuple[Tensor | None, ...]
    modulations: tuple[Modulation, ...]
    module: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
    post_norms: tuple[RowNorm | None, ...] = (None, None)

    def run(self, image: ResidualStream, text: ResidualStream, runner: Runner) -> None:
        """Compute all tokens or reuse all; the outputs become branches of the two streams."""
        streams, features = (image, text), (self.site, text_feature(self.site))
        outputs: tuple[Tensor, ...]
        if runner.action(self.site) is Action.FULL:
            of_image, of_text = self.modulations
            outputs = self.module(image.modulate(of_image), text.modulate(of_text))
            remember_joint_attention(runner, self.site, *outputs)
        else:
            outputs = tuple(
                runner.features.load(feature, like=stream.hidden_states)
                for stream, feature in zip(streams, features, strict=True)
            )
        for stream, output, gate, norm, feature in zip(
            streams, outputs, self.gates, self.post_norms, features, strict=True
        ):
            add_output(stream, runner, self.site, output, gate, norm, feature)


def remember_joint_attention(runner: Runner, site: Site, image: Tensor, text: Tensor) -> None:
    """Store the two outputs of a full computation, if the next step will reuse them."""
    runner.remember(site, image)
    runner.remember(site, text, text_feature(site))


def text_feature(site: Site) -> Site:
    """The site of the text's output; policies decide for image and text at once."""
    return replace(site, module=f"text_{site.module}")
