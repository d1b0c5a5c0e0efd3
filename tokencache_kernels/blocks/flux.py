"""FLUX: attention of two streams at once, and blocks whose attention and MLP stand side by side."""

from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import Tensor, nn

from .. import ops
from ..policies import Action, Site
from .runner import Runner
from .stream import Modulation, ResidualStream
from .sublayers import add_forecast


@dataclass(frozen=True)
class JointAttention:
    """Self-attention over image and text together, each with its own norm, projections and gate.

    Attributes:
        site: decides for both; their outputs, each after its projection, are two features.
        gates: (B, D) of image and text.
        modulations: likewise.
        module: the normalised image and text to the outputs of both.
    """

    site: Site
    gates: tuple[Tensor, Tensor]
    modulations: tuple[Modulation, Modulation]
    module: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]

    def run(self, image: ResidualStream, text: ResidualStream, runner: Runner) -> None:
        """Compute all tokens or reuse all; the outputs become branches of the two streams."""
        if runner.action(self.site) is Action.FULL:
            of_image, of_text = self.modulations
            outputs = self.module(image.modulate(of_image), text.modulate(of_text))
            remember_joint_attention(runner, self.site, *outputs)
            for stream, output, gate in zip((image, text), outputs, self.gates, strict=True):
                stream.add(output, gate)
            return
        features = self.site, _text_feature(self.site)
        for stream, feature, gate in zip((image, text), features, self.gates, strict=True):
            stream.add(runner.features.load(feature, like=stream.hidden_states), gate)
            add_forecast(stream, runner, self.site, gate, feature)


def remember_joint_attention(runner: Runner, site: Site, image: Tensor, text: Tensor) -> None:
    """Store the two outputs of a full computation, if the next step will reuse them."""
    runner.remember(site, image)
    runner.remember(site, text, _text_feature(site))


def _text_feature(site: Site) -> Site:
    """Where the text's attention output is cached; policies decide for image and text at once."""
    return replace(site, module=f"text_{site.module}")


@dataclass(frozen=True)
class ParallelLayer:
    """``gate * fc2(cat(attended, activation(fc1(modulate(x)))))``: attention and MLP side by side.

    What is cached is the output of the second layer, which also projects the attention. Of a fresh
    token the MLP is recomputed, and its attention, as it was cached, is projected again. The hidden
    activations are not cached: nothing would read them.

    Attributes:
        attend: gives (B, N, D), what attention gave, before the projection; nothing asks for it
            where the layer is reused.
        module: the model's own layers: packed rows of the norm and of the attention to the output.
        fc1: the first layer, where the fused path may be taken, else None.
        fc2: the second layer, likewise.
        activation: the activation between them, as ``ops.linear`` names it.
    """

    site: Site
    gate: Tensor
    modulation: Modulation
    attend: Callable[[], Tensor]
    module: Callable[[Tensor, Tensor], Tensor]
    fc1: nn.Linear | None = None
    fc2: nn.Linear | None = None
    activation: str = "none"
    backend: str = "auto"

    def compute(self, stream: ResidualStream) -> Tensor:
        """All tokens; see ``SubLayer``."""
        return self.module(stream.modulate(self.modulation), self.attend())

    def recompute_(
        self, cache: Tensor, stream: ResidualStream, indices: Tensor, positions: Tensor
    ) -> None:
        """The tokens at ``indices``, in three launches; see ``SubLayer``."""
        packed = stream.take_rows(indices, positions, self.modulation)
        backend = self.backend
        if self.fc1 is None or self.fc2 is None:
            attended = ops.gather_rows(self.attend(), indices, backend=backend)
            rows = self.module(packed, attended)
            ops.scatter_rows_(cache, indices, rows, backend=backend)
            return
        fc1, fc2 = self.fc1, self.fc2
        hidden = ops.linear(
            packed, fc1.weight, fc1.bias, activation=self.activation, backend=backend
        )
        # one product over both, as in a full step: two would round their sum in between
        ops.linear_scatter_(
            cache, indices, hidden, fc2.weight, fc2.bias, features=self.attend(), backend=backend
        )
